"""The model's node: where its dtype key is or may be added, and how the command line spells it. One answer for all who ask."""

from __future__ import annotations

import contextlib
import inspect
import io
import pkgutil
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from precision_policy.composition import config_tree, peft, targets
from precision_policy.composition.decision import UNCHOSEN, DtypeField, ModelFacts, Rule
from precision_policy.composition.settings import SettingError, nearest_name

_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_KERNELS_OF_16_BITS = ("flash_attention_2", "flash_attention_3")


def describe(
    model: DictConfig, keys: tuple[str, ...], named: bool, overrides: Sequence[str], inspect_target: bool
) -> ModelFacts:
    """The facts about the model's node.

    Args:
        model: the node.
        keys: the dtype keys to look for; the last one is added where the target takes any.
        named: whether the user named the key (``dtype_key``).
        overrides: the job's command-line overrides, for the spelling of advice.
        inspect_target: whether the model's target may be imported to see what it takes. Without that the answer may be the
            refusal ``target_takes_no_dtype`` although the target takes one.

    Raises:
        SettingError: nothing answers to the key that the user named.
    """
    found = [config_tree.parent_and_name(model, key) for key in keys]  # a key may be nested, as in model_args.torch_dtype
    there = [_dtype_field(node, name, overrides) for node, name in found if node is not None and config_tree.has(node, name)]
    target = targets.dotted(config_tree.value(model, "_target_"))
    added, refusal = (None, None) if there else _addable(model, keys, named, inspect_target)
    return ModelFacts(
        dtypes=tuple(there) or ((added,) if added else ()),
        refusal=refusal,
        quantized=peft.quantized(model, config_tree.path_of(model)),
        loads_checkpoint_dtype=target is not None and targets.loads_checkpoint_dtype(target),
        fp16_kernels=_fp16_kernels(model),
    )


def spell(path: str, overrides: Sequence[str]) -> str:
    """The left side of the override that sets ``path``, as the job's own overrides spell it: with a + where no file has it."""
    return next((f"{plus}{path}" for plus in ("++", "+") if any(text.startswith(f"{plus}{path}=") for text in overrides)), path)


def _dtype_field(parent: DictConfig, name: str, overrides: Sequence[str]) -> DtypeField:
    path = config_tree.path_of_key(parent, name)
    override = spell(path, overrides)
    if config_tree.is_missing(parent, name):
        return DtypeField(path, override, chosen=True, note=f"{path} is ???, which Hydra will ask for, and")
    value, pointed_at = config_tree.value(parent, name), config_tree.interpolation(parent, name)
    if value is config_tree.ABSENT:
        note = f"{path} points at {pointed_at}, which is not known before the job runs, and"
        return DtypeField(path, override, chosen=True, note=note)
    if value is None or isinstance(value, (str, bool, int, float)):
        return DtypeField(path, override, value, chosen=value not in UNCHOSEN, pointed_at=pointed_at)
    return DtypeField(path, override, "a node" if OmegaConf.is_config(value) else str(value), chosen=True)


def _addable(
    model: DictConfig, keys: tuple[str, ...], named: bool, inspect_target: bool
) -> tuple[DtypeField | None, tuple[Rule, str] | None]:
    """The dtype key that can be added to a node that has none; or the rule that refuses it, and why."""
    parent, name = config_tree.parent_and_name(model, keys[-1])
    if parent is None:
        raise _nothing_answers(model, keys[-1])
    node = config_tree.path_of(parent) or "the config's root"
    if named and nearest_name(name, config_tree.keys(parent)):
        raise _nothing_answers(model, keys[-1])
    typed = config_tree.schema(parent)
    if typed is not None:
        why = f"{node} is typed as {typed.__name__}, which has no {' or '.join(keys)}, so none was added"
        return None, ("target_takes_no_dtype", why)
    if not config_tree.has(parent, "_target_"):
        if named:
            return _new_field(parent, name), None
        return None, ("no_dtype_key", f"{node} has neither a _target_ nor a dtype key, and nobody would read one that is added")
    target = targets.called(parent)
    if target is None:
        return None, ("target_takes_no_dtype", f"{node}._target_ is not known before the job runs, so no dtype key was added")
    if targets.is_factory(target):
        return _new_field(parent, name), None
    if not inspect_target:
        return None, ("target_takes_no_dtype", f"{target} was not looked at")
    taken, why_not = _takes(target, tuple(key.rpartition(".")[2] for key in keys))
    if taken is not None:
        return _new_field(parent, taken), None
    return None, ("target_takes_no_dtype", why_not)


def _new_field(parent: DictConfig, name: str) -> DtypeField:
    path = config_tree.path_of_key(parent, name)
    return DtypeField(path, f"+{path}", there=False)


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


def _takes(target: str, keys: tuple[str, ...]) -> tuple[str | None, str]:
    """Which of the dtype keys a callable takes, so that adding it cannot crash the call; or None and why not.

    Args:
        target: dotted path of the callable; it is imported.
        keys: the names to look for. The last one is the one to add to ``**kwargs``.
    """
    if target.startswith("torch."):
        return None, f"{target} takes a torch.dtype at most, not its name, so no dtype key was added"
    try:
        # Whatever the module prints while it is imported would land in the output of --cfg job.
        with contextlib.redirect_stdout(io.StringIO()):
            parameters = inspect.signature(pkgutil.resolve_name(target)).parameters.values()
    except (Exception, SystemExit) as error:  # importing runs the application's code: it may raise anything
        return None, f"{target} could not be inspected ({type(error).__name__}), so no dtype key was added"
    for parameter in parameters:
        if parameter.name in keys:
            if _takes_only_objects(parameter):
                return None, f"{target} takes a torch.dtype, not its name, so no dtype key was added"
            return parameter.name, ""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return keys[-1], ""
    return None, f"{target} takes neither {' nor '.join(keys)}, and adding one would crash it"


def _takes_only_objects(parameter: inspect.Parameter) -> bool:
    """Whether the annotation admits a ``torch.dtype`` and no string."""
    annotation = str(parameter.annotation)
    return "torch.dtype" in annotation and "str" not in annotation


def _fp16_kernels(model: DictConfig) -> str | None:
    """The attention kernels that the node or a mapping just below it asks for, where they take 16 bits alone."""
    nodes: list[Any] = [model, *(child for _, child in config_tree.children(model) if isinstance(child, DictConfig))]
    for node in nodes:
        for key in _ATTENTION_KEYS:
            value = config_tree.value(node, key) if config_tree.has(node, key) else None
            if isinstance(value, str) and value.startswith(_KERNELS_OF_16_BITS):
                return f"{config_tree.path_of_key(node, key)}={value}"
    return None
