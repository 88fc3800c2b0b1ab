"""Fine-tunes a model by Lightning; its config has the layout of the popular template of Hydra with Lightning."""

import hydra
import lightning
import torch
from hydra.utils import instantiate


class Module(lightning.LightningModule):
    def __init__(self, net, optimizer, scheduler):
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler

    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        optimizer = self.optimizer(params=self.trainer.model.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer=optimizer)}


class StepsByHand(Module):
    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        optimizer.zero_grad()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = instantiate(cfg.model)
    trainer = instantiate(cfg.trainer)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randint(0, 200, (4, 16)), batch_size=2))


if __name__ == "__main__":
    main()
