"""Over generated config trees: the policy never breaks a composition, and changes nothing but what it says."""

import os

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

settings.register_profile("nightly", max_examples=10_000)
settings.register_profile("quick", max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

OmegaConf.register_new_resolver("boom", lambda *a: 1 / 0, replace=True)
OmegaConf.register_new_resolver("thing", lambda *a: object(), replace=True)

KEYS = st.sampled_from(
    [
        "model",
        "optimizer",
        "peft",
        "torch_dtype",
        "dtype",
        "_target_",
        "name",
        "type",
        "lr",
        "use_peft",
        "enabled",
        "r",
        "net",
        "training",
        "path",
        "_partial_",
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from(
        [
            "auto",
            "float32",
            "bfloat16",
            "none",
            "",
            "adamw",
            "???",
            "${boom:}",
            "${thing:}",
            "${model}",
            "${optimizer}",
            "${nowhere.at.all}",
            "${model.torch_dtype}",
            "${..name}",
            "${training}",
            "torch.optim.AdamW",
            "torch.optim.lr_scheduler.StepLR",
            "hydra.utils.get_class",
            "hydra_zen.funcs.zen_processing",
            "transformers.AutoModel.from_pretrained",
            "builtins.dict",
            "builtins.object",
            "no.such.thing",
            ".",
            "a..b",
        ]
    ),
)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
        max_leaves=10,
    ),
    max_size=6,
)


def composed(*overrides: str):
    return OmegaConf.to_container(hydra_compose("any", overrides=list(overrides)), resolve=False)


def leaves(node, path=""):
    """Every leaf by its path, raw."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if not children and children is not None:
        return {path: type(node)}
    if children is None:
        return {path: node}
    return {
        where: leaf for key, child in children for where, leaf in leaves(child, f"{path}.{key}" if path else str(key)).items()
    }


@pytest.fixture(scope="module")
def initialized(tmp_path_factory):
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path_factory.mktemp("any"))):
        yield


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(tree=TREES, option=st.sampled_from(["on", "warn", "strict"]))
def test_never_harm(initialized, tree, option):
    """No new error at the default paths; two configs that differ in the decided key and the policy's node alone."""
    ConfigStore.instance().store("any", tree)
    try:
        before = composed()
    except Exception:
        return  # not a config
    after = composed(f"+precision_policy={option}")
    decision = after.pop("precision_policy")["decision"]
    old, new = leaves(before), leaves(after)
    changed = {path for path in old.keys() | new.keys() if old.get(path, KeyError) != new.get(path, KeyError)}
    if decision["rule"] != "set":
        assert not changed
        return
    assert option != "warn"
    parent = decision["key"].rpartition(".")[0]  # an empty mapping is a leaf until a key is written into it
    assert changed - {parent} == {decision["key"]}
    assert new[decision["key"]] == "float32"
