"""The policy's words that tests of several applications look for, each once."""

LOST = "torch.optim.AdamW over bf16 weights"
"""An optimizer loses updates: in the warning, and in the error of ``strict``."""

SUPPLIED = "autocast that the policy supplies"
"""Who makes bf16 compute, where the application does not."""


def storage_set(key: str, before: str) -> str:
    """The line of a decision that sets fp32 storage."""
    return f"INFO precision_policy=on: {key}: {before} -> float32"


def trained(tensors: int, elements: int, computed: str, shard: bool = False) -> str:
    """How the line of the first step ends, where all that is trained is stored in fp32."""
    plural = "s" if tensors > 1 else ""
    of_the_shard = " of this rank's shard" if shard else ""
    return f"{tensors} trainable tensor{plural}, {elements:,} elements{of_the_shard}: stored in fp32, {computed}"


def not_as_asked(key: str, tensors: int) -> str:
    """The start of the warning that fp32 was asked for and bf16 came."""
    return f"WARNING precision_policy=on: {key}=float32 asked for fp32 storage, but {tensors} of {tensors} tensors came in bf16"
