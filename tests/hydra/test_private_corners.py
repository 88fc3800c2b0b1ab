"""What the package touches that is not public: these fail when it moves, before a user's job does."""

import copy
import pickle

import pytest
import torch
import torch._dynamo
from conftest import OPTIONS
from hydra.conf import HydraConf
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.distributed.checkpoint import default_planner
from torch.nn.utils import stateless

from precision_policy.composition import config_tree


def test_omegaconf():
    """Children are held raw in ``_content``, by key and by index; paths and interpolations can be read unresolved."""
    cfg = OmegaConf.create({"a": {"b": "${nowhere}", "c": [1, {"d": "???"}]}, "e": None, "f": "???"})
    assert isinstance(cfg.__dict__["_content"], dict)
    assert [key for key, _ in config_tree.children(cfg)] == ["a", "e", "f"]
    assert [key for key, _ in config_tree.children(cfg.a.c)] == ["0", "1"]
    assert [path for path, _ in config_tree.mappings(cfg)] == ["", "a", "a.c.1"]
    assert config_tree.raw_value(cfg.a, "b") == "${nowhere}"
    assert config_tree.interpolation(cfg.a, "b") == "nowhere"
    assert config_tree.path_of_key(cfg.a.c[1], "d") == "a.c.1.d"
    assert isinstance(cfg.a, DictConfig)
    assert isinstance(cfg.a.c, ListConfig)


def test_omegaconf_records():
    """A record is put beside the fields of a typed, read-only node, and goes along into copies and pickles."""
    cfg = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)})
    OmegaConf.set_readonly(cfg, True)
    config_tree.record(cfg.hydra, "x", {"y": {"z": 1}, "w": None})
    for one in (cfg, copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg)), OmegaConf.masked_copy(cfg, "hydra")):
        assert OmegaConf.to_container(one.hydra.x) == {"y": {"z": 1}, "w": None}
        assert OmegaConf.select(one, "hydra.x.y.z") == 1
        assert OmegaConf.to_yaml(one).count("z: 1") == 1


def test_torch():
    """The slot for a compiled call is asked before the plain call, and is in no copy."""
    module = torch.nn.Linear(2, 2)
    assert torch.nn.Module._compiled_call_impl is None
    module.__dict__["_compiled_call_impl"] = lambda *args: "slot"
    assert module(torch.ones(2)) == "slot"
    assert "_compiled_call_impl" not in module.__getstate__()
    assert callable(module._call_impl)


def test_torch_optimizers(monkeypatch):
    """A class's step is put inside hooks by one method, with a mark, and each loaded state goes through another method."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    raw = Own.step
    patched, processed = [], []
    patch = torch.optim.Optimizer._patch_step_function
    process = torch.optim.Optimizer._process_value_according_to_param_policy
    monkeypatch.setattr(torch.optim.Optimizer, "_patch_step_function", lambda self: patched.append(self) or patch(self))
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "_process_value_according_to_param_policy",
        staticmethod(lambda *args, **kwargs: processed.append(kwargs.get("key")) or process(*args, **kwargs)),
    )
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Own([param], lr=0.1, momentum=0.9)
    assert patched == [optimizer]
    assert Own.step.hooked
    assert Own.step.__wrapped__ is raw
    assert torch.optim.Optimizer.profile_hook_step(raw).__wrapped__ is raw
    param.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert processed


def test_torch_tensors():
    """Several tensors are read and written at once, and each counts how often it was written in place."""
    tensors = [torch.ones(2), torch.ones(3)]
    versions = [tensor._version for tensor in tensors]
    torch._foreach_add_(tensors, 1)
    torch._foreach_copy_(tensors, [tensor * 2 for tensor in tensors])
    assert [tensor.tolist() for tensor in tensors] == [[4, 4], [4, 4, 4]]
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
    flat = torch._utils._flatten_dense_tensors(tensors)
    assert [part.shape for part in torch._utils._unflatten_dense_tensors(flat, tensors)] == [(2,), (3,)]
    assert callable(torch._fused_adamw_)


def test_torch_calls(monkeypatch):
    """What calls modules past their call or twice, and hooks on all modules."""
    module, example = torch.nn.Linear(2, 2), torch.ones(1, 2)
    called = []
    functional_call, check_trace = stateless._functional_call, torch.jit._trace._check_trace
    monkeypatch.setattr(stateless, "_functional_call", lambda *args, **kw: called.append("F") or functional_call(*args, **kw))
    monkeypatch.setattr(torch.jit._trace, "_check_trace", lambda *args, **kw: called.append("T") or check_trace(*args, **kw))
    torch.func.functional_call(module, {"bias": torch.zeros(2)}, (example,))
    torch.jit.trace(module, example)
    assert called == ["F", "T"]
    assert torch._C._get_tracing_state() is None
    for name in ("forward_pre_hook", "forward_hook"):
        hooks = getattr(torch.nn.modules.module, f"_global_{name}s")
        handle = getattr(torch.nn.modules.module, f"register_module_{name}")(lambda *args: None)
        assert hooks
        handle.remove()
        assert not hooks
    assert torch._dynamo.variables.functions.UserFunctionVariable


def test_torch_checkpoints():
    """What demands a checkpoint's keys is looked up by its name in its module, when a plan is made."""
    assert callable(default_planner.create_default_local_load_plan)
    names = default_planner.DefaultLoadPlanner.create_local_plan.__code__.co_names
    assert "create_default_local_load_plan" in names


@pytest.mark.parametrize("what", ["no_config_loader", "no_config_repository", "no_start_of_a_job", "another_name_for_loading"])
def test_a_hydra_that_the_hook_does_not_fit(application, what):
    """The hook says that it is not installed, and touches nothing."""
    assert "INSTALLED False" in application("other_hydra")(what, outputs=False).out


def test_its_applications(application):
    """One that asks for the policy gets an error before the job; one that does not, and one that says off, run as ever."""
    train = application("idle", "without_the_hook.py")
    for option in set(OPTIONS) - {"off"}:
        told = train.refuses(f"+precision_policy={option}")
        assert "this version of hydra-precision-policy does not know this version of Hydra" in told
    plain = train()
    assert plain.config["model"] == {"torch_dtype": "auto"}
    assert "precision_policy" not in plain.err
    assert train("+precision_policy=off").config["precision_policy"] == {"enabled": False}


def test_a_hydra_that_composes_past_the_hook(application):
    """Where composition is not where it was, the job stops with an error that says so."""
    train = application("idle", "past_the_hook.py")
    run = train("+precision_policy=on", status=1)
    assert "nothing was decided when the config was composed" in run.err
    assert "CONFIG" not in run.out
    assert train().config["model"] == {"torch_dtype": "auto"}
