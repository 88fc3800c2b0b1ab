"""Trains by accelerate, with its accumulation, clipping and scheduler."""

import hydra
import torch
from accelerate import Accelerator
from common import Referee, batch_of, make_llama, master_weights, result_of
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="conf", config_name="accelerated")
def main(cfg):
    with master_weights(cfg), Referee().watching():
        accelerator = Accelerator(cpu=True, mixed_precision=cfg.mixed_precision, gradient_accumulation_steps=2)
        model = make_llama()
        optimizer = instantiate(cfg.optimizer)(model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if cfg.resume:
            accelerator.load_state(cfg.resume)
        for number in range(cfg.first, cfg.first + cfg.batches):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch_of(number)).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        torch.save(result_of(accelerator.unwrap_model(model), optimizer), cfg.result)
        if cfg.save:
            accelerator.save_state(cfg.save)


if __name__ == "__main__":
    main()
