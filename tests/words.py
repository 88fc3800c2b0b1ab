"""The policy's words that tests of several applications look for, each once."""

LOST = "torch.optim.AdamW over bf16 weights"
"""An optimizer loses updates: in the warning, and in the error of ``strict``."""

STORED = "stored in fp32, updated in fp32"
"""What is said of the storage where all that is trained is kept in fp32."""

SUPPLIED = "autocast that the policy supplies"
"""Who makes bf16 compute, where the application does not."""

UNSEEN = "called under no autocast or mixed precision"
"""What is said of the compute where nobody was seen to choose another dtype than that of the storage."""


def storage_set(key: str, before: str) -> str:
    """The line of a decision that sets fp32 storage."""
    return f"INFO precision_policy=on: {key}: {before} -> float32"


def trained(tensors: int, elements: int, computed: str, shard: bool = False) -> str:
    """What the line of the first step says of an optimizer where all that is trained is stored in fp32."""
    plural = "s" if tensors > 1 else ""
    of_the_shard = " of this rank's shard" if shard else ""
    return f"{tensors} trainable tensor{plural}, {elements:,} elements{of_the_shard}: {STORED}, {computed}"


def not_as_asked(key: str, tensors: int) -> str:
    """The start of the line that fp32 was asked for and bf16 came."""
    return f"INFO precision_policy=on: {key}=float32 asked for fp32 storage, but {tensors} of {tensors} tensors came in bf16"
