"""Jobs that end in each way that there is, in one process; torch must be as it was after each."""

import sys

import hydra
import torch
from torch.optim import Optimizer

BEFORE = Optimizer.__init__


def run(error):
    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(cfg):
        assert Optimizer.__init__ is not BEFORE
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
        if error:
            raise error

    try:
        main()
    except BaseException as caught:
        print("CAUGHT", type(caught).__name__)
    assert Optimizer.__init__ is BEFORE, error


if __name__ == "__main__":
    sys.argv += ["+precision_policy=on", "hydra.run.dir=out"]
    for error in (KeyboardInterrupt, SystemExit, ValueError, None):
        run(error)
    print("CLEAN")
