"""Several optimizer steps in one training step, as recipes for WGANs have them, under Lightning's DDP."""

import hydra
import lightning
import torch
from hydra.utils import instantiate


class Inner(lightning.LightningModule):
    def __init__(self, cfg):
        super().__init__()
        self.automatic_optimization = False
        self.cfg = cfg
        self.critic = instantiate(cfg.model)

    def training_step(self, x, index):
        optimizer = self.optimizers()
        for _ in range(3):
            loss = self.critic(x).square().mean()
            print("LOSS", loss.item())
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return instantiate(self.cfg.optimizer, self.parameters())


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    lightning.seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, strategy="ddp", max_epochs=1, **quiet)
    trainer.fit(Inner(cfg), torch.utils.data.DataLoader(torch.randn(8, 64), 8))


if __name__ == "__main__":
    main()
