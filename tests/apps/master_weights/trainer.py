"""Trains by the Trainer of transformers, which makes the optimizer, the schedule and the checkpoints itself."""

import hydra
import torch
from common import Referee, make_llama, make_rows, master_weights, result_of
from omegaconf import OmegaConf
from transformers import Trainer, TrainerCallback, TrainingArguments


class StopAfter(TrainerCallback):
    """Interrupts a run whose schedule is that of all its steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.steps


@hydra.main(version_base="1.3", config_path="conf", config_name="trainer")
def main(cfg):
    with master_weights(cfg), Referee().watching() as referee:
        model = make_llama()
        arguments = TrainingArguments(**OmegaConf.to_container(cfg.trainer), report_to=[], use_cpu=True, disable_tqdm=True)
        callbacks = [StopAfter(cfg.stop_after)] if cfg.stop_after else []
        rows = make_rows()
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks)
        trainer.train(resume_from_checkpoint=cfg.resume)
        torch.save(result_of(model, trainer.optimizer), cfg.result)
        if arguments.load_best_model_at_end:
            print(f"BEST {trainer.state.best_model_checkpoint}")
            referee.forget()
            step_in_place(model, trainer.optimizer)
            torch.save(result_of(model, trainer.optimizer), "after.pt")
            trainer.optimizer.param_groups[0]["lr"] = 1e-3
            loss = model(**{name: row[None] for name, row in rows[0].items()}).loss
            loss.backward()
            trainer.optimizer.step()


def step_in_place(model, optimizer):
    """A step that changes no weight, but for what the optimizer writes by mistake."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()


if __name__ == "__main__":
    main()
