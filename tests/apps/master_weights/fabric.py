"""Trains by Lightning Fabric, which wraps the optimizer."""

import hydra
import torch
from common import Referee, batch_of, make_net, master_weights, result_of
from hydra.utils import instantiate
from lightning.fabric import Fabric


@hydra.main(version_base="1.3", config_path="conf", config_name="fabric")
def main(cfg):
    with master_weights(cfg), Referee().watching():
        fabric = Fabric(accelerator="cpu", devices=1, precision=cfg.precision)
        model = make_net(torch.float32)  # bf16-true makes it bf16
        model, optimizer = fabric.setup(model, instantiate(cfg.optimizer)(model.parameters()))
        state = {"model": model, "optimizer": optimizer}
        if cfg.resume:
            fabric.load(cfg.resume, state)
        for number in range(cfg.first, cfg.first + cfg.steps):
            with fabric.no_backward_sync(model):
                fabric.backward(model(**batch_of(2 * number))["loss"])
            fabric.backward(model(**batch_of(2 * number + 1))["loss"])
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
        torch.save(result_of(model, optimizer), cfg.result)
        if cfg.save:
            fabric.save(cfg.save, state)


if __name__ == "__main__":
    main()
