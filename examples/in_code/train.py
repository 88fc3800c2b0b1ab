"""Fine-tune that checkpoint on that text with nothing but numbers in the config: model and optimizer are built here."""

import logging
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

FILES = Path(__file__).parent.parent / "finetune"
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
    tokenizer = AutoTokenizer.from_pretrained(FILES / "checkpoint")
    tokens = torch.tensor(tokenizer((FILES / "declaration.txt").read_text(encoding="utf-8"))["input_ids"])
    cut = int(0.1 * len(tokens))
    # Nobody asks for bf16: a recent transformers loads a checkpoint in the dtype that it was saved in.
    model = AutoModelForCausalLM.from_pretrained(FILES / "checkpoint")
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    held_out = batches(tokens[:cut], cfg.batch, cfg.length, 16, seed=1)
    log.info("loss before: %.4f", mean_loss(model, held_out))
    for batch in batches(tokens[cut:], cfg.batch, cfg.length, cfg.steps, cfg.seed):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    log.info("loss after: %.4f", mean_loss(model, held_out))
    model.save_pretrained(Path(HydraConfig.get().runtime.output_dir) / "model")


if __name__ == "__main__":
    main()
