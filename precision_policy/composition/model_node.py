"""The model's node: where its dtype key is or may be added, and how the command line spells it. One answer for all who ask."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from precision_policy.composition import config_tree, peft, targets
from precision_policy.composition.settings import SettingError, Settings, nearest_name
from precision_policy.composition.spelling import UNCHOSEN

_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_KERNELS_OF_16_BITS = ("flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class DtypeKey:
    """A dtype key of the model: one that is there, or one that can be added.

    Attributes:
        path: where it lives, dotted from the config's root.
        override: how the command line spells that path, with a ``+`` where Hydra wants one.
        value: what it holds; text for anything that is not plain.
        is_chosen: whether that is a choice: anything but null and "auto".
        is_there: whether the key is there; False for one that the policy would add.
        pointed_at: what an interpolation says between its braces, or empty.
        unreadable: why its value is not known, or empty.
        takes_no_name: why the name of a dtype cannot be written there, or empty.
    """

    path: str
    override: str
    value: str | bool | int | float | None = None
    is_chosen: bool = False
    is_there: bool = True
    pointed_at: str = ""
    unreadable: str = ""
    takes_no_name: str = ""


@dataclass(frozen=True)
class Model:
    """The model's node, as far as the table asks.

    Attributes:
        keys: the dtype keys that are there, or the one that can be added; the one to write stands first.
        no_key: where there is none, why.
        quantized: what says that the model is quantized, or None.
        loads_checkpoint_dtype: whether an unset dtype means the checkpoint's own, mostly bf16.
        kernels_of_16_bits: attention kernels that were asked for and take 16 bits alone, or None.
    """

    keys: tuple[DtypeKey, ...]
    no_key: str = ""
    quantized: str | None = None
    loads_checkpoint_dtype: bool = False
    kernels_of_16_bits: str | None = None


def describe(node: DictConfig, settings: Settings, overrides: Sequence[str]) -> Model:
    """The facts about the model's node.

    Args:
        node: the node.
        settings: those in force.
        overrides: the job's command-line overrides, for the spelling of advice.

    Raises:
        SettingError: nothing answers to the key that the user named.
    """
    keys = []
    for key in settings.keys:
        parent, name = config_tree.parent_and_name(node, key)  # a key may be nested, as in model_args.torch_dtype
        if parent is not None and config_tree.has(parent, name):
            keys.append(_present_key(parent, name, settings, overrides))
    no_key = ""
    if not keys:
        parent, name = config_tree.parent_and_name(node, settings.keys[-1])
        no_key = _why_none_can_be_added(node, parent, name, settings)
        if not no_key and parent is not None:
            path = config_tree.path_of_key(parent, name)
            keys.append(DtypeKey(path, f"+{path}", is_there=False))
    return Model(
        keys=tuple(keys),
        no_key=no_key,
        quantized=peft.quantized(node, config_tree.path_of(node)),
        loads_checkpoint_dtype=targets.loads_checkpoint_dtype(targets.called(node)),
        kernels_of_16_bits=_kernels_of_16_bits(node),
    )


def _spell(path: str, overrides: Sequence[str]) -> str:
    """The left side of the override that sets ``path``, as the job's own overrides spell it: with a + where no file has it."""
    for plus in ("++", "+"):
        if any(text.startswith(f"{plus}{path}=") for text in overrides):
            return f"{plus}{path}"
    return path


def _present_key(parent: DictConfig, name: str, settings: Settings, overrides: Sequence[str]) -> DtypeKey:
    """A dtype key that is there; what cannot be read before the job runs counts as chosen, as does what is no plain value."""
    path = config_tree.path_of_key(parent, name)
    override = _spell(path, overrides)
    takes_no_name = _why_it_takes_no_name(parent, name, settings)
    if config_tree.is_missing(parent, name):
        unreadable = f"{path} is ???, which Hydra will ask for, and"
        return DtypeKey(path, override, is_chosen=True, unreadable=unreadable, takes_no_name=takes_no_name)
    value, pointed_at = config_tree.value(parent, name), config_tree.interpolation(parent, name)
    if value is config_tree.ABSENT:
        unreadable = f"{path} points at {pointed_at}, which is not known before the job runs, and"
        return DtypeKey(path, override, is_chosen=True, unreadable=unreadable, takes_no_name=takes_no_name)
    if value is None or isinstance(value, (str, bool, int, float)):
        is_chosen = value not in UNCHOSEN
        return DtypeKey(path, override, value, is_chosen, pointed_at=pointed_at or "", takes_no_name=takes_no_name)
    told = "a node" if OmegaConf.is_config(value) else str(value)
    return DtypeKey(path, override, told, is_chosen=True, takes_no_name=takes_no_name or f"{path} holds no name")


def _why_it_takes_no_name(parent: DictConfig, name: str, settings: Settings) -> str:
    """Why the spelling of fp32 cannot be written at a key that is there; empty where it can."""
    path = config_tree.path_of_key(parent, name)
    target = targets.called(parent)
    if targets.is_of_torch(target):
        return f"{target} takes a torch.dtype at {path}, not its name"
    field = config_tree.field_type(parent, name)
    kinds = typing.get_args(field) or (field,)
    if Any not in kinds and type(settings.storage_dtype) not in kinds:
        return f"{path} is typed as {getattr(field, '__name__', field)}, which {settings.storage_dtype} is not"
    return ""


def _why_none_can_be_added(node: DictConfig, parent: DictConfig | None, name: str, settings: Settings) -> str:
    """Why no dtype key can be added to a node that has none; empty where ``parent[name]`` can be.

    Raises:
        SettingError: nothing answers to the key that the user named.
    """
    is_named = settings.dtype_key is not None
    if parent is None or (is_named and nearest_name(name, config_tree.keys(parent))):
        raise _nothing_answers(node, settings.keys[-1])
    where = config_tree.path_of(parent) or "the config's root"
    schema = config_tree.schema(parent)
    if schema is not None:
        return f"{where} is typed as {schema.__name__}, which has no {' or '.join(settings.keys)}"
    target = targets.called(parent)
    if targets.is_of_torch(target):
        return f"{where} has no dtype key, and {target} takes a torch.dtype, not its name"
    if is_named or (target is not None and targets.reads_torch_dtype(target)):
        return ""
    how = "if it reads one, name the key: precision_policy.dtype_key=NAME"
    known = "no target that is known to read one" if target is None else "its target is not known to read one"
    return f"{where} has no dtype key, and {known} ({how})"


def _nothing_answers(model: DictConfig, key: str) -> SettingError:
    """The error for a ``dtype_key`` below the model's node: where it leads nowhere, and the key that was probably meant."""
    node, parts = model, key.split(".")
    while len(parts) > 1 and isinstance(child := config_tree.value(node, parts[0]), DictConfig):
        node, parts = child, parts[1:]
    near = nearest_name(parts[0], config_tree.keys(node))
    meant = key.removesuffix(".".join(parts)) + ".".join([near or "", *parts[1:]])
    hint = f"Did you mean precision_policy.dtype_key={meant}? " if near else ""
    holds = ", ".join(config_tree.keys(node)) or "nothing"
    problem = f"{config_tree.path_of(node) or 'the config'} has no {parts[0]}"
    return SettingError("precision_policy.dtype_key", key, problem, f"{hint}It holds: {holds}.")


def _kernels_of_16_bits(model: DictConfig) -> str | None:
    """The attention kernels that the node or a mapping just below it asks for, where they take 16 bits alone."""
    nodes: list[Any] = [model, *(child for _, child in config_tree.children(model) if isinstance(child, DictConfig))]
    for node in nodes:
        for key in _ATTENTION_KEYS:
            value = config_tree.value(node, key) if config_tree.has(node, key) else None
            if isinstance(value, str) and value.startswith(_KERNELS_OF_16_BITS):
                return f"{config_tree.path_of_key(node, key)}={value}"
    return None
