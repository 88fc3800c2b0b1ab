"""Makes an optimizer of a bf16 weight on each of two ranks, and sees that both have one config."""

import json
import os
import sys

import hydra
import torch
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


if __name__ == "__main__":
    main()
