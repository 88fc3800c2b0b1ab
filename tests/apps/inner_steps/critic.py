"""What is trained, for the config to name."""

import torch


class Critic(torch.nn.Linear):
    def __init__(self, dtype=None):
        super().__init__(64, 1, dtype=getattr(torch, dtype or "float32"))
