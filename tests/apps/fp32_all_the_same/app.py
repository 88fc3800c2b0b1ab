"""Trains a model in fp32, whatever its config says of the model, and prints whether it was computed in bf16."""

import hydra
import torch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(torch.randn(2, 64))
    print("ROUNDED", torch.equal(output, output.bfloat16().float()))
    output.sum().backward()
    optimizer.step()


if __name__ == "__main__":
    main()
