"""Trains for two steps on several ranks, in one of several ways; rank zero prints in which dtypes it computed.

It needs no launcher's code: whoever starts it gives each process the environment that torchrun gives.
"""

import os
import sys

import hydra
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard


def distribute(model, way):
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if way.startswith("fsdp1"):
        return FullyShardedDataParallel(model, use_orig_params=way == "fsdp1-orig", device_id=torch.device("cpu"))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if way == "fsdp2-bf16" else None)
    for module in (*model, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.model.torch_dtype)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10)).to(dtype)
    inside = []
    model[2].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    called = distribute(model, cfg.way)
    optimizer = hydra.utils.instantiate(cfg.optimizer)(called.parameters())
    for _ in range(2):
        output = called(torch.ones(4, 64, dtype=dtype))
        output.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if cfg.way == "ddp":
        with torch.no_grad():  # evaluation without the wrapper
            output = model(torch.ones(4, 64, dtype=dtype))
    if dist.get_rank() == 0:
        print("INSIDE", inside, "OUTSIDE", output.dtype)
    dist.barrier()
    # torch 2.13 takes gloo groups down badly, policy or not: DDP's destructor may wait for ever, that of
    # ZeroRedundancyOptimizer abort. What is tested has happened by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
