"""Parallel training on CPU: one warning for all ranks, and numbers that say of what they are."""

import sys

import pytest
import torch
from conftest import CONFIG

CODE = """
import os, sys
import hydra, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.model.torch_dtype)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10)).to(dtype)
    if cfg.way == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif cfg.way.startswith("fsdp2"):
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cfg.way == "fsdp2-bf16" else None)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=cfg.way == "fsdp1-orig", device_id=torch.device("cpu"))
    optimizer = hydra.utils.instantiate(cfg.optimizer)(model.parameters())
    for _ in range(2):
        model(torch.ones(4, 64, dtype=dtype)).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    # torch 2.13 takes gloo groups down badly, policy or not: DDP's destructor may wait for ever, that of
    # ZeroRedundancyOptimizer abort. What is tested has happened by now.
    sys.stdout.flush()
    os._exit(0)

main()
"""
ELEMENTS = 64 * 64 + 64 + 64 + 64 + 64 * 10 + 10


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("way", "processes"),
    [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2-bf16", 2), ("fsdp1", 2), ("fsdp1-orig", 2)],
)
def test_bf16_storage(app, way, processes):
    """One line, one warning; the counts are of the whole model, or say that they are not."""
    run = app(f"way: {way}\n{CONFIG}", CODE)("+precision_policy=on", "model.torch_dtype=bfloat16", python=torchrun(processes))
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "WARNING"]
    if way == "fsdp1-orig":
        assert f"({ELEMENTS // 2:,} elements, of this rank's shard)" in run.out
    else:
        assert f"({ELEMENTS:,} elements)" in run.out
    assert ("from this rank's shard" in run.out) is (way != "ddp")
    assert ("fp32 storage adds on each rank" in run.out) is (way != "ddp")


@pytest.mark.once
def test_zero_redundancy_optimizer(app):
    """Judged by what it shards: the AdamW inside, which has this rank's parameters alone."""
    sharded = [
        "optimizer._target_=torch.distributed.optim.ZeroRedundancyOptimizer",
        "+optimizer.optimizer_class={_target_:hydra.utils.get_class,path:torch.optim.AdamW}",
    ]
    train = app(f"way: ddp\n{CONFIG}", CODE)
    run = train("+precision_policy=on", *sharded, "model.torch_dtype=bfloat16", python=torchrun(2))
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "WARNING"]
    assert "WARNING precision_policy=on: torch.optim.AdamW over bf16 weights" in run.log
    run = train("+precision_policy=on", *sharded, python=torchrun(2))
    assert (
        "INFO precision_policy=on: model.torch_dtype: auto -> float32: torch.optim.AdamW keeps no fp32 master copy" in run.log
    )
    assert "WARNING" not in run.log


@pytest.mark.once
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2-bf16", "fsdp1", "fsdp1-orig"])
def test_fp32_storage(app, way):
    """What the policy set stays fp32 in the optimizer's hands, a bf16 MixedPrecisionPolicy included: silence."""
    run = app(f"way: {way}\n{CONFIG}", CODE)("+precision_policy=on", python=torchrun(2))
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "INFO"]
    tensors = {"fsdp1": 1}.get(way, 6)
    elements = f"{ELEMENTS // 2:,} elements of this rank's shard" if way == "fsdp1-orig" else f"{ELEMENTS:,} elements"
    computed = {"ddp": "computed in fp32", "fsdp2-bf16": "computed in bf16 by FSDP's mixed precision"}
    assert run.log.splitlines()[1].endswith(
        f"{tensors} trainable tensor{'s' * (tensors > 1)}, {elements}: stored in fp32, {computed.get(way, 'called under no autocast or mixed precision')}"
    )


SPAWN = """
import os, sys
import hydra, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from multiprocessing.process import BaseProcess

def work(rank, store, cfg):
    if store:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    weights = [torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))]
    hydra.utils.instantiate(cfg.optimizer)(weights)
    if store:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # as above

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    if cfg.parent_first:
        work(0, None, cfg)
    mp.start_processes(work, (f"file://{os.getcwd()}/store", cfg), nprocs=2, start_method=cfg.method)

if __name__ == "__main__":
    before = BaseProcess.start
    main()
    assert BaseProcess.start is before
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("parent_first", [False, True])
def test_processes_that_the_job_starts(app, method, parent_first):
    """They are watched as the job is: rank zero among them speaks, unless the job itself has said it."""
    run = app(f"method: {method}\nparent_first: {parent_first}\n{CONFIG}", SPAWN)(
        "+precision_policy=on", "model.torch_dtype=bfloat16"
    )
    assert (run.out + run.err).count("over bf16 weights") == 1
    assert ("over bf16 weights" in run.out) is (parent_first or method == "fork")  # a fresh process has no log of Hydra's


def test_strict_in_a_process_that_the_job_starts(app):
    """The error stops it, and the job with it."""
    train = app(f"method: spawn\nparent_first: false\n{CONFIG}", SPAWN)
    assert "Bf16AdamError" in train("+precision_policy=strict", "model.torch_dtype=bfloat16", status=1).err


NO_TORCH = """
import multiprocessing, sys
import hydra

def work(method):
    print(method, "torch" in sys.modules, flush=True)

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    assert "torch" in sys.modules  # the policy is armed
    for method in ("spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=work, args=(method,))
        process.start()
        process.join()

if __name__ == "__main__":
    main()
"""


def test_a_worker_without_torch_is_not_made_to_import_it(app):
    """A pool that prepares data pays nothing for the watch."""
    run = app(CONFIG, NO_TORCH)("+precision_policy=on")
    assert "spawn False" in run.out
    assert "forkserver False" in run.out


MIXED = """
import os, sys
import hydra, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    inside = []
    model[2].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    if cfg.way == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif cfg.way.startswith("fsdp2"):
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cfg.way == "fsdp2-bf16" else None)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=cfg.way == "fsdp1-orig", device_id=torch.device("cpu"))
    optimizer = hydra.utils.instantiate(cfg.optimizer)(model.parameters())
    for _ in range(2):
        output = model(torch.randn(4, 64))
        output.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if cfg.way == "ddp":
        with torch.no_grad():  # evaluation without the wrapper
            output = model.module(torch.randn(4, 64))
    if dist.get_rank() == 0:
        print("INSIDE", inside, "OUTSIDE", output.dtype)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)

main()
"""


@pytest.mark.once
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2-bf16", "fsdp1", "fsdp1-orig"])
def test_mixed(app, way):
    """bf16 inside and fp32 outside under each of them; where FSDP casts by itself, that is said and nothing is added."""
    run = app(f"way: {way}\n{CONFIG}", MIXED)("+precision_policy=mixed", python=torchrun(2))
    assert f"INSIDE {[torch.bfloat16] * (3 if way == 'ddp' else 2)}" in run.out
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "INFO"]
    computed = {
        "ddp": "computed in bf16 by autocast that the policy supplies",
        "fsdp2-bf16": "computed in bf16 by FSDP's mixed precision",
    }
    assert run.log.endswith(f"stored in fp32, {computed.get(way, 'called under autocast that the policy supplies')}")
    assert f"OUTSIDE torch.{'bfloat16' if way == 'fsdp2-bf16' else 'float32'}" in run.out


@pytest.mark.once
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_strict_ends_all_ranks(app, way):
    """None hangs: each rank sees its own bf16 parameters."""
    run = app(f"way: {way}\n{CONFIG}", CODE)(
        "+precision_policy=strict", "model.torch_dtype=bfloat16", python=torchrun(2), status=1
    )
    assert "Bf16AdamError" in run.err


@pytest.mark.once
def test_the_benchmark_of_ranks(tmp_path):
    """What it asserts on GPUs holds with gloo on a CPU as well: one voice, whole counts, shares, dtypes, nobody hangs."""
    import subprocess
    from pathlib import Path

    from conftest import ENVIRONMENT

    script = Path(__file__).parent.parent.parent / "benchmarks/ranks.py"
    command = [*torchrun(2), str(script), "--out", str(tmp_path), "--small"]
    finished = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=400, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len((tmp_path / "ranks-small.csv").read_text().splitlines()) == 11
