"""A small network, trained in a plain loop in one of several ways; it prints what the layer inside computed in."""

import hydra
import torch
from hydra.utils import instantiate
from torch import nn


class Network(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.layer = nn.Linear(64, 64, dtype=getattr(torch, dtype or "float32"))
        self.inside = set()

    def forward(self, x):
        y = self.layer(x.to(self.layer.weight.dtype))
        if not torch.compiler.is_compiling():
            self.inside.add(str(y.dtype))
        return y


def batch():
    return torch.randn(32, 64)


def plain(cfg, model):
    return lambda: model(batch()).square().mean()


def own_autocast(cfg, model):
    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch()).square().mean()

    return loss


def penalty(cfg, model):
    return lambda: model(batch()).square().mean() + 1e-3 * model.layer.weight.square().sum()


def own_autocast_and_penalty(cfg, model):
    loss = own_autocast(cfg, model)
    return lambda: loss() + 1e-3 * model.layer.weight.square().sum()


def weight_norm(cfg, model):
    nn.utils.parametrizations.weight_norm(model.layer)
    return plain(cfg, model)


def compiled(cfg, model):
    return torch.compile(plain(cfg, model), backend="eager")


def functional(cfg, model):
    return lambda: torch.func.functional_call(model, dict(model.named_parameters()), (batch(),)).square().mean()


def lazy(cfg, model):
    model.layer = nn.LazyLinear(64)
    return plain(cfg, model)


def hook(cfg, model):
    model.register_forward_hook(lambda module, args, output: print("HOOK", output.detach().numpy().dtype))
    return plain(cfg, model)


def no_module(cfg, model):
    return lambda: (batch() @ model.layer.weight).square().mean()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    loss = globals()[cfg.how](cfg, model)
    untouched = nn.Module.__call__
    for _ in range(cfg.rounds):
        optimizer = instantiate(cfg.optimizer)(model.parameters())
        loss().backward()
        optimizer.step()
    print("INSIDE", sorted(model.inside))
    print("CALL IS TORCH'S", nn.Module.__call__ is untouched)
    output = model(batch())
    print("OUTSIDE", output.dtype, "ROUNDED", torch.equal(output, output.bfloat16().float()))
    if cfg.exports:
        program = torch.export.export(model.eval(), (batch(),))
        print("EXPORTED AUTOCAST", "autocast" in str(program))


if __name__ == "__main__":
    main()
