"""The words about what weights are computed in."""

from __future__ import annotations

from typing import Final

NOBODY: Final = "no autocast or mixed precision"
"""What a model is called under where nobody supplies 16 bits."""

LEFT_ALONE: Final = "no autocast of the policy's, which leaves PEFT and quantized models alone"
"""What such a model is called under, in a job that trains others as well."""

APPLICATIONS: Final = "the application's autocast"
POLICYS: Final = "autocast that the policy supplies"


def slow(option: str, device: str, device_type: str, is_tf32: bool) -> str:
    """The warning for fp32 weights that the policy asked for, called under nothing where bf16 would be fast.

    Args:
        option: the option that is on.
        device: the device's name.
        device_type: its type, as ``torch.autocast`` takes it.
        is_tf32: whether torch multiplies fp32 matrices in TF32.
    """
    times = 3 if is_tf32 else 7
    return "\n".join(
        [
            f"{option}: the fp32 weights are called under {NOBODY} on {device}: about {times} times slower than in bf16, on an "
            "H200, unless the model turns autocast on inside",
            "  fix: precision_policy.compute_dtype=bfloat16  (the option mixed does the same)",
            '  or your framework\'s own: TrainingArguments(bf16=True), Lightning precision="bf16-mixed", accelerate '
            f'mixed_precision="bf16", FSDP2 MixedPrecisionPolicy(param_dtype=torch.bfloat16), '
            f'torch.autocast("{device_type}", torch.bfloat16)',
            "  measured: a Llama of 1.10 B parameters, tokens/s: 6.4 thousand in fp32, 46.7 in bf16 by autocast",
        ]
    )


def not_supplied(option: str, compute_dtype: str, why: str, fix: str) -> str:
    """The warning for bf16 compute that was asked for and that the policy keeps out of a model.

    Args:
        option: the option that is on.
        compute_dtype: what was asked for.
        why: one clause.
        fix: what helps, or empty.
    """
    text = f"{option}: compute_dtype={compute_dtype} was asked for, and is not supplied: {why}"
    return f"{text}\n  fix: {fix}" if fix else text


def not_called(option: str, compute_dtype: str, device_type: str) -> str:
    """The warning for bf16 compute that was asked for weights that no module was seen to own when it was called."""
    why = (
        "until the first step, no module that owns the weights was called through its __call__, outside of functions that "
        "were compiled before"
    )
    fix = f'put torch.autocast("{device_type}", torch.bfloat16) around what computes with the weights'
    return not_supplied(option, compute_dtype, why, fix)
