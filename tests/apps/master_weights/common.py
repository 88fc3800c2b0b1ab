"""What the applications here share: a model, its data, how master weights are armed, and a referee for every step."""

import contextlib
import copy
import sys
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

LOW_BITS = "master_low_bits"
SERVED = ("torch.optim", "transformers.optimization")


class Net(nn.Module):
    """A language model of a few hundred weights, with the signature of those of transformers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.inner = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.inner.bias.requires_grad_(False)

    def forward(self, input_ids, labels):
        hidden = self.norm(torch.tanh(self.inner(self.embedding(input_ids))))
        loss = nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), labels.flatten())
        return {"loss": loss}


def make_net(dtype=torch.bfloat16):
    """The same weights each time."""
    torch.manual_seed(0)
    return Net().to(dtype)


def make_llama():
    """A real model of transformers, with tied weights; no smaller one would have all kinds of layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def make_rows(count=32):
    """The same sequences each time."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 32, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def batch_of(number, size=2):
    """The batch of a step."""
    rows = make_rows()
    first = number * size % len(rows)
    ids = torch.stack([row["input_ids"] for row in rows[first : first + size]])
    return {"input_ids": ids, "labels": ids}


@contextlib.contextmanager
def master_weights(cfg):
    """Keep master weights without the policy's Hydra option, where the config says so."""
    if not cfg.arm:
        yield
        return
    from precision_policy.job.events import Events
    from precision_policy.job.master_weights import MasterWeights
    from precision_policy.job.speaker import Speaker

    events = Events([MasterWeights()], Speaker())
    events.start()
    try:
        yield
    finally:
        events.end()


def say(text):
    """Print a line in one piece, also where torchrun has made the output of its ranks unbuffered."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def full(tensor):
    """All of a DTensor; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rounded(weights):
    """fp32 weights in bf16, to nearest, ties away from zero."""
    bits = local(weights).view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def differing(one, other):
    """How many elements of two tensors differ in value or dtype; a NaN is like another."""
    one, other = local(one), local(other)
    if one.dtype is not other.dtype or one.shape != other.shape:
        return max(one.numel(), 1)
    return int((one.ne(other) & ~(one.isnan() & other.isnan())).sum())


class Referee:
    """Keeps fp32 copies of bf16 parameters by hand, beside each optimizer, and compares after each step.

    The copies have an optimizer of the same class, which gets the gradients that the optimizer had. After a step the weights must
    be the copies rounded, and the states those of the copies. It knows nothing of how the policy does it.
    """

    def __init__(self):
        self.steps = self.wrong = 0
        self._twins = weakref.WeakKeyDictionary()
        self._is_twin = weakref.WeakSet()

    @contextlib.contextmanager
    def watching(self):
        """Look at all steps; print the result at the end."""
        hooks = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
        say(f"REFEREE {self.steps} steps, {self.wrong} wrong")

    def forget(self):
        """Begin anew with what the weights and states are at the next step."""
        self._twins.clear()
        self.steps = 0

    @torch.compiler.disable
    def _before(self, optimizer, args, kwargs):
        is_served = type(optimizer).__module__.startswith(SERVED)
        if optimizer in self._is_twin or optimizer in self._twins or not is_served:
            return
        from precision_policy.job.master_weights import fp32_weights

        weights = fp32_weights(optimizer)
        copies = {param: weights[param].detach().clone().requires_grad_(param.requires_grad) for param in weights}
        groups = []
        for group in optimizer.param_groups:
            groups.append({**group, "params": [copies[param] for param in group["params"]]})
        twin = type(optimizer)(groups)
        self._is_twin.add(twin)
        for param, entry in optimizer.state.items():
            for name, value in entry.items():
                if name in (LOW_BITS, "master_param"):
                    continue
                its = copy.deepcopy(value)
                if torch.is_tensor(its) and its.dtype is torch.bfloat16:
                    its = its.float()
                twin.state[copies[param]][name] = its
        self._twins[optimizer] = twin, copies

    @torch.compiler.disable
    def _after(self, optimizer, args, kwargs):
        if optimizer not in self._twins:
            return
        twin, copies = self._twins[optimizer]
        for group, its in zip(optimizer.param_groups, twin.param_groups, strict=True):
            its.update({name: value for name, value in group.items() if name != "params"})
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                setattr(twin, name, getattr(optimizer, name))
        for param, weights in copies.items():
            weights.grad = None if param.grad is None else param.grad.float()
        twin.step()
        self.steps += 1
        for param, weights in copies.items():
            expected = rounded(weights.detach()) if param.dtype is torch.bfloat16 else weights
            self.wrong += differing(param.detach(), expected)
            for name, value in twin.state.get(weights, {}).items():
                if torch.is_tensor(value):
                    self.wrong += differing(optimizer.state[param][name], value)


def result_of(model, optimizer):
    """Everything that a later step depends on: weights by name, states by number, and what else the state dict has."""
    states = optimizer.state_dict()
    return copy.deepcopy({"weights": model.state_dict(), "states": states["state"], "groups": states["param_groups"]})
