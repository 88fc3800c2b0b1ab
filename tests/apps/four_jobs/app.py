"""Calls Hydra once for each of four options, in one process, and sees that torch is left as it was."""

import sys

import hydra
import torch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])


before = torch.optim.Optimizer.__init__
for option in ("warn", "strict", "off", "on"):
    print("JOB", option, flush=True)
    sys.argv[1:] = [f"+precision_policy={option}", "model.torch_dtype=bfloat16", "hydra.run.dir=out"]
    try:
        main()
    except SystemExit as stopped:
        print("STOPPED", stopped.code)
    assert torch.optim.Optimizer.__init__ is before
