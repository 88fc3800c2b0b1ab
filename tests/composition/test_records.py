"""Whole decisions, word for word: a config, the settings beside it, the line that is logged, and what is recorded.

They are compared with the text that is kept beside this file; ``pytest tests/composition/test_records.py --force-regen`` writes
it anew. One test for many cases, since they are read as one.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from precision_policy.composition.applying import apply
from precision_policy.composition.settings import DEFAULTS, SettingError
from precision_policy.job.callback import describe
from precision_policy.record import Decision

pytestmark = pytest.mark.once
HERE = Path(__file__).parent
LOGGED = ("rule", "before", "after", "reason")
USUAL = asdict(Decision("set", None, None, None, ""))


def flow(value):
    """A value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


def told(decision):
    """The logged line, and what else is recorded where it is not the usual."""
    lines = [f"  -> {describe(Decision(**decision))}"]
    for key, value in decision.items():
        if key not in LOGGED and value != USUAL[key]:
            lines.append(f"     {key}: {value}")
    return lines


def recorded(case):
    """A case of the YAML files and what it leads to, in lines."""
    settings, overrides = case.get("settings", {}), case.get("overrides", [])
    lines = [f"{case['what']}", f"  {flow(case['config'])}"]
    typed = [f"precision_policy.{key}={flow(value).removesuffix(chr(10) + '...')}" for key, value in settings.items()]
    if typed or overrides:
        lines.append(f"  $ {' '.join([*typed, *overrides])}")
    before, cfg = OmegaConf.create(case["config"]), OmegaConf.create(case["config"])
    try:
        record = apply(cfg, settings, overrides)
    except SettingError as error:
        return [*lines, *(f"  error: {line}" for line in str(error).splitlines()), ""]
    decision = record.pop("decision")
    for key, value in record.items():
        if value not in (DEFAULTS[key], settings.get(key)):
            lines.append(f"     {key}: {value}")
    if decision is not None:
        for one in [decision] if "rule" in decision else decision.values():
            lines += told(one)
    if cfg != before:
        lines.append(f"  => {flow(OmegaConf.to_container(cfg))}")
    return [*lines, ""]


@pytest.mark.parametrize("file", ["trees", "survey"])
def test_configs(file, file_regression):
    cases = yaml.safe_load((HERE / f"{file}.yaml").read_text())
    lines = []
    for case in cases:
        lines += recorded(case)
    file_regression.check("\n".join(lines), basename=file)
