"""What an optimizer's weights are computed in, and by whose doing."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_policy.estimate import parameters
from precision_policy.job import compute_dtype, holdings, words
from precision_policy.job.events import Listener
from precision_policy.job.speaker import Speaker
from precision_policy.record import FROZEN_BASE, Record


@dataclass(frozen=True)
class Computed:
    """What weights are computed in.

    Attributes:
        dtype: "bf16", "fp16", "fp32" or "TF32"; None where it is not known.
        by: who supplies it, in words; None where nobody was seen to.
    """

    dtype: str | None = None
    by: str | None = None


class Compute(Listener):
    """Looks at what the job computes in, and supplies bf16 where that was asked for.

    Args:
        record: the job's.
        speaker: says what this finds.
        option: how the option that is on is called.
    """

    def __init__(self, record: Record, speaker: Speaker, option: str) -> None:
        self._record = record
        self._speaker = speaker
        self._option = option
        rules = {decision.rule for decision in record.decisions}
        self._leaves_some_alone = bool(rules & FROZEN_BASE) and not rules <= FROZEN_BASE
        self._supplies = record.compute_dtype is not None and not rules <= FROZEN_BASE
        self._set_over_checkpoint = any(d.rule == "set" and d.loads_checkpoint_dtype for d in record.decisions)
        self._probes: weakref.WeakKeyDictionary[Optimizer, compute_dtype.Probe] = weakref.WeakKeyDictionary()
        self._answers: weakref.WeakKeyDictionary[Optimizer, Computed] = weakref.WeakKeyDictionary()
        self._supply = compute_dtype.Supply()
        self._owners = compute_dtype.Owners(self._owner_found, self._guarded)
        self._modules: list[tuple[weakref.ref[nn.Module], set[int], tuple[str, str | None]]] = []

    def _guarded(self, look: Callable[..., None], *args: Any) -> None:
        try:
            look(*args)
        except Exception:
            text = f"{self._option}: an optimizer could not be judged; the job goes on"
            self._speaker.say_once("failed", logging.WARNING, lambda: text, exc_info=True)

    def made(self, optimizer: Optimizer) -> None:
        """Follow its parameters."""
        self._probes[optimizer] = compute_dtype.Probe(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._owners.follow(parameters.trainable(params, (torch.float32, torch.bfloat16)))

    def _owner_found(self, module: nn.Module, params: list[nn.Parameter]) -> None:
        device_type = params[0].device.type
        supplier = compute_dtype.supplier(module, device_type)
        if params[0].dtype is torch.float32:
            if self._leaves_some_alone and any(not p.requires_grad for p in module.parameters()):
                supplier = supplier or (compute_dtype.LEFT_ALONE, None)
            elif self._supplies and (supplier is None or supplier[1] is None):
                supplier = supplier or ("autocast that the policy supplies", None)
                for one in compute_dtype.with_what_it_wraps(module):
                    self._supply.to(one, device_type)
        self._modules.append((weakref.ref(module), set(map(id, params)), supplier or (compute_dtype.NOBODY, None)))

    def _of(self, optimizer: Optimizer) -> list[tuple[nn.Module, tuple[str, str | None]]]:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = []
        for reference, owned, supplier in self._modules:
            module = reference()
            if module is not None and owned & ids:
                found.append((module, supplier))
        return found

    def stepped(self, optimizer: Optimizer) -> None:
        """Read what was seen of its gradients."""
        probe = self._probes.pop(optimizer, None)
        if probe is None:
            return
        seen = probe.read()
        suppliers = dict.fromkeys(supplier for _, supplier in self._of(optimizer))
        says = {dtype for _, dtype in suppliers}
        by = " and ".join(name for name, _ in suppliers) or None
        params = holdings.trained(optimizer)
        self._owners.forget(p for p in params if p.grad is not None)
        if not params:
            return
        device = params[0].device
        told = says.pop() if len(says) == 1 else None
        computed = compute_dtype.fp32_or_tf32(told or seen, device)
        in_fp32, nobody = computed in ("fp32", "TF32"), by == compute_dtype.NOBODY
        hides = in_fp32 or (nobody and computed is not None)
        self._answers[optimizer] = Computed(computed, None if hides else by)
        stored_in_fp32 = any(p.dtype is torch.float32 for p in params)
        if stored_in_fp32 and by != compute_dtype.LEFT_ALONE and (in_fp32 or (nobody and computed is None)):
            if self._record.compute_dtype is not None and computed is not None:
                text = words.not_supplied(self._option, self._record.compute_dtype, computed, by)
                self._speaker.say_once("not supplied", logging.WARNING, lambda: text)
            elif self._set_over_checkpoint:
                name = compute_dtype.bf16_device(device)
                if name is not None:
                    slow = words.slow(self._option, computed, name, device.type)
                    self._speaker.say_once("slow", logging.WARNING, lambda: slow)

    def answer(self, optimizer: Optimizer) -> Computed:
        """What was seen by the optimizer's first step."""
        return self._answers.get(optimizer, Computed())

    def modules(self, optimizer: Optimizer) -> list[nn.Module]:
        """The outermost modules seen called that own its parameters."""
        return [module for module, _ in self._of(optimizer)]

    def end(self) -> None:
        """Leave the modules as they were."""
        self._supply.stop()
        self._owners.stop()
        for probe in list(self._probes.values()):
            probe.close()
