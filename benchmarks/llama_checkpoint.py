"""Make a bf16 checkpoint of a Llama from a config, trained for a few steps so that its weights are not random.

``python llama_checkpoint.py DIRECTORY [--small] [--steps N]``
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from llama_app import batches, text

LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def main(directory: str, small: bool, steps: int) -> None:
    torch.manual_seed(0)
    shape = SMALL if small else LARGE
    heads = shape["num_attention_heads"] // (2 if small else 8)
    config = LlamaConfig(vocab_size=512 if small else 32000, max_position_embeddings=2048, num_key_value_heads=heads, **shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    cfg = OmegaConf.create({"seed": 7, "length": 64 if small else 1024, "batch": 8})
    data = batches(text(100_000 if small else 1_800_000), cfg, 0, device)
    for step in range(steps):
        batch = next(data)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"checkpoint: step {step}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in bf16 -> {directory}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    main(given.directory, given.small, given.steps)
