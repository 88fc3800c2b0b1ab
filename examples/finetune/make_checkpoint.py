"""Make a small Llama-style checkpoint in bf16, pretrained on the Constitution of the United States.

``python make_checkpoint.py checkpoint 1000`` made the one that lies beside this file (a minute of one core with torch
2.13.0 and transformers 5.23.0). No network is needed: the model is made from a config.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main(directory: str, steps: int = 1000) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )
    text = (HERE / "constitution.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - 64, (8,)).tolist()
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0:
            print(f"pretraining: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in bf16 -> {directory}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
