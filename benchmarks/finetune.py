"""Fine-tune one bf16 checkpoint at several learning rates, stored and updated in several ways; results go to a CSV.

    python benchmarks/finetune.py --out docs/evidence            # one GPU, about eight minutes on an H200
    python benchmarks/finetune.py --out /tmp/small --small       # the same on a CPU, a few minutes

The text is at hand everywhere: the checkpoint is pretrained on the Python sources of torch, and fine-tuned on those of the
other installed packages, byte by byte. Every way starts from the same weights, sees the same batches, and computes in bf16.
"""

import argparse
import copy
import csv
import platform
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's package, where none is installed

from precision_policy.estimate.histogram import lost_updates

FULL = {"layers": 12, "width": 768, "heads": 12, "length": 512, "batch": 16, "pretrain": 3000, "steps": 300, "seeds": 3}
SMALL = {"layers": 2, "width": 96, "heads": 4, "length": 64, "batch": 8, "pretrain": 250, "steps": 48, "seeds": 3}
RATES = (3e-4, 1e-4, 3e-5, 1e-5, 3e-6)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder over bytes, with learned positions and a tied head."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                std = 0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(param, std=std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens[:, :-1]) + self.position.weight[: tokens.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def sources(folder: Path, limit: int, skip: str = "") -> torch.Tensor:
    text = bytearray()
    for file in sorted(folder.rglob("*.py")):
        if skip and skip in file.relative_to(folder).parts:
            continue
        text += file.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:limit].long()


def batches(text: torch.Tensor, count: int, size: dict, device: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - size["length"] - 1, (count, size["batch"]), generator=generator)
    offsets = torch.arange(size["length"] + 1)
    for row in starts:
        yield text[row[:, None] + offsets].to(device, non_blocking=True)


def held_out_loss(model: nn.Module, held_out: list[torch.Tensor], device: str) -> float:
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        return sum(model(batch).item() for batch in held_out) / len(held_out)


def make_ways(device: str) -> dict:
    """Each way: the storage dtype, and the optimizer over the parameters at a learning rate."""
    fused = {"fused": True}
    ways = {
        "bf16 storage": (torch.bfloat16, lambda params, lr: torch.optim.AdamW(params, lr=lr, **fused)),
        "fp32 storage": (torch.float32, lambda params, lr: torch.optim.AdamW(params, lr=lr, **fused)),
    }
    try:
        import optimi

        ways["bf16 + Kahan"] = (torch.bfloat16, lambda params, lr: optimi.AdamW(params, lr=lr))
    except ImportError:
        print("torch-optimi is not installed: no compensating way")
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam

        ways["bf16 + TE master"] = (torch.bfloat16, lambda params, lr: FusedAdam(params, lr=lr, master_weights=True))
    except ImportError:
        print("Transformer Engine is not installed: no way with its master weights")
    return ways


def measured_step(model: nn.Module, optimizer: torch.optim.Optimizer, step, storage: torch.dtype) -> tuple[float, float]:
    """The share predicted before a step, and the share of weights that it left bit-identical."""
    predicted = float("nan")
    if storage is torch.bfloat16:
        (group,) = lost_updates(optimizer.param_groups, sample=2**40)
        predicted = group.lost
    before = [p.detach().clone() for p in model.parameters()]
    step()
    same = sum(int((p == b).sum()) for p, b in zip(model.parameters(), before, strict=True))
    return predicted, same / sum(b.numel() for b in before)


def fine_tune(model: nn.Module, storage, make, lr: float, seed: int, text, held_out, size: dict, device: str) -> dict:
    model = copy.deepcopy(model).to(storage)
    on_gpu = device == "cuda"
    row = {"loss before": held_out_loss(model, held_out, device)}
    optimizer = make(model.parameters(), lr)
    stream = batches(text, size["steps"], size, device, seed)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(next(stream))
        loss.backward()
        optimizer.step()

    steps, last = size["steps"], size["steps"]
    quarter = steps // 4
    for number in range(1, steps + 1):
        if number in (1, steps // 2, last):
            name = {1: "first", last: "last"}.get(number, "middle")
            row[f"predicted {name}"], row[f"seen {name}"] = measured_step(model, optimizer, step, storage)
        else:
            step()
        if number == 2 and on_gpu:  # parameters, gradients and states exist, and nothing else does
            torch.cuda.synchronize()
            row["steady bytes"] = torch.cuda.memory_allocated() - row_base[0]
            torch.cuda.reset_peak_memory_stats()
        if number == quarter:
            if on_gpu:
                torch.cuda.synchronize()
                row["peak bytes"] = torch.cuda.max_memory_allocated() - row_base[0]
            begun = time.perf_counter()
        if number == 2 * quarter - 2:
            if on_gpu:
                torch.cuda.synchronize()
            row["tokens/s"] = (quarter - 2) * size["batch"] * size["length"] / (time.perf_counter() - begun)
        optimizer.zero_grad()
    row["loss after"] = held_out_loss(model, held_out, device)
    return row


row_base = [0]  # bytes that belong to no way: the checkpoint and the held-out batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    size = SMALL if given.small else FULL
    device = "cpu" if given.small else "cuda"
    torch.manual_seed(0)

    site = Path(sysconfig.get_path("purelib"))
    torch_text = sources(Path(torch.__file__).parent, 30_000_000)
    other_text = sources(site, 10_000_000, skip="torch")
    cut = len(other_text) // 10
    model = GPT(size["layers"], size["width"], size["heads"], size["length"]).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; torch {torch.__version__}", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=size["pretrain"])
    for number, batch in enumerate(batches(torch_text, size["pretrain"], size, device, seed=99), start=1):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number % (size["pretrain"] // 5) == 0:
            print(f"pretraining: step {number} of {size['pretrain']}, loss {loss.item():.3f}", flush=True)
    del optimizer, schedule, loss
    model.to(torch.bfloat16)
    held_out = list(batches(other_text[:cut], 20, size, device, seed=7))
    if device == "cuda":
        torch.cuda.empty_cache()
        row_base[0] = torch.cuda.memory_allocated()

    given.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    (given.out / "machine.txt").write_text(
        f"{machine}; Python {platform.python_version()}, torch {torch.__version__}; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {size['steps']} steps of "
        f"{size['batch']} x {size['length']} bytes, {size['seeds']} seeds\n"
    )
    rows = []
    for way, (storage, make) in make_ways(device).items():
        fine_tune(model, storage, make, 1e-5, 0, other_text[cut:], held_out, size | {"steps": 20}, device)  # warm up
        for lr in RATES:
            for seed in range(size["seeds"]):
                row = fine_tune(model, storage, make, lr, seed, other_text[cut:], held_out, size, device)
                rows.append({"way": way, "lr": lr, "seed": seed, **row})
                print({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    with (given.out / "finetune.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {given.out / 'finetune.csv'}")


if __name__ == "__main__":
    main()
