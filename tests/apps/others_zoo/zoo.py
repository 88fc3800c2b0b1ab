"""Other people's models: what their names and signatures seem to promise is not so."""

import torch


class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)


class Hub(Net):
    @classmethod
    def from_pretrained(cls, path=None):
        return cls()

    @classmethod
    def from_config(cls, config=None):
        return cls()


NAMES = {"single": torch.float32, "brain": torch.bfloat16}


def passes_on(*, weights=None, **kwargs):
    return Net(**kwargs)


def wants_objects(dtype=torch.float32):
    return Net().to(dtype)


def has_names_of_its_own(torch_dtype="single"):
    return Net().to(NAMES[torch_dtype])
