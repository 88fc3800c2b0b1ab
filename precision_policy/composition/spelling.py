"""How projects spell a dtype, and how YAML and the command line spell a value."""

from __future__ import annotations

from typing import Any, Final

BF16_FOR_FP32: Final = {
    "float32": "bfloat16",
    "fp32": "bf16",
    "torch.float32": "torch.bfloat16",
    "float": "bfloat16",
    "32": "bf16",
    "32-true": "bf16-true",
}
"""How projects spell fp32, and what each then calls bf16."""

UNCHOSEN: Final = (None, "auto")
"""Values of a dtype key that nobody chose: ``transformers`` then loads whatever the checkpoint was saved in."""

_FP32_FOR_16_BITS: Final = {
    "bfloat16": "float32",
    "float16": "float32",
    "bf16": "fp32",
    "fp16": "fp32",
    "torch.bfloat16": "torch.float32",
    "torch.float16": "torch.float32",
    "bf16-true": "32-true",
    "16-true": "32-true",
}


def yaml_word(value: Any) -> str:
    """A plain value as YAML and the command line spell it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def is_fp32(value: Any) -> bool:
    """Whether a value of a dtype key is one of the usual spellings of fp32."""
    return not isinstance(value, bool) and str(value) in BF16_FOR_FP32


def fp32_like(value: Any) -> str | None:
    """How a project that spells 16 bits like this spells fp32; None for a value that is no usual spelling of 16 bits."""
    return _FP32_FOR_16_BITS.get(value) if isinstance(value, str) else None
