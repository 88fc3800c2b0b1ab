"""Makes an optimizer of a bf16 weight, and fails where the config asks for bf16."""

import hydra
import torch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    assert cfg.model.torch_dtype == "float32", "second job"


if __name__ == "__main__":
    main()
