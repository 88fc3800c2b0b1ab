"""Trains by Lightning, which calls step with a closure that runs forward and backward."""

import hydra
import lightning
import torch
from common import Referee, make_net, make_rows, master_weights, result_of
from hydra.utils import instantiate


class Automatic(lightning.LightningModule):
    def __init__(self, cfg):
        super().__init__()
        self.net = make_net(torch.float32)  # bf16-true makes it bf16
        self.cfg = cfg

    def training_step(self, batch, index):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = instantiate(self.cfg.optimizer)(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Manual(Automatic):
    """Steps two optimizers by hand, one with a closure."""

    automatic_optimization = False

    def training_step(self, batch, index):
        first, second = self.optimizers()

        def closure():
            self.manual_backward(self.net(**batch)["loss"])
            self.clip_gradients(first, 0.5, "norm")

        first.zero_grad()
        second.zero_grad()
        first.step(closure)
        second.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        matrices = [param for param in self.parameters() if param.dim() > 1]
        vectors = [param for param in self.parameters() if param.dim() < 2]
        optimizers = [instantiate(self.cfg.optimizer)(matrices), torch.optim.SGD(vectors, 1e-3, momentum=0.9)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


@hydra.main(version_base="1.3", config_path="conf", config_name="lightning")
def main(cfg):
    with master_weights(cfg), Referee().watching():
        module = globals()[cfg.module](cfg)
        trainer = instantiate(cfg.trainer)
        rows = torch.utils.data.DataLoader(make_rows(12), batch_size=2)
        trainer.fit(module, rows, ckpt_path=cfg.resume, weights_only=False)
        results = [result_of(module.net, optimizer) for optimizer in trainer.optimizers]
        torch.save(results, cfg.result)


if __name__ == "__main__":
    main()
