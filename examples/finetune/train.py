"""Fine-tune a causal language model on a text file: an ordinary Hydra application that knows nothing of the policy."""

import logging
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer

log = logging.getLogger(__name__)


def batches(tokens: torch.Tensor, size: int, length: int, steps: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (steps, size), generator=generator)
    return [torch.stack([tokens[start : start + length] for start in row]) for row in starts]


def mean_loss(model: torch.nn.Module, held_out: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(model(input_ids=batch, labels=batch).loss.item() for batch in held_out) / len(held_out)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.seed)
    tokenizer = AutoTokenizer.from_pretrained(cfg.checkpoint)
    tokens = torch.tensor(tokenizer(Path(cfg.text).read_text(encoding="utf-8"))["input_ids"])
    cut = int(0.1 * len(tokens))
    model = hydra.utils.instantiate(cfg.model)
    optimizer = hydra.utils.instantiate(cfg.optimizer, params=model.parameters())
    held_out = batches(tokens[:cut], cfg.batch, cfg.length, 16, seed=1)
    log.info("loss before: %.4f (%s)", mean_loss(model, held_out), next(model.parameters()).dtype)
    for step, batch in enumerate(batches(tokens[cut:], cfg.batch, cfg.length, cfg.steps, cfg.seed), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, cfg.steps // 5) == 0:
            log.info("step %d of %d: loss %.4f", step, cfg.steps, loss.item())
    log.info("loss after: %.4f", mean_loss(model, held_out))
    model.save_pretrained(cfg.save_to)


if __name__ == "__main__":
    main()
