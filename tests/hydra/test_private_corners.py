"""What the package touches that is not public: these fail when it moves, before a user's job does."""

from textwrap import dedent

import pytest
import torch
from conftest import CONFIG, TRAIN
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


def test_omegaconf_records_and_moves():
    cfg = OmegaConf.create({"a": {}})
    config_tree.record(cfg, "x", {"y": {"z": 1}, "w": None})
    assert OmegaConf.to_container(cfg.x) == {"y": {"z": 1}, "w": None}
    assert OmegaConf.to_yaml(cfg).count("z: 1") == 1
    config_tree.move(cfg, "x", cfg.a)
    assert "x" not in cfg
    assert cfg.a.x.y.z == 1


def test_torch():
    """The slot for a compiled call is asked before the plain call, and is in no copy."""
    module = torch.nn.Linear(2, 2)
    assert torch.nn.Module._compiled_call_impl is None
    module.__dict__["_compiled_call_impl"] = lambda *args: "slot"
    assert module(torch.ones(2)) == "slot"
    assert "_compiled_call_impl" not in module.__getstate__()
    assert callable(module._call_impl)


@pytest.mark.parametrize("wrapper", [True, False])
def test_what_is_compiled_is_one_graph(wrapper):
    """The call under autocast breaks no graph, outside of what is compiled nor inside torch.compile's wrapper."""
    from precision_policy.job.compute_dtype import Supply, with_what_it_wraps

    class Network(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    model, graphs = Network(torch.nn.Linear(4, 4), torch.nn.GELU()), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    called = torch.compile(model, backend=backend, fullgraph=True) if wrapper else model
    if not wrapper:
        model.compile(backend=backend, fullgraph=True)
    supply = Supply()
    for one in with_what_it_wraps(called):
        supply.to(one, "cpu")
    outputs = [called(torch.ones(2, 4)), called(torch.ones(2, 4)), model(torch.ones(2, 4))]
    assert len(graphs) == 1
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[0].bfloat16().float())
    supply.stop()
    assert not torch.equal(outputs[0], model(torch.ones(2, 4)))


@pytest.mark.parametrize(
    "what",
    [
        "import sys; sys.modules['hydra._internal.config_loader_impl'] = None",
        "import sys; sys.modules['hydra._internal.config_repository'] = None",
        "from hydra._internal.callbacks import Callbacks; del Callbacks.on_job_start",
        "from hydra._internal.config_loader_impl import ConfigLoaderImpl as C; C.renamed = C._load_single_config; del C._load_single_config",
    ],
)
def test_a_hydra_that_the_hook_does_not_fit(app, what):
    """The hook says that it is not installed, and touches nothing."""
    code = dedent(f"""
            import hydra._internal.config_loader_impl, hydra._internal.callbacks
            {what}
            from precision_policy.composition.hydra_hook import install
            print('INSTALLED', install())
        """)
    assert "INSTALLED False" in app(code=code)().out


def test_its_applications(app):
    """One that asks for the policy gets an error before the job; one that does not, and one that says off, run as ever."""
    broken = dedent("""
        import precision_policy.composition.hydra_hook as hook
        hook.install = lambda: False
    """)
    train = app(CONFIG, broken + TRAIN)
    for option in ("on", "mixed", "warn", "strict"):
        run = train(f"+precision_policy={option}", status=1)
        assert "this version of hydra-precision-policy does not know this version of Hydra" in run.err
        assert "Traceback" not in run.err
        assert "CONFIG" not in run.out
    plain = train()
    assert plain.config["model"] == {"torch_dtype": "auto"}
    assert "precision_policy" not in plain.err
    assert train("+precision_policy=off").config["precision_policy"] == {"enabled": False}
