"""Master weights on several processes, over gloo: DDP, FSDP of both kinds, ZeRO, and checkpoints that go from one number to another."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import precision_policy
from precision_policy.job.events import Events
from precision_policy.job.master_weights import MasterWeights
from precision_policy.job.speaker import Speaker

pytestmark = pytest.mark.once
bf16, int16, int32 = torch.bfloat16, torch.int16, torch.int32
LOW_BITS = "master_low_bits"


def on_ranks(function, ranks, *arguments):
    """Run a function on forked processes that form a group, with master weights on; it gets the listener first."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(rank_main, (ranks, folder, function, arguments), ranks, start_method="fork")


def rank_main(rank, ranks, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    listener = MasterWeights()
    events = Events([listener], Speaker())
    events.start()
    listener.events = events
    function(listener, *arguments)
    events.end()
    dist.barrier()
    dist.destroy_process_group()


def network(seed=0):
    """Sizes that do not divide by two or three."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False)).to(bf16)


def backward(model, seed, rank=None):
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(10 * seed + rank)
    model(torch.randn(5, 6, generator=generator).to(bf16)).float().square().mean().backward()


def train(model, optimizer, steps):
    for seed in steps:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def adamw(params, lr=1e-3):
    return torch.optim.AdamW(params, lr=lr)


def assert_equal_on_all_ranks(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    assert all(torch.equal(one, gathered[0]) for one in gathered)


def bits(tensor):
    return tensor.view(int16) if tensor.dtype is bf16 else tensor


def assert_equal_states(one, other):
    for (name, value), (other_name, other_value) in zip(sorted(one.items()), sorted(other.items()), strict=True):
        assert name == other_name
        if torch.is_tensor(value):
            assert value.dtype is other_value.dtype, name
            assert torch.equal(bits(value), bits(other_value)), name


def ddp(listener):
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = adamw(model.parameters())
    train(model, optimizer, range(4))
    assert listener.kept(optimizer).tensors == 3
    for param in model.parameters():
        assert_equal_on_all_ranks(param.detach())
        assert_equal_on_all_ranks(optimizer.state[param][LOW_BITS])


def test_replicas_of_ddp_stay_equal():
    """Weights and low bits."""
    on_ranks(ddp, 2)


def sharded(seed=0):
    from torch.distributed.fsdp import fully_shard

    model = network(seed)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def fsdp2(listener, make):
    model = sharded()
    params = [param for param in model.parameters() if param.dim() == 2]
    optimizer = make(params)
    copies = [nn.Parameter(param.detach().float()) for param in params]
    reference = make(copies)
    for seed in range(4):
        backward(model, seed)
        for param, copied in zip(params, copies, strict=True):
            copied.grad = param.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        listener.events.on = False
        reference.step()
        listener.events.on = True
    weights = precision_policy.fp32_weights(optimizer)
    for param, copied in zip(params, copies, strict=True):
        assert torch.equal(weights[param].full_tensor(), copied.full_tensor())
        assert param.dtype is bf16
        for value in optimizer.state[param].values():
            if value.dim():
                assert value.placements == param.placements
                assert value.shape == param.shape
    assert listener.kept(optimizer).elements == sum(copied.numel() for copied in copies)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD", "Muon"])
def test_fsdp2_on_local_shards_or_whole(name):
    """As over fp32 copies that are sharded alike; states are DTensors. torch's Adafactor raises on these, also by itself."""
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    on_ranks(fsdp2, 2, lambda params: getattr(torch.optim, name)(params, lr=1e-2))


def save_sharded(listener, folder):
    model = sharded()
    optimizer = adamw(model.parameters())
    train(model, optimizer, range(3))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    whole = by_name(model, optimizer)
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save({"weights": whole, "full": full}, folder / "whole.pt")
    # Two ranks go on from there as if nothing had been.
    resumed = sharded(seed=1)
    other = adamw(resumed.parameters())
    load_sharded_into(resumed, other, folder)
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, range(3, 6))
    for param, twin in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(param.to_local(), twin.to_local())
        for name, value in optimizer.state[param].items():
            local, its = (getattr(one, "_local_tensor", one) for one in (value, other.state[twin][name]))
            assert torch.equal(bits(local), bits(its)), name


def load_sharded_into(model, optimizer, folder):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def by_name(model, optimizer):
    weights = precision_policy.fp32_weights(optimizer)
    found = {}
    for name, param in model.named_parameters():
        weight = weights[param]
        found[name] = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return found


def load_sharded(listener, folder):
    model = sharded(seed=1)
    optimizer = adamw(model.parameters())
    load_sharded_into(model, optimizer, folder)
    saved = torch.load(folder / "whole.pt")
    assert_equal_states(by_name(model, optimizer), saved["weights"])
    train(model, optimizer, range(1))
    assert listener.kept(optimizer).tensors == 3


def load_full(listener, folder):
    saved = torch.load(folder / "whole.pt")
    model = sharded(seed=1)
    optimizer = adamw(model.parameters())
    rounded = {name: weight.bfloat16() for name, weight in saved["weights"].items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    is_first = dist.get_rank() == 0
    set_model_state_dict(model, rounded if is_first else {}, options=options)
    set_optimizer_state_dict(model, optimizer, saved["full"] if is_first else {}, options=options)
    assert_equal_states(by_name(model, optimizer), saved["weights"])
    again = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first:
        for name, entry in again["state"].items():
            assert_equal_states(entry, saved["full"]["state"][name])


def test_a_distributed_checkpoint_goes_to_other_numbers_of_ranks(tmp_path):
    """Saved on two with FSDP2: loaded on two, one and three; as a full state dict, broadcast from rank zero."""
    on_ranks(save_sharded, 2, tmp_path)
    for ranks in (1, 3):
        on_ranks(load_sharded, ranks, tmp_path)
    on_ranks(load_full, 2, tmp_path)


def fsdp1(listener, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def wrapped(seed):
        return FSDP(network(seed), use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    model = wrapped(0)
    optimizer = adamw(model.parameters(), lr=1e-4)
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, range(3))
    key = "master_param" if use_orig_params else LOW_BITS
    entries = [entry for entry in optimizer.state.values() if entry["exp_avg"].numel()]
    assert entries
    assert all(key in entry for entry in entries)
    assert all(entry["exp_avg"].dtype is torch.float32 for entry in entries)
    if not use_orig_params:
        assert listener.kept(optimizer).elements == sum(param.numel() for param in network().parameters())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    resumed = wrapped(1)
    other = adamw(resumed.parameters(), lr=1e-4)
    resumed.load_state_dict(weights)
    if use_orig_params:  # on a CPU, optim_state_dict then gives one state's values for another's, also without master weights
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        state = FSDP.optim_state_dict(model, optimizer)
        other.load_state_dict(FSDP.optim_state_dict_to_load(resumed, other, state))
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, range(3, 6))
    moved = 0
    for param, twin, old in zip(model.parameters(), resumed.parameters(), before, strict=True):
        assert torch.equal(param, twin)
        moved += (param != old).sum()
        if optimizer.state.get(param):
            assert_equal_states(optimizer.state[param], other.state[twin])
    assert moved


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1(use_orig_params):
    """Resumed through its own state dicts, bit for bit; with ``use_orig_params`` by whole fp32 masters."""
    on_ranks(fsdp1, 2, use_orig_params)


def zero(listener):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(model):
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    model = nn.parallel.DistributedDataParallel(network())
    twin = nn.parallel.DistributedDataParallel(network())
    optimizer, plain = make(model), adamw(twin.parameters())
    train(model, optimizer, range(3))
    train(twin, plain, range(3))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    assert listener.kept(optimizer).tensors == len(optimizer.optim.param_groups[0]["params"])
    optimizer.consolidate_state_dict(to=0)
    state = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state)
    resumed = nn.parallel.DistributedDataParallel(network(seed=1))
    resumed.load_state_dict(model.state_dict())
    other = make(resumed)
    other.load_state_dict(copy.deepcopy(state[0]))  # on rank zero, these are the optimizer's own tensors
    for one, its in ((model, optimizer), (resumed, other), (twin, plain)):
        train(one, its, range(3, 6))
    for one, two, three in zip(model.parameters(), resumed.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_zero_redundancy_optimizer():
    """It acts once, where the state is; consolidated, saved and loaded, it goes on bit for bit."""
    on_ranks(zero, 2)
