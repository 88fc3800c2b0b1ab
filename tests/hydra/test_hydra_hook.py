"""How an option and its settings travel from the command line to Hydra's own node, past the application's config."""

import inspect
import sys

import hydra
import pytest
import yaml
from conftest import ADAMW, AUTO, OPTIONS, WRITING
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

LINES = AUTO + ADAMW


def written(train, name="hydra.yaml", folder="out"):
    return yaml.safe_load((train.folder / folder / ".hydra" / name).read_text())


@pytest.mark.parametrize("option", OPTIONS)
def test_the_jobs_config_has_the_applications_keys_alone(application, option):
    """With every option, however the application takes its config apart."""
    dtype = "float32" if option in WRITING else "None"
    arguments = ["precision_policy.model=net", "precision_policy.optimizer=optim"]
    run = application("strict_root")(f"+precision_policy={option}", *arguments)
    assert run.out.splitlines()[-4:] == [f"SPLAT {dtype}", f"MERGED {dtype}", f"WHOLE {dtype}", "KEYS net optim"]


@pytest.mark.parametrize("option", ["on", "off"])
def test_a_root_that_is_instantiated(application, option):
    """It is a root like any other, and so it is when its saved config runs again."""
    train = application("root_with_target")
    dtype = "float32" if option == "on" else "auto"
    assert f"MADE {dtype}" in train(f"+precision_policy={option}").out
    assert f"MADE {dtype}" in train("--config-path", str(train.folder / "out/.hydra"), "--config-name", "config").out


@pytest.mark.parametrize(("option", "dtype"), [("on", "float32"), ("off", "auto")])
def test_a_schema_after_the_compose_api(application, option, dtype):
    run = application("composes_schema")(f"+precision_policy={option}", outputs=False)
    assert f"Trial(model=Model(path='small', dtype='{dtype}')" in run.out


@pytest.mark.parametrize("more", [[], ["precision_policy.bf16_adam=ignore"], ["+precision_policy.monitor.every=5"]])
def test_a_frozen_root(application, more):
    """It refuses a key that it does not know, and it is read-only: a setting on the command line does not touch it."""
    run = application("frozen_root")("+precision_policy=on", "precision_policy.model=net", *more)
    assert "ROOT Root 0.0001 {'dtype': 'float32'}" in run.out


@pytest.mark.parametrize("option", ["on", "warn"])
def test_nothing_is_imported_before_the_jobs_environment_is_set(application, option):
    """The target of the model reads the environment when it is imported."""
    assert "CACHE here" in application("job_environment")(f"+precision_policy={option}").out


@pytest.mark.parametrize("option", ["on", "mixed", "master_weights", "strict"])
def test_composition_imports_ours_and_the_standard_library_alone(application, option):
    run = application("imports")(f"+precision_policy={option}", python=sys.executable, outputs=False)
    imported = run.out.split()[1:]
    assert "precision_policy.composition.applying" in imported
    foreign = [name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names | {"precision_policy"}]
    assert foreign == []


def test_the_record_in_every_place_where_hydra_shows_its_own_node(application):
    train = application("bf16_weight")
    seen_by_the_job = train("+precision_policy=on").record
    assert seen_by_the_job["decision"]["rule"] == "set"
    assert written(train)["hydra"]["precision_policy"] == seen_by_the_job
    shown = train("+precision_policy=on", "--cfg", "hydra", "--package", "hydra.precision_policy").out
    assert yaml.safe_load(shown) == seen_by_the_job
    assert "precision_policy" not in train("+precision_policy=on", "--cfg", "job").out


def test_the_record_under_the_compose_api(compose):
    """With Hydra's node, where it is asked for; the config without it is the application's."""
    assert compose(LINES, "+precision_policy=on", with_hydra=True).hydra.precision_policy.decision.rule == "set"
    assert compose(LINES, "+precision_policy=on") == {
        "model": {"torch_dtype": "float32"},
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }


def test_a_block_of_the_applications_own(application):
    """It stays in the config, with what points at it; an option copies its values, and the command line sets both."""
    train = application("own_block")
    for arguments in [], ["+precision_policy=on"]:
        run = train(*arguments)
        assert "TITLE decides about net" in run.out
        assert run.config["precision_policy"] == {"model": "${backbone}", "bf16_adam": "ignore"}
    assert (run.record["model"], run.record["bf16_adam"], run.record["decision"]["key"]) == ("net", "ignore", "net.torch_dtype")
    run = train("+precision_policy=strict", "precision_policy.model=optimizer", "precision_policy.dtype_key=storage")
    assert "TITLE decides about optimizer" in run.out
    assert run.config["precision_policy"] == {"model": "optimizer", "bf16_adam": "ignore"}
    assert (run.record["model"], run.record["dtype_key"]) == ("optimizer", "storage")


@pytest.mark.parametrize(
    ("block", "arguments", "recorded"),
    [
        ("{bf16_adam: ignore}", ["+precision_policy=strict"], "error"),  # the option comes after the primary config
        ("{bf16_adam: ignore}", ["+precision_policy=strict", "precision_policy.bf16_adam=warn"], "warn"),
        ("{bf16_adam: ignore}", ["+precision_policy=on"], "ignore"),  # which does not name the setting
        ("{model: model}", ["+precision_policy=strict", "+precision_policy.bf16_adam=warn"], "warn"),
        ("{bf16_adam: '???'}", ["+precision_policy=on"], "warn"),
    ],
)
def test_what_is_said_last_counts(record, block, arguments, recorded):
    """The files in their order, then the command line."""
    assert record(f"{LINES}precision_policy: {block}\n", *arguments).bf16_adam == recorded


def test_a_block_that_comes_after_the_option(record):
    """An application that chooses an option in its own defaults list may say more beside it."""
    config = f'defaults:\n  - precision_policy: "mixed"\n  - _self_\n{LINES}precision_policy: {{master_weights: false}}\n'
    told = record(config)
    assert (told.compute_dtype, told.master_weights) == ("bfloat16", False)


def test_relative_interpolations_in_a_block(record):
    """They lead where they lead in the application's config."""
    told = record(
        f"net: {{dtype: null}}\nname: net\n{LINES}precision_policy: {{model: '${{..name}}'}}\n", "+precision_policy=on"
    )
    assert told.decision.key == "net.dtype"


def test_a_block_of_another_meaning_is_left_alone(compose):
    """An application may use the name for something of its own, and type it."""
    config = f"precision_policy: {{param_dtype: bf16}}\n{LINES}"
    assert compose(config).precision_policy == {"param_dtype": "bf16"}
    assert compose(config, "precision_policy.param_dtype=fp32").precision_policy == {"param_dtype": "fp32"}
    assert compose(config, "+precision_policy.buffers=fp32").precision_policy.buffers == "fp32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+precision_policy@part=on"], ["precision_policy@part", "Write +precision_policy=on"]),
        (["-cn", "below"], ["precision_policy@run", '- /precision_policy: "on", without @']),
        (["+precision_policy=null"], ["+precision_policy=null", "Write +precision_policy=on", "precision_policy=off"]),
        (["precision_policy.model=model"], ["precision_policy.model=model", "no option", "Add +precision_policy=on"]),
        (["+precision_policy.model=model"], ["+precision_policy.model=model", "no option", "Add +precision_policy=on"]),
        (["++precision_policy.x.y=1"], ["++precision_policy.x.y=1", "no option"]),
        (["+hydra.precision_policy.write=false"], ["+hydra.precision_policy.write=false", "Write precision_policy.write=..."]),
        (["hydra.precision_policy.write=false", "+precision_policy=on"], ["Write precision_policy.write=..."]),
        (["+precision_policy=onn"], ["precision_policy/onn", "on", "strict", "warn"]),
    ],
)
def test_nothing_is_silently_off(application, arguments, words):
    """What would do nothing is an error that says what to write: exit status 1, no traceback, no job."""
    told = application("nested_option").refuses(*arguments)
    for word in words:
        assert word in told


@pytest.mark.parametrize("value", ["on", "'on'", "warn", "strict", "master_weights"])
def test_a_plain_key_instead_of_the_option(compose, value):
    """``precision_policy: on`` outside the defaults list would do nothing."""
    with pytest.raises(ConfigCompositionException, match='precision_policy: "on"'):
        compose(f"precision_policy: {value}\n")


def test_a_job_with_a_plain_key_instead_of_the_option(application):
    assert 'precision_policy: "on"' in application("idle").refuses("--config-name", "plain_key")


def test_an_unquoted_on_in_a_defaults_list(application):
    """Hydra itself refuses it; nothing runs without the policy."""
    told = application("idle").refuses("--config-name", "unquoted")
    assert "In unquoted: - precision_policy: true is no option of the policy" in told
    assert 'precision_policy: "on", quoted' in told


def test_a_record_of_an_earlier_version_in_a_config(application):
    """It stood in the job's own config, and is read no more."""
    told = application("idle").refuses("--config-name", "earlier_record")
    assert "Take precision_policy out of this config" in told


def test_settings_beside_a_swept_option(application):
    """On the command line and in ``hydra.sweeper.params``, for every job of the sweep."""
    train = application("idle")
    for arguments in ["+precision_policy=on,off", "precision_policy.model=net"], ["hydra/sweeper=ours"]:
        configs = train("--config-name", "net", "--multirun", *arguments).configs
        assert [config["net"]["torch_dtype"] for config in configs] == ["float32", "auto"]
    assert "precision_policy" not in OmegaConf.load(train.folder / "sweep/multirun.yaml")


def test_a_wrong_setting_stops_a_sweep_before_its_first_job(application):
    told = application("idle").refuses("--multirun", "+precision_policy=on,warn", "precision_policy.bf16_adam=shout")
    assert "precision_policy.bf16_adam=shout" in told


def rerun(train, *arguments):
    """Run the saved config of the folder ``out``, into another one."""
    saved = str(train.folder / "out/.hydra")
    return train("--config-path", saved, "--config-name", "config", "hydra.run.dir=again", *arguments, outputs=False)


def test_a_saved_config_runs_again_with_its_policy(application):
    """The dtype stays, and so does the decision; from the record beside it, under Hydra's own name for the option."""
    train = application("bf16_weight")
    first = train("+precision_policy=on", "precision_policy.sample=4096")
    again = rerun(train)
    assert (again.config, again.record) == (first.config, first.record)
    assert again.log == first.log.replace("precision_policy=on: ", "precision_policy: ")
    assert written(train, folder="again")["hydra"]["precision_policy"] == first.record


def test_settings_and_options_beside_a_saved_config(application):
    """A setting applies to the restored record; one that decides, and an option, decide anew."""
    train = application("bf16_weight")
    first = train("+precision_policy=mixed").record
    typed = rerun(train, "precision_policy.compute_dtype=null", "precision_policy.monitor.every=7").record
    assert typed == {**first, "compute_dtype": None, "monitor": {"every": 7}}
    assert rerun(train, "precision_policy.peft=null").record["decision"]["rule"] == "explicit_dtype"
    assert rerun(train, "model.torch_dtype=bfloat16").record["decision"]["rule"] == "explicit_dtype"
    other = rerun(train, "+precision_policy=warn").record
    assert (other["write"], other["compute_dtype"], other["decision"]["rule"]) == (False, None, "explicit_dtype")
    off = rerun(train, "+precision_policy=off")
    assert (off.record["enabled"], off.log, off.config["model"]["torch_dtype"]) == (False, "", "float32")
    assert rerun(train, "precision_policy.enabled=false").log == ""


@pytest.mark.parametrize("content", ["- a\n- b\n", "{{ x }}: [", "hydra: {precision_policy: ${nowhere}}\n", "hydra: on\n"])
def test_some_other_hydra_yaml(application, content):
    """Only a record that was saved counts; an application without the policy runs whatever a file of that name holds."""
    train = application("idle")
    train.write("conf/hydra.yaml", content)
    run = train()
    assert run.config["model"] == {"torch_dtype": "auto"}
    assert not run.log


@pytest.mark.skipif("execution_whitelist" in inspect.signature(hydra.main).parameters, reason="Hydra 1.4 composes anew")
@pytest.mark.parametrize(("chosen", "status"), [([], 0), (["model.torch_dtype=bfloat16"], 1)], ids=["ran", "was stopped"])
def test_an_experimental_rerun_is_not_ours(application, chosen, status):
    """Hydra 1.3 unpickles a config there and calls the task function: no composition, no callbacks, no ``strict``."""
    train = application("bf16_weight")
    pickling = "+hydra.callbacks.save._target_=hydra.experimental.callbacks.PickleJobInfoCallback"
    first = train("+precision_policy=strict", pickling, *chosen, status=status)
    assert ("no fp32 master copy" in first.err) == bool(chosen)
    run = train("--experimental-rerun", str(train.folder / "out/.hydra/config.pickle"))
    assert run.config["model"] == {"torch_dtype": "bfloat16" if chosen else "float32"}
    assert not run.log


def test_an_option_of_the_applications_own(application):
    """It may extend ours."""
    run = application("own_options")("+precision_policy=quiet", "model.torch_dtype=bfloat16")
    assert run.record["bf16_adam"] == "ignore"
    assert "WARNING" not in run.log


def test_a_group_of_the_applications_own(application):
    """One of the same name and another meaning is merged as ever."""
    assert application("own_options")("+precision_policy=half").config["precision_policy"] == {"param_dtype": "bf16"}


def test_several_options(record):
    """They combine, and off wins."""
    told = record(LINES, "+precision_policy=[strict,master_weights]")
    assert (told.bf16_adam, told.master_weights, told.enabled) == ("error", True, True)
    assert record(LINES, "+precision_policy=[off,mixed]").enabled is False


def test_master_weights_never_write(record, compose):
    """The option keeps the config as it is; ``mixed`` writes and keeps them too; a block that says no is heard."""
    assert compose(LINES, "+precision_policy=master_weights").model.torch_dtype == "auto"
    told = record(LINES, "+precision_policy=master_weights")
    assert (told.master_weights, told.decision.rule) == (True, "warn_only")
    told = record(LINES, "+precision_policy=mixed")
    assert (told.master_weights, told.decision.rule) == (True, "set")
    assert record(LINES, "+precision_policy=on", "precision_policy.master_weights=true").master_weights is True


def test_without_an_option_nothing_is_recorded(compose):
    cfg = compose(LINES, with_hydra=True)
    with pytest.raises(OmegaConfBaseException):
        cfg.hydra.precision_policy  # noqa: B018 - to look is what raises


def test_the_help_of_other_applications_lists_one_group(application):
    listed = [line for line in application("idle")("--help").out.splitlines() if "precision_policy" in line]
    assert listed == [f"precision_policy: {', '.join(sorted(OPTIONS))}"]
