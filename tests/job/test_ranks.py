"""Who speaks: rank zero, also before the process group exists."""

import sys

import pytest
from conftest import CONFIG

from precision_policy.job.ranks import is_rank_zero

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

CODE = """
import json, os, sys
import hydra, torch
import torch.distributed as dist
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    dist.init_process_group("gloo")
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))], lr=1e-5)
    configs = [None, None]
    dist.all_gather_object(configs, OmegaConf.to_container(cfg))
    assert configs[0] == configs[1], configs
    if dist.get_rank() == 0:
        print("CONFIG " + json.dumps(configs[1]))
    dist.barrier()
    # torch takes gloo groups down badly, policy or not: once on CI, torch 2.6 waited for ever. What is tested has happened.
    sys.stdout.flush()
    os._exit(0)

main()
"""


def test_torchrun(app):
    """Two ranks, one config, one log line, one warning; the process group comes after the job's start."""
    run = app(code=CODE)("+precision_policy=on", python=TORCHRUN)
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


def test_other_ranks_are_silent(app):
    assert app(CONFIG)("+precision_policy=on", "model.torch_dtype=bfloat16", env={"RANK": "1"}).log == ""
