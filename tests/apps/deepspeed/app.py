"""Trains by DeepSpeed's engine, which builds the optimizer or is given one."""

import hydra
import torch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import deepspeed

    model = torch.nn.Linear(16, 16).to(torch.bfloat16)
    config = {
        "train_batch_size": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": cfg.stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = None
    if cfg.builds_its_own:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    else:
        optimizer = hydra.utils.instantiate(cfg.optimizer)(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, model_parameters=model.parameters())
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 16, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
