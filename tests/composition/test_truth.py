"""`set` is true wherever it is said: PEFT and quantized models wherever they are, no key that nobody reads, lines that work."""

from pathlib import Path

import pytest
import yaml
from conftest import CONFIG, TRAIN
from omegaconf import OmegaConf

ADAMW = "optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 1e-5}\n"
LOAD = "{_target_: transformers.AutoModelForCausalLM.from_pretrained}"
MODEL = f"model: {LOAD}\n"


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ("lora: {r: 8}", "lora"),
        ("method: {peft_config: {_target_: peft.LoraConfig}}", "method.peft_config"),
        ("trainer: {peft_config: {r: 8}}", "trainer.peft_config"),
        ("train_model: {lora: {enabled: true}}", "train_model.lora"),
        ("use_lora: true", "use_lora"),
        ("train: {use_peft: true}", "train.use_peft"),
        ("train: {lora_rank: 16}", "train.lora_rank"),
        ("train: {lora_r: 16}", "train.lora_r"),
        ("train: {finetuning_type: lora}", "train.finetuning_type"),
        ("adapters: [{_target_: peft.LoraConfig, r: 4}]", "adapters.0._target_"),
        ("train: {qlora: true}", "train.qlora"),
        ("peft: '???'", "peft"),
        ("train: {peft_scheme: lora}", "train.peft_scheme"),
    ],
)
def test_peft_is_found(decide, tree, where):
    """Nothing is set, and the reason names the path and how to say that it is not about this model."""
    decision = decide(f"{MODEL}{ADAMW}{tree}")
    assert decision.rule == "peft"
    assert f"({where}" in decision.reason
    assert decision.reason.endswith("(not about this model: precision_policy.peft=null)")
    assert decide(f"{MODEL}{ADAMW}{tree}", "precision_policy.peft=null").rule == "set"


@pytest.mark.parametrize("model", ["lora: {r: 8}", "use_peft: true", "lora: {enabled: true}", "peft_config: {r: 2}"])
def test_peft_on_the_model_node(decide, model):
    assert decide(f"model: {{torch_dtype: auto, {model}}}\n{ADAMW}").rule == "peft"


@pytest.mark.parametrize(
    "tree",
    [
        "enable_hf_state_dict_adapter: true",
        "train: {use_peft: false, lora_dropout: 0.1, lora_rank: 8}",
        "train: {use_peft: false, lora: {r: 8}}",
        "use_lora: false\nlora: {r: 8, alpha: 16}",
        "train: {target_modules: [q_proj]}",
        "resume: outputs/lora/checkpoint-100",
        "train: {finetuning_type: full}",
        "peft: {enabled: false, lora: {r: 8}}",
        "peft: {_target_: null, lora: {r: 8}}",
        "peft_scheme: none",
        "train: {lora_rank: 0}",
        "lora: {}",
        "peft: []",
        "adapter: {_target_: my.Adapter}",
        "explore: {lorapath: x}",
    ],
)
def test_a_full_fine_tune_is_not_mistaken_for_peft(decide, tree):
    assert decide(f"{MODEL}{ADAMW}{tree}").rule == "set"


def test_found_by_looking_is_never_silent(app):
    """A full fine-tune mistaken for PEFT shows in what its optimizer holds; at a path that the user named, nothing is said."""
    train = app(CONFIG + "lora: {r: 8}\n")
    run = train("+precision_policy=on")
    said = "INFO precision_policy=on: torch.optim.AdamW trains 1 trainable tensor, 64 elements, of these 64 elements stored in bf16"
    assert run.log.splitlines()[1:] == [said]
    assert len(train("+precision_policy=on", "precision_policy.peft=lora").log.splitlines()) == 1


@pytest.mark.parametrize(
    "model",
    [
        "load_in_4bit: true",
        "load_in_8bit: true",
        "quantization_config: {_target_: transformers.BitsAndBytesConfig}",
        "model_kwargs: {load_in_4bit: true}",
        "bnb_config: {load_in_4bit: true}",
        "quantization: int8",
    ],
)
def test_quantized(decide, model):
    decision = decide(f"model: {{torch_dtype: auto, {model}}}\n{ADAMW}")
    assert decision.rule == "quantized"
    assert model.split(":")[0] in decision.reason


@pytest.mark.parametrize(
    "model", ["load_in_4bit: false", "quantization_config: null", "quantization: none", "quantization: {}"]
)
def test_not_quantized(decide, model):
    assert decide(f"model: {{torch_dtype: auto, {model}}}\n{ADAMW}").rule == "set"


@pytest.mark.parametrize(
    ("tree", "line", "rule"),
    [
        # What is read is a key of the project's own.
        ("model: {policy_dtype: null, path: x}", "precision_policy.dtype_key=policy_dtype", "set"),
        ("model: {model_args: {torch_dtype: bfloat16}}", "precision_policy.dtype_key=model_args.torch_dtype", "explicit_dtype"),
        # A nested model, beside its optimizer, comes before what stands elsewhere.
        (
            f"model: {{_target_: src.Module, net: {LOAD}, optimizer: {{_target_: torch.optim.AdamW}}}}\nother: {LOAD}",
            "precision_policy.model=model.net precision_policy.optimizer=model.optimizer",
            "set",
        ),
        (
            f"actor: {LOAD}\ntrain: {{optimizer: adamw}}",
            "precision_policy.model=actor precision_policy.optimizer=train.optimizer",
            "set",
        ),
        (
            f"tokenizer: {{_target_: transformers.AutoTokenizer.from_pretrained}}\nreward_model: {LOAD}\nref: {LOAD}\n"
            f"teacher: {LOAD}\nrollout: {{dtype: bfloat16}}\nstudent: {LOAD}\nopt: {{_target_: torch.optim.Adam}}",
            "precision_policy.model=student precision_policy.optimizer=opt",
            "set",
        ),
    ],
)
def test_one_line_to_paste(compose, tree, line, rule):
    """Everything that is missing, in one line, which leads to a decision about the job's model."""
    config = tree if "opt" in tree else f"{tree}\n{ADAMW}"
    decision = compose(config, "+precision_policy=on").precision_policy.decision
    assert decision.reason.endswith(f"to decide about it, add: {line}")
    assert decision.fix == line
    assert compose(config, "+precision_policy=on", *line.split()).precision_policy.decision.rule == rule


def test_the_line_works_in_a_sweep(app):
    """Typed verbatim, beside a swept option."""
    config = f"net: {{torch_dtype: auto}}\nmodel: null\n{ADAMW}"
    train = app(config, TRAIN)
    line = "precision_policy.model=net"
    assert f"add: {line}" in train("+precision_policy=on").log
    train("--multirun", "+precision_policy=on,off", line)
    configs = [yaml.safe_load((train.folder / f"sweep/{job}/.hydra/config.yaml").read_text()) for job in range(2)]
    assert [one["net"]["torch_dtype"] for one in configs] == ["float32", "auto"]


def test_settings_beside_a_swept_option(app):
    """On the command line and in ``hydra.sweeper.params``."""
    train = app(f"net: {{torch_dtype: auto}}\n{ADAMW}", TRAIN)
    train.write(
        "conf/hydra/sweeper/ours.yaml",
        "defaults: [basic]\nparams: {+precision_policy: 'on,off', precision_policy.model: net}\n",
    )
    train("--multirun", "hydra/sweeper=ours")
    configs = [yaml.safe_load((train.folder / f"sweep/{job}/.hydra/config.yaml").read_text()) for job in range(2)]
    assert [one["net"]["torch_dtype"] for one in configs] == ["float32", "auto"]


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ("trainer: {precision: bf16-true}", "trainer.precision=32-true"),
        ("model: {load_as_bf16: true}", "model.load_as_bf16=false"),
        ("settings: {model_dtype: bfloat16}", "settings.model_dtype=float32"),
    ],
)
def test_what_may_choose_the_dtype_is_named(app, tree, named):
    """Where nothing better is found: in the reason, and as the fix of the warning."""
    run = app(f"{tree}\n{ADAMW}", TRAIN)("+precision_policy=on", "+x=1")
    assert named in run.log
    assert f"fix: {named}" in run.out


def test_nobody_reads_an_added_key(decide):
    """A node without a target and without a dtype key is left alone, unless the user names the key."""
    assert decide(f"model: {{path: x}}\n{ADAMW}").rule == "no_dtype_key"
    decision = decide(f"model: {{path: x}}\n{ADAMW}", "precision_policy.dtype_key=torch_dtype")
    assert (decision.rule, decision.key, decision.added) == ("set", "model.torch_dtype", True)


NOT_READ = """
import hydra, torch
@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    hydra.utils.instantiate(cfg.optimizer)([torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))])
main()
"""


def test_asked_and_not_arrived(app):
    """The likelier explanation first: nothing read the key that the policy added; something recast what a known key made."""
    added = app(f"model: {{path: x}}\ntrainer: {{precision: bf16-true}}\n{ADAMW}", NOT_READ)
    run = added("+precision_policy=on", "precision_policy.dtype_key=torch_dtype")
    fix = next(line for line in run.out.splitlines() if "fix:" in line)
    assert fix.strip().startswith("fix: nothing read the key")
    assert "(in the config: trainer.precision=32-true)" in fix
    there = app(CONFIG, NOT_READ, folder="there")("+precision_policy=on")
    assert "fix: something recast the model" in there.out


WHOLE = """
import hydra
@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print("MADE", type(hydra.utils.instantiate(cfg)).__name__, sorted(cfg))
class Strict:
    def __init__(self, model, optimizer): ...
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("option", ["on", "off"])
def test_a_root_that_is_instantiated(app, option):
    """The record stands beside Hydra's own; settings are given and checked as ever."""
    train = app("_target_: __main__.Strict\nmodel: {torch_dtype: auto}\n" + ADAMW, WHOLE)
    run = train(f"+precision_policy={option}")
    assert "MADE Strict ['_target_', 'model', 'optimizer']" in run.out
    saved = yaml.safe_load((train.folder / "out/.hydra/hydra.yaml").read_text())["hydra"]["precision_policy"]
    assert (saved["decision"] or {}).get("rule") == ("set" if option == "on" else None)
    assert ("model.torch_dtype: auto -> float32" in run.log) is (option == "on")
    again = train("-cp", str(train.folder / "out/.hydra"), "-cn", "config")
    assert "MADE Strict ['_target_', 'model', 'optimizer']" in again.out
    assert again.log == run.log.replace("precision_policy=on", "precision_policy")
    shown = train(f"+precision_policy={option}", "--cfg", "hydra").out
    assert "precision_policy:" in shown
    wrong = train(f"+precision_policy={option}", "precision_policy.modell=x", status=1)
    assert "precision_policy.modell=x" in wrong.err


@pytest.mark.parametrize(
    "content", ["- a\n- b\n", "{{ template }}: [", "hydra: {precision_policy: ${nowhere}}\n", "hydra: on\n"]
)
def test_a_root_with_a_target_beside_some_other_hydra_yaml(app, content):
    """Only a record that was saved counts; an application without the policy runs whatever a file of that name holds."""
    train = app("_target_: __main__.Strict\nmodel: {torch_dtype: auto}\n" + ADAMW, WHOLE)
    train.write("conf/hydra.yaml", content)
    run = train()
    assert "MADE Strict" in run.out
    assert not run.log


HIGH = """
import hydra, torch
@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    weights = torch.nn.Parameter((torch.randn(64, 64) * 0.02).to(torch.bfloat16))
    torch.optim.AdamW([weights], lr=cfg.lr)
main()
"""


def test_a_share_near_zero(app):
    """It is an INFO that says at which rate a tenth is lost; strict refuses all the same."""
    train = app("lr: 0.03\nmodel: {torch_dtype: bfloat16}\n" + ADAMW, HIGH)
    run = train("+precision_policy=on")
    assert "WARNING" not in run.log
    line = run.log.splitlines()[-1]
    assert line.startswith("INFO precision_policy=on: torch.optim.AdamW over bf16 weights")
    assert "0.0% of updates round away at lr 0.03, a tenth under lr 1e-04" in line
    stopped = train("+precision_policy=strict", status=1)
    assert "the schedule will get there" in stopped.err
    assert "WARNING" in train("+precision_policy=on", "lr=1e-5").log


def test_every_record_names_its_option(app):
    """Also where the format shows no logger's name."""
    run = app()("+precision_policy=warn", "precision_policy.monitor.every=1")
    records = [line for line in run.out.splitlines() if "[precision_policy][" in line]
    assert len(records) == 3
    assert all("] - precision_policy=warn: " in line for line in records)


def test_warn_never_writes(compose):
    """Whatever the spelling of fp32."""
    for spelling in ("float32", "fp32", "32"):
        cfg = compose(CONFIG, "+precision_policy=warn", f"precision_policy.storage_dtype={spelling}")
        assert cfg.model.torch_dtype == "auto"


def survey():
    return yaml.safe_load((Path(__file__).parent / "survey.yaml").read_text())


@pytest.mark.parametrize("layout", survey(), ids=lambda layout: layout["what"])
def test_survey(compose, layout):
    """Layouts of public repositories: no full fine-tune is taken for PEFT, and no PEFT run missed."""
    text = OmegaConf.to_yaml(OmegaConf.create(layout["config"]))
    rule = compose(text, "+precision_policy=on", *layout.get("line", "").split()).precision_policy.decision.rule
    assert (rule in ("peft", "quantized")) is layout["peft"]
