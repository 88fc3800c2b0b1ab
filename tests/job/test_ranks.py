"""Who speaks: rank zero, also before the process group exists."""

import pytest
from conftest import torchrun

from precision_policy.job.ranks import is_rank_zero


def test_torchrun(application):
    """Two ranks, one config, one log line, one warning; the process group comes after the job's start."""
    run = application("gathered_configs")("+precision_policy=on", python=torchrun(2))
    assert run.config["model"]["torch_dtype"] == "float32"
    assert run.log.count("INFO") == 1
    assert run.log.count("WARNING") == 1


@pytest.mark.parametrize(
    ("environment", "zero"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"RANK": ""}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "1"}, True),
    ],
)
def test_environment(monkeypatch, environment, zero):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is zero


def test_other_ranks_are_silent(application):
    run = application("bf16_weight")("+precision_policy=on", "model.torch_dtype=bfloat16", env={"RANK": "1"})
    assert run.log == ""
