"""Starts two processes that make an optimizer of a bf16 weight each."""

import os
import sys
from multiprocessing.process import BaseProcess

import hydra
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def make_optimizer(cfg):
    weights = [torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))]
    hydra.utils.instantiate(cfg.optimizer)(weights)


def work(rank, store, cfg):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    make_optimizer(cfg)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch 2.13 takes gloo groups down badly


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    if cfg.parent_first:
        make_optimizer(cfg)
    mp.start_processes(work, (f"file://{os.getcwd()}/store", cfg), nprocs=2, start_method=cfg.method)


if __name__ == "__main__":
    before = BaseProcess.start
    main()
    assert BaseProcess.start is before
