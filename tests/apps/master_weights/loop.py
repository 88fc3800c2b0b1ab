"""Trains by a loop of its own, with all that such loops do between a backward pass and the next one."""

import contextlib

import hydra
import torch
from common import Referee, batch_of, make_net, master_weights, result_of
from hydra.utils import instantiate


def save(path, model, optimizer, scheduler, scaler):
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)


def resume(path, model, optimizer, scheduler, scaler):
    checkpoint = torch.load(path, weights_only=True)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])


@hydra.main(version_base="1.3", config_path="conf", config_name="loop")
def main(cfg):
    with master_weights(cfg), Referee().watching():
        train(cfg)


def train(cfg):
    model = make_net()
    # Muon takes matrices alone.
    params = [param for param in model.parameters() if param.dim() > 1 or "Muon" not in cfg.optimizer._target_]
    optimizer = instantiate(cfg.optimizer)(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9 if cfg.scheduler else 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=cfg.scaler)
    if cfg.resume:
        resume(cfg.resume, model, optimizer, scheduler, scaler)
    compiled, step = model, optimizer.step
    if cfg.compile in ("model", "both"):
        compiled = torch.compile(model, backend=cfg.backend)
    if cfg.compile in ("step", "both"):
        step = torch.compile(optimizer.step, backend=cfg.backend)
    for number in range(cfg.first, cfg.first + cfg.steps):
        for part in range(cfg.accumulate):
            loss = compiled(**batch_of(number * cfg.accumulate + part))["loss"] / cfg.accumulate
            scaler.scale(loss).backward()
        if number == cfg.overflow_at:
            params[0].grad.view(-1)[0] = float("inf")
        if cfg.clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, cfg.clip, error_if_nonfinite=False)
        if cfg.scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            step()
        with contextlib.suppress(UserWarning):
            scheduler.step()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
    torch.save(result_of(model, optimizer), cfg.result)
    if cfg.save:
        save(cfg.save, model, optimizer, scheduler, scaler)


if __name__ == "__main__":
    main()
