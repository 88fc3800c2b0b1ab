"""Over generated config trees: the policy never breaks a composition, and changes at most the dtype key."""

import inspect
import os

import pytest
from conftest import OPTIONS, WRITING
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Nightly, 10,000 trees in shards that run side by side; not derandomized, or all shards would try the same trees.
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
EXAMPLES = {"max_examples": 2_500, "derandomize": False} if NIGHTLY else {"max_examples": 300}

# Hydra 1.4 wants to be told that a name is stored again; 1.3 does not know the question.
REPLACE = {"replace": True} if "replace" in inspect.signature(ConfigStore.store).parameters else {}

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
            "torch.nn.Linear",
            "zoo.Net.from_pretrained",
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


# Most random trees train nothing; half of these do, so that the rules further down are reached too.
TREES = st.tuples(TREES, st.booleans()).map(
    lambda pair: {**pair[0], "optimizer": {"_target_": "torch.optim.AdamW"}} if pair[1] else pair[0]
)


def composed(*overrides: str):
    """The job's config, and what the policy recorded."""
    cfg = hydra_compose("any", overrides=list(overrides), return_hydra_config=True)
    record = OmegaConf.select(cfg, "hydra.precision_policy")
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=False), record


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


def paths(tree, above=""):
    """The dotted paths of everything in a tree."""
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        path = f"{above}.{key}" if above else str(key)
        yield path
        yield from paths(child, path)


SETTINGS = st.dictionaries(st.sampled_from(["model", "optimizer", "peft", "dtype_key"]), st.integers(0, 30), max_size=2)


@pytest.mark.parametrize("shard", range(4 if NIGHTLY else 1))
@settings(**EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(tree=TREES, option=st.sampled_from(OPTIONS), chosen=SETTINGS)
def test_the_jobs_config_differs_in_at_most_the_dtype_key(initialized, shard, tree, option, chosen):
    """From the one without the policy, whatever the config; and no error but for a setting that cannot be right."""
    ConfigStore.instance().store("any", tree, **REPLACE)
    try:
        before, nothing = composed()
    except (HydraException, OmegaConfBaseException):
        return  # not a config: Hydra itself refuses it, without the policy
    assert nothing is None
    places = [*sorted(paths(tree)), "nowhere"]
    overrides = [f"precision_policy.{key}={places[number % len(places)]}" for key, number in chosen.items()]
    try:
        after, record = composed(f"+precision_policy={option}", *overrides)
    except ConfigCompositionException as error:
        if any(str(error).startswith(f"{override}: ") for override in overrides):
            return  # a path that cannot be right
        raise
    decision = record.decision
    old, new = leaves(before), leaves(after)
    changed = {path for path in old.keys() | new.keys() if old.get(path, KeyError) != new.get(path, KeyError)}
    if decision is None or decision.rule != "set":
        assert not changed
        return
    assert option in WRITING
    parent = decision.key.rpartition(".")[0]  # an empty mapping is a leaf until a key is written into it
    assert changed - {parent} == {decision.key}
    assert new[decision.key] == "float32"
