"""What the policy costs once it is on: composition, constructing an optimizer, a training step. Ratios within one run.

python benchmarks/overhead.py [--autocast | --first-look]
"""

import contextlib
import functools
import gc
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from precision_policy.job.arming import arm
from precision_policy.precision_warnings import _WARNED_CONTEXTS, warn_if_torch_adam_with_bf16_params
from precision_policy.record import Record

CONFIG = """
model: {_target_: transformers.AutoModelForCausalLM.from_pretrained, torch_dtype: auto}
optimizer: {_target_: torch.optim.AdamW, lr: 1.0e-5}
data: {path: /data, batch: 8, workers: 4}
trainer: {steps: 1000, precision: bf16-mixed}
"""


def ratio(name: str, base, other, repeats: int = 301, inner: int = 1, setting=contextlib.nullcontext) -> None:
    """Print the median of paired ratios, the order swapped each time, and its spread.

    ``setting`` is entered around ``other``; entering it and a first call within it are not timed, for either of the two.
    """
    for work in (base, other):
        work()
    ratios = []
    gc.collect()
    gc.disable()
    for number in range(repeats):
        times = {}
        for work in (base, other) if number % 2 else (other, base):
            with setting() if work is other else contextlib.nullcontext():
                if setting is not contextlib.nullcontext:
                    work()
                begun = time.perf_counter()
                for _ in range(inner):
                    work()
                times[work] = time.perf_counter() - begun
        ratios.append(times[other] / times[base])
    gc.enable()
    quarters = statistics.quantiles(ratios, n=4)
    print(f"{name:<64}{statistics.median(ratios):>8.3f}  (quartiles {quarters[0]:.3f} to {quarters[2]:.3f})", flush=True)


def composition() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG)
        (folder / "nothing").mkdir()
        (folder / "nothing/empty.yaml").write_text("")
        with initialize_config_dir(version_base="1.3", config_dir=name):
            empty = lambda: compose("config", ["+nothing=empty"], return_hydra_config=True)
            for option in ("on", "off"):
                on = lambda option=option: compose("config", [f"+precision_policy={option}"], return_hydra_config=True)
                ratio(f"composition with precision_policy={option}, to an empty group", empty, on)


def record_of(*settings: str) -> Record:
    """The record of a job over the configuration above, with these settings on its command line."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.yaml").write_text(CONFIG)
        with initialize_config_dir(version_base="1.3", config_dir=name):
            composed = compose("config", list(settings), return_hydra_config=True)
    return Record.read(OmegaConf.to_container(composed.hydra.precision_policy))


def construction() -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(10_000)]
    make = lambda: torch.optim.AdamW(params, lr=1e-5)
    everything = "+precision_policy=[mixed,strict]", "precision_policy.monitor.every=100"

    def by_hand():
        _WARNED_CONTEXTS.clear()
        warn_if_torch_adam_with_bf16_params(make())

    for told, settings in (("on", ["+precision_policy=on"]), ("all listeners", everything)):
        armed = functools.partial(arm, record_of(*settings), "precision_policy=on")
        name = f"constructing AdamW over 10,000 parameters, armed by {told}"
        ratio(name, make, functools.partial(make), inner=3, setting=armed)
    ratio("the same with the check called by hand", make, by_hand)


def steps() -> None:
    def optimizer():
        params = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(50)]
        for param in params:
            param.grad = torch.ones_like(param)
        return torch.optim.AdamW(params, lr=1e-5)

    plain = optimizer()
    plain.step()
    for told, settings in (
        ("on", ["+precision_policy=on"]),
        ("monitor.every=100", ["+precision_policy=on", "precision_policy.monitor.every=100"]),
        ("master_weights, over fp32 weights", ["+precision_policy=master_weights"]),
    ):
        with arm(record_of(*settings), "precision_policy=on"):
            watched = optimizer()
            watched.step()  # what is said of the first step
        # Armed for the time of each of its measurements alone, since what is armed is heard by all optimizers.
        armed = functools.partial(arm, record_of(*settings), "precision_policy=on")
        ratio(f"100 steps, armed by {told}", of_100(plain), of_100(watched), repeats=51, setting=armed)


def of_100(optimizer):
    """A hundred steps."""

    def work():
        for _ in range(100):
            optimizer.step()

    return work


def supplied_autocast() -> None:
    """What the policy's autocast costs a forward beyond torch's own, in microseconds: medians of pairs.

    What entering ``torch.autocast`` costs is printed beside it, as what the difference may be at most.
    """
    from precision_policy.job.autocast import Autocast

    class Network(torch.nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x):
            return self.output

    x = torch.ones(1)
    low = torch.ones(1, dtype=torch.bfloat16)
    outputs = {"a tensor": x, "a bf16 tensor": low, "a dict of three": {"a": x, "b": x, "c": 1}}
    for name, output in outputs.items():
        for hooked in (False, True):
            plain, supplied = Network(output), Network(output)
            Autocast().supply(supplied, "cpu")
            if hooked:
                for one in (plain, supplied):
                    one.register_forward_hook(lambda *args: None)
            told = f"mixed: a forward that returns {name}{', with a hook' if hooked else ''}"
            entering, beyond = _costs(plain, supplied, x)
            print(f"{told:<64}{beyond:>8.2f}  (entering torch.autocast: {entering:.2f} microseconds)", flush=True)


def _costs(plain, supplied, x) -> tuple[float, float]:
    """What entering autocast costs a call, and what the policy's costs beyond that, in microseconds of processor time."""

    def own():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            plain(x)

    entering, beyond = [], []
    for _ in range(301):
        times = []
        for call in (lambda: plain(x), own, lambda: supplied(x)):
            begun = time.thread_time()
            for _ in range(100):
                call()
            times.append((time.thread_time() - begun) / 100 * 1e6)
        entering.append(times[1] - times[0])
        beyond.append(times[2] - times[1])
    return statistics.median(entering), statistics.median(beyond)


def first_look(device: str) -> None:
    """The look at the first gradients, for 147 tensors of 1.1 billion elements: milliseconds, the device idle before."""
    from precision_policy.job.gradients import FirstGradients

    sizes = [(2048, 2048)] * 44 + [(2048, 5632)] * 66 + [(2048,)] * 35 + [(32000, 2048)] * 2
    params = [torch.nn.Parameter(torch.randn(size, device=device) * 0.02) for size in sizes]
    optimizer = torch.optim.SGD(params, lr=1e-5)
    times = []
    for _ in range(9):
        gradients = FirstGradients(optimizer)
        sum((p * p).sum() for p in params).backward()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        gradients.read()
        times.append(1000 * (time.perf_counter() - begun))
        optimizer.zero_grad()
    elements = sum(p.numel() for p in params)
    print(f"{f'first look, {len(params)} tensors, {elements:,} elements, milliseconds':<64}{statistics.median(times):>8.2f}")


if __name__ == "__main__":
    if "--first-look" in sys.argv:
        first_look("cuda")
        sys.exit()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    if "--autocast" in sys.argv:
        supplied_autocast()
        sys.exit()
    composition()
    construction()
    steps()
    supplied_autocast()
