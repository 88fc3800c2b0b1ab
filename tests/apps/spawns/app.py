"""Trains in a process of its own, or in one that this one starts in turn."""

import logging
import multiprocessing
import sys

import hydra
import torch

WEIGHTS = [[2.0**-9] * 4] * 4


def train(dtype, depth):
    logging.basicConfig(level="INFO", stream=sys.stderr)  # a fresh process has no handlers
    if depth:
        start(dtype, depth - 1)
        return
    weight = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([weight], lr=1e-7)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


def start(dtype, depth):
    process = multiprocessing.get_context("spawn").Process(target=train, args=(dtype, depth))
    process.start()
    process.join()
    assert process.exitcode == 0


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    start(cfg.model.dtype, cfg.depth)


if __name__ == "__main__":
    main()
