"""A Hydra application that knows nothing of the policy: it trains a Llama made from a config, on the bytes of Python sources.

Prints one line ``RESULT {...}`` on rank zero: tokens per second, peak memory, the losses.
"""

import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

CONFIG = {
    "model": {"_target_": "transformers.AutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path": "???"},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-5, "fused": True},
    "steps": 20,
    "batch": 8,
    "length": 1024,
    "seed": 0,
    "checkpointing": False,
    "compile": "none",
    "autocast": False,
    "parallel": "none",
}
ConfigStore.instance().store("llama", CONFIG)


def text(bytes_wanted: int) -> torch.Tensor:
    """Python sources of the installed packages, as bytes."""
    data = bytearray()
    for path in sorted(Path(torch.__file__).parent.rglob("*.py")):
        data += path.read_bytes()
        if len(data) >= bytes_wanted:
            break
    return torch.frombuffer(data[:bytes_wanted], dtype=torch.uint8).long()


def batches(tokens: torch.Tensor, cfg: DictConfig, rank: int, device: torch.device):
    """Batches drawn by the seed, different on each rank."""
    generator = torch.Generator().manual_seed(1000 * cfg.seed + rank)
    while True:
        starts = torch.randint(len(tokens) - cfg.length, (cfg.batch,), generator=generator).tolist()
        yield torch.stack([tokens[start : start + cfg.length] for start in starts]).to(device)


def distribute(model: torch.nn.Module, cfg: DictConfig, device: torch.device) -> torch.nn.Module:
    """The model for several ranks, as its users write it."""
    if cfg.parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if cfg.parallel.startswith("fsdp2"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cfg.parallel == "fsdp2-bf16" else None)
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def device_of_rank() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def autocast_of(cfg: DictConfig, device: torch.device):
    """What makes the application's own autocast, where it has one; ``uncached``: without autocast's weight cache."""
    if not cfg.autocast:
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=cfg.autocast != "uncached")


@hydra.main(version_base="1.3", config_path=None, config_name="llama")
def main(cfg: DictConfig) -> None:
    rank = int(os.environ.get("RANK", "0"))
    device = device_of_rank()
    cuda = device.type == "cuda"
    if cfg.parallel != "none":
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(cfg.seed)
    model = hydra.utils.instantiate(cfg.model).to(device)
    model.config.use_cache = False
    model.train()
    if cfg.checkpointing:
        model.gradient_checkpointing_enable()
    model = distribute(model, cfg, device)
    if cfg.compile == "wrapper":
        model = torch.compile(model)
    elif cfg.compile == "in_place":
        model.compile()
    optimizer = hydra.utils.instantiate(cfg.optimizer)(model.parameters())
    tokens = text(2_000_000 if cuda else 100_000)
    cut = len(tokens) // 10
    held_out, training = batches(tokens[:cut], cfg, 0, device), batches(tokens[cut:], cfg, rank, device)
    autocast = autocast_of(cfg, device)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with autocast():
            return model(input_ids=batch, labels=batch).loss

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, times, optimizer_times = [], [], []
    for _ in range(cfg.steps):
        batch = next(training)
        wait()
        started = time.perf_counter()
        loss = loss_of(batch)
        loss.backward()
        wait()
        computed = time.perf_counter()
        optimizer.step()
        wait()
        optimizer_times.append(time.perf_counter() - computed)
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    with torch.no_grad():
        after = statistics.mean(loss_of(next(held_out)).item() for _ in range(8 if cuda else 1))
    steady = times[len(times) // 3 :]
    if rank == 0:
        result = {
            "tokens_per_s": cfg.batch * cfg.length / statistics.median(steady),
            "peak_gib": peak / 2**30,
            "optimizer_ms": 1000 * statistics.median(optimizer_times[len(times) // 3 :]),
            "loss_last": statistics.mean(losses[-5:]),
            "loss_held_out": after,
            "parameters": sum(p.numel() for p in model.parameters()),
            "optimizer": type(optimizer).__name__,
            "device": torch.cuda.get_device_name() if cuda else "CPU",
        }
        print("RESULT " + json.dumps(result), flush=True)
    if cfg.parallel != "none":
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # torch 2.13 takes gloo groups down badly, policy or not


if __name__ == "__main__":
    main()
