"""An application of hydra-zen: no YAML, and a typed root."""

import torch
from hydra_zen import builds, store, zen


def model(torch_dtype=None):
    return torch.nn.Linear(4, 4, dtype=getattr(torch, torch_dtype or "bfloat16"))


def train(model, optimizer):
    optimizer(model.parameters())
    print("STORAGE", model.weight.dtype)


store(
    builds(
        train,
        model=builds(model, populate_full_signature=True),
        optimizer=builds(torch.optim.AdamW, zen_partial=True, lr=1e-5),
    ),
    name="train",
)

if __name__ == "__main__":
    store.add_to_hydra_store()
    zen(train).hydra_main(config_name="train", config_path=None, version_base="1.3")
