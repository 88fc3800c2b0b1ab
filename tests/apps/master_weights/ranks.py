"""Trains on several ranks, or on one, and makes distributed checkpoints."""

import hashlib
import os
import sys
import warnings

import hydra
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Referee, batch_of, full, make_net, master_weights, say
from hydra.utils import get_class, instantiate
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def spread(model, way):
    if way in ("ddp", "zero"):
        return DistributedDataParallel(model)
    if way == "fsdp2":
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        return fully_shard(model, mesh=mesh)
    if way.startswith("fsdp1"):
        return FullyShardedDataParallel(model, use_orig_params=way == "fsdp1-orig", device_id=torch.device("cpu"))
    return model


def make_optimizer(cfg, model):
    params = [param for param in model.parameters() if param.dim() > 1 or not cfg.matrices]
    if cfg.way != "zero":
        return instantiate(cfg.optimizer)(params)
    chosen = {name: value for name, value in cfg.optimizer.items() if not name.startswith("_")}
    return ZeroRedundancyOptimizer(params, get_class(cfg.optimizer._target_), **chosen)


def states_of(model, optimizer, options):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(cfg, model, optimizer):
    if cfg.way == "zero":
        optimizer.consolidate_state_dict()
        if dist.get_rank() == 0:
            torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, cfg.save)
        return
    options = StateDictOptions(full_state_dict=cfg.full, cpu_offload=cfg.full)
    states = states_of(model, optimizer, options)
    if not cfg.full:
        dcp.save(states, checkpoint_id=cfg.save)
    elif dist.get_rank() == 0:
        torch.save(states, cfg.save)


def resume(cfg, model, optimizer):
    if cfg.way == "zero":
        checkpoint = torch.load(cfg.resume, weights_only=False)
        model.module.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return
    options = StateDictOptions(full_state_dict=cfg.full, broadcast_from_rank0=cfg.full)
    if cfg.full:
        states = torch.load(cfg.resume) if dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
    else:
        states = states_of(model, optimizer, options)
        dcp.load(states, checkpoint_id=cfg.resume, planner=DefaultLoadPlanner(allow_partial_load=cfg.partial))
    set_model_state_dict(model, states["model"], options=options)
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)


def whole_result(cfg, model, optimizer):
    """The whole weights and states by name, whatever the ranks hold."""
    if cfg.way == "zero":
        optimizer.consolidate_state_dict(to=0)
        states = optimizer.state_dict() if dist.get_rank() == 0 else {}
        return {"weights": model.module.state_dict(), "states": states.get("state")}
    if cfg.way.startswith("fsdp1"):
        # get_model_state_dict gives freed memory on a CPU, in torch 2.13.
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            weights = {name: param.detach().clone() for name, param in model.named_parameters()}
        states = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        return {"weights": weights, "states": states["state"]}
    states = states_of(model, optimizer, StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"weights": states["model"], "states": states["optimizer"].get("state"), "own": own_states(optimizer)}


def own_states(optimizer):
    """The kinds of tensors that a parameter's state has on this rank."""
    kinds = {}
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if torch.is_tensor(value) and value.dim():
                kinds[name] = type(value).__name__
    return kinds


def digest(model):
    """The bits of this rank's weights, those of whole DTensors."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(full(param.detach()).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@hydra.main(version_base="1.3", config_path="conf", config_name="ranks")
def main(cfg):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with master_weights(cfg), Referee().watching() as referee:
        model = make_net()
        if not cfg.frozen:
            model.requires_grad_(True)
        model = spread(model, cfg.way)
        optimizer = make_optimizer(cfg, model)
        if cfg.resume:
            resume(cfg, model, optimizer)
            referee.forget()  # torch has made a step to know which states there are
        for number in range(cfg.first, cfg.first + cfg.steps):
            batch = number if cfg.same_data else number * ranks + rank
            model(**batch_of(batch))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        say(f"WEIGHTS {digest(model)}")
        if cfg.save:
            save(cfg, model, optimizer)
        result = whole_result(cfg, model, optimizer)
        if rank == 0:
            torch.save(result, cfg.result)
    dist.barrier()
    # torch 2.13 takes gloo groups down badly: DDP's destructor may wait for ever, that of ZeroRedundancyOptimizer abort.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
