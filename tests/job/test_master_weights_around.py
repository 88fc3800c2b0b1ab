"""Out of the way: what the application does around its optimizer, and what it sees there, stays as it was."""

import copy
import gc
import pickle
import weakref

import masters
import pytest
import torch
from masters import LOW_BITS, assert_same, by_hand, fp32_copies, give_gradients, parameters
from torch import nn

import precision_policy
from precision_policy.job import swap
from precision_policy.job.events import Events
from precision_policy.job.master_weights import MasterWeights
from precision_policy.job.speaker import Speaker

bf16 = torch.bfloat16
serving = masters.serving


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(bf16)


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(5, 6, generator=generator).to(bf16)).float().square().mean()


def twins(make, params=None):
    """The same parameters twice: those of bf16 with an optimizer that is served, and copies with one of torch's own."""
    params = params or parameters()
    copies = fp32_copies(params)
    return params, copies, make(params), make(copies)


def step_both(serving, params, copies, optimizer, reference, seed):
    give_gradients(params, copies, seed)
    optimizer.step()
    by_hand(serving, reference)
    assert_same(params, copies)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-4)


def test_a_closure_runs_first_with_the_model_in_bf16(serving):
    """Lightning runs forward and backward inside the step. The loss is what the step returns."""
    model = network()
    optimizer = adamw(model.parameters())
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        seen.append((torch.is_grad_enabled(), {param.dtype for group in optimizer.param_groups for param in group["params"]}))
        return loss

    for how in ({}, {"closure": closure}):
        returned = optimizer.step(**how) if how else optimizer.step(closure)
        assert torch.equal(returned, torch.as_tensor(returned))
        assert returned.requires_grad
    assert seen == [(True, {bf16})] * 2
    assert serving.kept(optimizer).tensors == 4


def test_an_exception_in_the_closure_leaves_everything(serving):
    model = network()
    optimizer = adamw(model.parameters())
    before = copy.deepcopy(model.state_dict())

    def closure():
        loss_of(model).backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_see_the_application_s_own_parameters_and_gradients(serving):
    """The same objects before and after the step, in the groups and as keys of the state."""
    model = network()
    optimizer = adamw(model.parameters())
    params = list(model.parameters())
    seen = []

    def look(optimizer, args, kwargs):
        its = optimizer.param_groups[0]["params"]
        seen.append(all(one is param for one, param in zip(its, params, strict=True)))
        seen.append(all(one.grad is grad for one, grad in zip(its, gradients, strict=True)))

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    for seed in range(2):
        loss_of(model, seed).backward()
        gradients = [param.grad for param in params]
        values = [gradient.clone() for gradient in gradients]
        optimizer.step()
        assert all(torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True))
    assert seen == [True] * 8
    assert [id(key) for key in optimizer.state] == [id(param) for param in params]


def test_weights_written_from_outside_are_taken_as_they_are(serving):
    """In place, through ``data``, by a loaded state dict, set to zero: the next step starts within half a bf16 step of them."""
    writes = {
        "in place": lambda param: param.mul_(1.5),
        "clamped": lambda param: param.clamp_(-0.25, 0.25),
        "zero": lambda param: param.zero_(),
        "data in place": lambda param: param.data.copy_(torch.full_like(param, -3)),
        "data replaced": lambda param: setattr(param, "data", torch.full_like(param, 7)),
        "minus zero": lambda param: param.copy_(torch.full_like(param, -0.0)),
    }
    for name, write in writes.items():
        params = parameters()
        optimizer = torch.optim.SGD(params, lr=1e-5, momentum=0.9)
        for seed in range(3):
            give_gradients(params, fp32_copies(params), seed)
            optimizer.step()
        with torch.no_grad():
            for param in params:
                write(param)
        written = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.zeros_like(param)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for param, value in zip(params, written, strict=True):
            assert torch.equal(param, value), name
        weights = precision_policy.fp32_weights(optimizer)
        for param in params:
            assert torch.isfinite(weights[param]).all(), name
            assert ((weights[param] - param.float()).abs() <= param.float().abs() * 2**-8 + 1e-38).all(), name


def test_low_bits_go_on_after_an_outside_write(serving):
    """Dropped, a weight that is drawn back halfway at each step, as by Lookahead, would never move."""
    param = nn.Parameter(torch.ones(4, dtype=bf16))
    optimizer = torch.optim.SGD([param], lr=1.0)
    for _ in range(40):
        param.grad = torch.full_like(param, 2.0**-12)
        optimizer.step()
        with torch.no_grad():
            param.copy_(param.clone())
    assert torch.equal(param, torch.full_like(param, 1 - 40 * 2.0**-12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_run_looks_diverged(serving, bad):
    """A NaN or an infinity in an update is one in the model's weight, and stays."""
    params = parameters()
    optimizer = adamw(params)
    give_gradients(params, fp32_copies(params), 0)
    optimizer.step()
    params[0].grad[1, 2] = bad
    optimizer.step()
    assert params[0][1, 2].isnan()
    give_gradients(params, fp32_copies(params), 1)
    optimizer.step()
    assert params[0][1, 2].isnan()
    assert params[0].isnan().sum() == 1
    sgd = torch.optim.SGD(params[1:2], lr=1.0)
    params[1].grad = torch.full_like(params[1], bad)
    sgd.step()
    assert torch.equal(params[1].isnan(), (-params[1].grad).isnan())
    assert not params[1].isfinite().any()


def test_a_parameter_twice_in_a_group(serving):
    """torch warns, and updates it twice."""
    param = nn.Parameter(torch.ones(40, dtype=bf16))
    copied = fp32_copies([param])[0]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.AdamW([param, param], lr=1e-4)
    with pytest.warns(UserWarning, match="duplicate"):
        reference = torch.optim.AdamW([copied, copied], lr=1e-4)
    for seed in range(3):
        step_both(serving, [param], [copied], optimizer, reference, seed)
    assert optimizer.state[param]["step"] == 6


def test_parameters_with_and_without_a_gradient_come_and_go(serving):
    """Frozen, unfrozen, added in a group of their own, without a gradient for some steps; fp32 ones beside them."""
    params = [*parameters(), nn.Parameter(torch.ones(5))]
    copies = fp32_copies(params)

    def make(its):
        return torch.optim.AdamW([{"params": its[:3]}, {"params": its[3:5], "lr": 1e-2}, {"params": its[-1:]}], lr=1e-4)

    optimizer, reference = make(params), make(copies)
    for seed in range(6):
        give_gradients(params, copies, seed)
        params[-1].grad = copies[-1].grad
        for number in range(len(params)):
            if (number + seed) % 3 == 0:
                params[number].grad = copies[number].grad = None
        if seed == 2:
            optimizer.add_param_group({"params": params[5:8], "lr": 1e-3})
            reference.add_param_group({"params": copies[5:8], "lr": 1e-3})
        if seed == 3:
            optimizer.zero_grad(set_to_none=False)
            reference.zero_grad(set_to_none=False)
        optimizer.step()
        by_hand(serving, reference)
        assert_same(params[:-1], copies[:-1])
        assert torch.equal(params[-1], copies[-1])


def test_an_optimizer_for_each_parameter_stepped_in_backward(serving):
    model, twin = network(), network()
    optimizers = {param: adamw([param]) for param in model.parameters()}
    together = adamw(twin.parameters())

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for seed in range(4):
        loss_of(model, seed).backward()
        loss_of(twin, seed).backward()
        together.step()
        together.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(serving.kept(optimizer).tensors == 1 for optimizer in optimizers.values())


def test_two_optimizers_over_one_model(serving):
    """Each has its own part."""
    params, copies, _, _ = twins(adamw)
    halves = [(adamw(its[:4]), torch.optim.SGD(its[4:], lr=1e-3, momentum=0.9)) for its in (params, copies)]
    for seed in range(4):
        give_gradients(params, copies, seed)
        for optimizer in halves[0]:
            optimizer.step()
        for optimizer in halves[1]:
            by_hand(serving, optimizer)
        assert_same(params, copies)


def test_schedulers_and_clipping(serving):
    params, copies, optimizer, reference = twins(adamw)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(one, max_lr=1e-2, total_steps=6) for one in (optimizer, reference)]
    for seed in range(5):
        give_gradients(params, copies, seed)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for param, copied in zip(params, copies, strict=True):
            copied.grad.copy_(param.grad)
        optimizer.step()
        by_hand(serving, reference)
        for scheduler in schedulers:
            scheduler.step()
        assert_same(params, copies)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_and_scales(serving, fused):
    """A fused step is always called, with the scale and what was found; it may skip by itself."""
    make = lambda its: torch.optim.AdamW(its, lr=1e-3, fused=fused)  # noqa: E731
    params, copies, optimizer, reference = twins(make, [nn.Parameter(torch.linspace(-1, 1, 50).to(bf16))])
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for seed in range(4):
        give_gradients(params, copies, seed)
        if seed == 2:
            params[0].grad[3] = copies[0].grad[3] = float("inf")
        for scaler, one in zip(scalers, (optimizer, reference), strict=True):
            scaler.scale(torch.zeros(()))
            serving.events.on = one is optimizer
            scaler.step(one)
            scaler.update()
            serving.events.on = True
        assert_same(params, copies)
    assert optimizer.state[params[0]]["step"] == reference.state[copies[0]]["step"] == 3


class Sam(torch.optim.Optimizer):
    """Two steps' closures, and a base optimizer that shares the groups: sharpness-aware minimization, as applications copy it."""

    def __init__(self, params, base, **kwargs):
        super().__init__(params, {"rho": 0.05, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        old = {}
        for group in self.param_groups:
            for param in group["params"]:
                old[param] = param.clone()
                param.add_(param.grad, alpha=group["rho"])
        self.zero_grad()
        closure()
        for param, value in old.items():
            param.copy_(value)
        self.base_optimizer.step()


def test_an_optimizer_that_has_its_step_made_by_another(serving):
    """What the inner one did is said of the outer one."""
    model = network()
    optimizer = Sam(model.parameters(), torch.optim.AdamW, lr=1e-4)
    loss_of(model).backward()
    optimizer.step(lambda: loss_of(model).backward())
    assert serving.kept(optimizer).tensors == 4
    assert all(param.dtype is bf16 for param in model.parameters())


class Counting(torch.optim.AdamW):
    """A subclass with a step of its own."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


class Renamed(torch.optim.AdamW):
    """A subclass without: torch gives it one when it is made first."""


class OwnStep(torch.optim.AdamW):
    """A subclass whose step never calls torch's."""

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad)


@pytest.mark.parametrize("kind", [Counting, Renamed])
def test_subclasses_step_once(serving, monkeypatch, kind):
    """In several pieces too."""
    monkeypatch.setattr("precision_policy.job.pieces._MOST_ON_CPU", 64)
    params, copies, optimizer, reference = twins(lambda its: kind(its, lr=1e-4))
    for seed in range(3):
        step_both(serving, params, copies, optimizer, reference, seed)
    assert optimizer.state[params[0]]["step"] == 3
    if kind is Counting:
        assert optimizer.calls == 3


def test_a_class_that_steps_by_itself_is_not_said_to_be_served(serving):
    param = nn.Parameter(torch.ones(3, dtype=bf16))
    optimizer = OwnStep([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert serving.kept(optimizer) is None


def test_an_entry_of_the_application_s_own_is_left_alone(serving):
    """Only what torch's class makes is cast."""
    params, copies, optimizer, reference = twins(adamw)
    for param in params:
        optimizer.state[param]  # an empty entry, which torch takes for "not initialised"
    step_both(serving, params, copies, optimizer, reference, 0)
    optimizer.state[params[0]]["anchor"] = anchor = torch.ones(3, dtype=bf16)
    optimizer.state["seen"] = 7
    step_both(serving, params, copies, optimizer, reference, 1)
    assert optimizer.state[params[0]]["anchor"] is anchor
    assert anchor.dtype is bf16
    assert optimizer.state["seen"] == 7


def test_states_and_low_bits_of_a_parameter_that_is_no_longer_bf16(serving):
    """Recast to fp32 in between: torch steps it as it is."""
    model = network()
    optimizer = adamw(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    model.float()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(LOW_BITS not in optimizer.state[param] for param in model.parameters())
    assert serving.kept(optimizer).tensors == 0


def backward(model, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


def test_lbfgs_is_refused_and_steps_as_it_would(serving):
    """With its reason in words."""
    model, twin = network(), network()
    optimizer, reference = (torch.optim.LBFGS(one.parameters(), lr=0.1) for one in (model, twin))
    for _ in range(2):
        optimizer.step(lambda: backward(model, optimizer))
        by_hand(serving, reference, lambda: backward(twin, reference))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    assert serving.kept(optimizer).tensors == 0
    assert serving.kept(optimizer).refused == {"LBFGS works on all parameters as one vector": 4}


def test_differentiable_is_refused_and_steps_as_it_would(serving):
    """Its parameters are tensors of a graph."""
    start = torch.ones(3, dtype=bf16, requires_grad=True)
    param = start.clone()
    param.retain_grad()
    optimizer = torch.optim.SGD([param], lr=0.5, differentiable=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.sum().backward()
    assert torch.equal(start.grad, torch.ones_like(start))
    assert torch.equal(param.detach(), torch.full_like(param, 0.5))
    assert serving.kept(optimizer).refused == {"differentiable=True keeps the graph of the update": 1}


class WithProperty(torch.optim.SGD):
    """A class of which nothing can stand in for the state."""

    @property
    def state(self):
        return self.__dict__["state"]

    @state.setter
    def state(self, value):
        self.__dict__["state"] = dict(value)


def test_a_class_that_makes_its_state_by_a_property_is_refused(serving):
    param = nn.Parameter(torch.ones(3, dtype=bf16))
    optimizer = WithProperty([param], lr=1.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(param, torch.zeros_like(param))
    assert sum(serving.kept(optimizer).refused.values()) == 1


def test_sparse_gradients_and_fp16_are_refused_by_tensor(serving):
    """The others of the same optimizer get masters."""
    embedding = nn.Embedding(10, 4, sparse=True, dtype=bf16)
    plain, half = nn.Parameter(torch.ones(4, dtype=bf16)), nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([embedding.weight, plain, half], lr=0.1)
    (embedding(torch.tensor([1, 2])) * plain * half).float().sum().backward()
    assert embedding.weight.grad.is_sparse
    before = embedding.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(embedding.weight[1], before[1])
    kept = serving.kept(optimizer)
    assert (kept.tensors, kept.elements) == (1, 4)
    assert kept.refused == {"its gradients are sparse": 1, "fp16 needs loss scaling as well": 1}


def test_what_it_adds_is_told_in_bytes(serving):
    """AdamW: 2 bytes of low bits and two states of 4 bytes instead of 2."""
    param = nn.Parameter(torch.ones(10, dtype=bf16))
    optimizer = adamw([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert serving.kept(optimizer).added_bytes == 10 * (2 + 2 + 2)


def test_at_the_end_torch_goes_on_by_itself():
    """Classes are as they were; an optimizer that lives on has states of its parameters' dtype and no low bits."""
    steps = {
        kind: kind.__dict__.get("step") for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam)
    }
    loading = (
        torch.optim.Optimizer.__dict__["load_state_dict"],
        torch.optim.Optimizer.__dict__["_process_value_according_to_param_policy"],
    )
    listener = MasterWeights()
    events = Events([listener], Speaker())
    events.start()
    params = parameters()
    optimizers = [torch.optim.AdamW(params[:4], lr=1e-3, fused=True), torch.optim.NAdam(params[4:])]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1)
    for seed in range(2):
        give_gradients(params, fp32_copies(params), seed)
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
    events.end()
    for kind, step in steps.items():
        now = kind.__dict__.get("step")
        raw = now.__wrapped__ if getattr(now, "hooked", False) else now
        before = step.__wrapped__ if getattr(step, "hooked", False) else step
        assert now is step or raw is before or (step is None and raw.__module__.startswith("torch.optim."))
        assert not hasattr(raw, "__wrapped__") or raw.__wrapped__.__module__.startswith("torch.optim.")
    assert loading == (
        torch.optim.Optimizer.__dict__["load_state_dict"],
        torch.optim.Optimizer.__dict__["_process_value_according_to_param_policy"],
    )
    for optimizer in optimizers:
        for entry in optimizer.state.values():
            assert LOW_BITS not in entry
            assert entry["exp_avg"].dtype is bf16
    give_gradients(params, fp32_copies(params), 2)
    for optimizer in optimizers:
        optimizer.step()
        assert listener.kept(optimizer) is None


def test_an_optimizer_made_before_the_job_is_served():
    """Its class is looked for when the job begins."""
    param = nn.Parameter(torch.ones(3, dtype=bf16))
    optimizer = torch.optim.RMSprop([param], lr=1e-5)
    listener = MasterWeights()
    events = Events([listener], Speaker())
    events.start()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert listener.kept(optimizer).tensors == 1
    events.end()


def test_nothing_is_held_of_an_optimizer_that_is_gone(serving):
    param = nn.Parameter(torch.ones(3, dtype=bf16))
    optimizer = adamw([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    gone = [weakref.ref(optimizer), weakref.ref(param)]
    del optimizer, param
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_compiled_model_and_a_compiled_step(serving):
    """As without compiling."""
    model, twin = network(), network()
    compiled = torch.compile(model, backend="eager")
    optimizer, reference = adamw(model.parameters()), adamw(twin.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        loss_of(compiled, seed).backward()
        loss_of(twin, seed).backward()
        step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    assert serving.kept(optimizer).tensors == 4


def test_adafactor_of_transformers_is_served_by_name(serving):
    from transformers.optimization import Adafactor

    make = lambda its: Adafactor([param for param in its if param.numel()], lr=1e-3, relative_step=False, scale_parameter=False)  # noqa: E731
    params, copies, optimizer, reference = twins(make)
    for seed in range(3):
        step_both(serving, params, copies, optimizer, reference, seed)
    assert serving.kept(optimizer).tensors == len(params) - 1


@pytest.fixture
def disarmed_after():
    """What ``keep_master_weights`` arms stays armed for as long as the process lives; other tests are to find torch as it is."""
    from precision_policy.job import master_weights

    yield
    master_weights._by_hand_events.end()


@pytest.mark.usefixtures("disarmed_after")
def test_kept_by_hand_without_a_job():
    """``keep_master_weights`` for code that runs without Hydra."""
    param, other = (nn.Parameter(torch.ones(3, dtype=bf16)) for _ in range(2))
    optimizer, left_alone = adamw([param]), adamw([other])
    precision_policy.keep_master_weights(optimizer)
    for _ in range(2):
        param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
        optimizer.step()
        left_alone.step()
    assert LOW_BITS in optimizer.state[param]
    assert LOW_BITS not in left_alone.state[other]
    weights = precision_policy.fp32_weights(optimizer)
    assert weights[param].dtype is torch.float32
    assert (weights[param] < 1).all()
    assert torch.equal(param, torch.ones_like(param))
    assert torch.equal(precision_policy.fp32_weights(left_alone)[other], other.float())


@pytest.mark.usefixtures("disarmed_after")
def test_kept_by_hand_in_a_job_that_keeps_them_too():
    """The job's own master weights leave such an optimizer alone, tell of it, and take nothing from it at the job's end."""
    param, other = (nn.Parameter(torch.ones(3, dtype=bf16)) for _ in range(2))
    listener = MasterWeights()
    events = Events([listener], Speaker())
    events.start()
    optimizer, of_the_job = adamw([param]), adamw([other])
    precision_policy.keep_master_weights(optimizer)
    for _ in range(2):
        param.grad, other.grad = torch.ones_like(param), torch.ones_like(other)
        optimizer.step()
        of_the_job.step()
    assert listener.kept(optimizer).tensors == listener.kept(of_the_job).tensors == 1
    low_bits = optimizer.state[param][LOW_BITS]
    events.end()
    assert optimizer.state[param][LOW_BITS] is low_bits
    assert optimizer.state[param]["exp_avg"].dtype is torch.float32
    assert LOW_BITS not in of_the_job.state[other]
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 3
    assert (precision_policy.fp32_weights(optimizer)[param] < 1).all()


def test_what_a_step_that_raises_has_changed_is_undone():
    """Tensors of several dtypes and shapes, numbers among them."""
    tensors = [torch.ones(3), torch.tensor(1.0), torch.ones(2, 2, dtype=torch.float64), torch.tensor(1.0), torch.ones(0)]
    before = copy.deepcopy(tensors)

    def step():
        with swap._undone_on_failure(tensors):
            torch._foreach_add_(tensors, 1)
            raise KeyError

    with pytest.raises(KeyError):
        step()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_kept_by_hand_too_late_or_in_vain(monkeypatch):
    """A scheduler that has taken the step; classes that cannot be served: an error that says what to do."""
    never_started = Events([MasterWeights(weakref.WeakSet())], Speaker())
    monkeypatch.setattr("precision_policy.job.master_weights._by_hand_events", never_started)
    param = nn.Parameter(torch.ones(3, dtype=bf16))
    late = torch.optim.Rprop([param])
    torch.optim.lr_scheduler.StepLR(late, 1)
    with pytest.raises(RuntimeError, match=r"call keep_master_weights\(optimizer\) before that"):
        precision_policy.keep_master_weights(late)
    with pytest.raises(TypeError, match="LBFGS cannot be served"):
        precision_policy.keep_master_weights(torch.optim.LBFGS([param]))
    with pytest.raises(TypeError, match=r"Sam is no optimizer of torch\.optim"):
        precision_policy.keep_master_weights(Sam([param], torch.optim.SGD, lr=0.1))
    never_started.end()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_copies_of_an_optimizer_go_on_as_it_does(serving, again):
    """``copy.deepcopy`` and pickle keep the low bits."""
    model = network()
    optimizer = adamw(model.parameters())
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    other_model, other = again((model, optimizer))
    for seed in range(2, 5):
        for one, its in ((model, optimizer), (other_model, other)):
            loss_of(one, seed).backward()
            its.step()
            its.zero_grad()
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one, two)
        low, other_low = optimizer.state[one][LOW_BITS], other.state[two][LOW_BITS]
        assert torch.equal(low.view(torch.int16), other_low.view(torch.int16))
