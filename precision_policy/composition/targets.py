"""What a ``_target_`` or an optimizer's name stands for. It is judged by its text alone: nothing is imported here.

The names are those of ``torch.optim`` as of torch 2.13; its modules ``lr_scheduler`` and ``swa_utils`` hold no
optimizers, and ``torch.optim.Optimizer`` is only their base class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from omegaconf import DictConfig

from precision_policy.composition import config_tree

TORCH_ADAM_TARGETS = frozenset({"torch.optim.Adam", "torch.optim.AdamW", "torch.optim.adam.Adam", "torch.optim.adamw.AdamW"})

# By pattern and not by list, so that an optimizer of a newer torch counts: each of them keeps no master copy.
_TORCH_OPTIM = re.compile(r"torch\.optim\.(?:(?!lr_scheduler\b|swa_utils\b)\w+\.)*(?!Optimizer$)[A-Z]\w*")

# Adafactor and Muon are left out: by name alone they are as likely to be another package's.
_NAMES = "ASGD Adadelta Adagrad Adam AdamW Adamax LBFGS NAdam RAdam RMSprop Rprop SGD SparseAdam"
_BY_NAME = {name.lower(): f"torch.optim.{name}" for name in _NAMES.split()}
# The names of transformers.TrainingArguments(optim=...) that stand for torch.optim.AdamW.
_BY_NAME |= dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "torch.optim.AdamW")


@dataclass(frozen=True)
class Loader:
    """A package whose methods of models are known to read ``torch_dtype="float32"``.

    Attributes:
        models: the names of its classes that do.
        methods: the methods of these that do.
        loads_checkpoint_dtype: whether ``from_pretrained`` without a dtype loads the dtype of the checkpoint.
    """

    models: re.Pattern[str]
    methods: tuple[str, ...]
    loads_checkpoint_dtype: bool


_ANY_CLASS: Final = re.compile(r"[A-Z]\w*")
LOADERS: Final = {
    # transformers 5.23, modeling_utils.py: `from_pretrained` and `_from_config` take `torch_dtype` from their kwargs, where
    # `dtype` is not given, and turn its name into a torch.dtype. Nothing given means the checkpoint's own since version 5.
    "transformers": Loader(_ANY_CLASS, ("from_pretrained", "from_config"), loads_checkpoint_dtype=True),
    # diffusers 0.42, models/modeling_utils.py and pipelines/pipeline_utils.py: `from_pretrained` takes `torch_dtype` from its
    # kwargs, and reads any name as fp32. `from_config` (configuration_utils.py) ignores the key. Nothing given means fp32.
    "diffusers": Loader(_ANY_CLASS, ("from_pretrained",), loads_checkpoint_dtype=False),
    # nemo_automodel 0.7, _transformers/auto_model.py: both methods of its auto classes have the parameter `torch_dtype="auto"`,
    # and turn a name into a torch.dtype.
    "nemo_automodel": Loader(re.compile(r"NeMoAutoModel\w*"), ("from_pretrained", "from_config"), loads_checkpoint_dtype=True),
}
"""The packages known by name. Elsewhere a method of the same name may take no dtype, and die of one."""


def dotted(target: Any) -> str | None:
    """The dotted path of a target given as a string or as the class or function itself; None for anything else."""
    if isinstance(target, str):
        return target or None
    name = getattr(target, "__qualname__", None)
    return f"{target.__module__}.{name}" if isinstance(name, str) else None


def is_torch_optim(target: object) -> bool:
    """Whether a dotted path names an optimizer that ships in ``torch.optim``."""
    return isinstance(target, str) and _TORCH_OPTIM.fullmatch(target) is not None


def guess(name: str) -> str | None:
    """The ``torch.optim`` class that a bare name such as ``adamw`` most likely stands for, or None."""
    return name if is_torch_optim(name) else _BY_NAME.get(name.strip().lower())


def is_of_torch(target: str | None) -> bool:
    """Whether a dotted path leads into torch, whose functions take a ``torch.dtype`` and never its name."""
    return target is not None and target.startswith("torch.")


def reads_torch_dtype(target: str) -> bool:
    """Whether a dotted path names a method that is known to read ``torch_dtype="float32"``."""
    return _loader(target) is not None


def loads_checkpoint_dtype(target: str | None) -> bool:
    """Whether a dotted path names a method that loads a checkpoint in its own dtype when none is named."""
    loader = _loader(target) if target is not None else None
    return loader is not None and loader.loads_checkpoint_dtype and str(target).endswith(".from_pretrained")


def _loader(target: str) -> Loader | None:
    parts = target.split(".")
    loader = LOADERS.get(parts[0])
    if loader is None or len(parts) < 3:
        return None
    model, method = parts[-2:]
    return loader if method in loader.methods and loader.models.fullmatch(model) else None


# Their result is what ``path`` names. The last is where hydra-zen's ``just(...)`` leads.
_GETTERS: Final = {
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.get_object",
    "hydra.utils.get_static_method",
    "hydra_zen.funcs.get_obj",
}
_FORWARDERS: Final = {"hydra_zen.funcs.zen_processing": "_zen_target"}
_WRAPPERS: Final = {
    **_FORWARDERS,
    "torch.distributed.optim.ZeroRedundancyOptimizer": "optimizer_class",
    "torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer": "optimizer_class",
}


def called(node: DictConfig) -> str | None:
    """The dotted path of what gets the node's keys as arguments; None without one."""
    path = dotted(config_tree.value(node, "_target_"))
    return dotted(config_tree.value(node, _FORWARDERS[path])) if path in _FORWARDERS else path


def built(node: DictConfig) -> str | None:
    """The dotted path of what the node's ``_target_`` really builds, getters and wrappers looked through; None without one."""
    path = dotted(config_tree.value(node, "_target_"))
    if path in _GETTERS:
        return _built_by(config_tree.value(node, "path"))
    if path in _WRAPPERS:
        return _built_by(config_tree.value(node, _WRAPPERS[path]))
    return path


def _built_by(value: Any) -> str | None:
    return built(value) if isinstance(value, DictConfig) else dotted(value)
