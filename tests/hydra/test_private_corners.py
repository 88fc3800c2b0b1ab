"""What the package touches that is not public: these fail when it moves, before a user's job does."""

import copy
import pickle

import pytest
import torch
from conftest import OPTIONS
from hydra.conf import HydraConf
from omegaconf import DictConfig, ListConfig, OmegaConf

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
