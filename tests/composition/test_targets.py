"""The packages that are known by name really read the key that is added."""

import pytest
import torch


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_transformers_reads_the_key(tmp_path, key):
    """``from_pretrained`` and ``from_config`` of a bf16 checkpoint and config store in fp32, by the name alone."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, dtype="bfloat16"
    )
    auto = transformers.AutoModelForCausalLM
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert auto.from_pretrained(tmp_path).dtype is torch.bfloat16
    assert auto.from_pretrained(tmp_path, **{key: "float32"}).dtype is torch.float32
    assert auto.from_config(config).dtype is torch.bfloat16
    assert auto.from_config(config, **{key: "float32"}).dtype is torch.float32
