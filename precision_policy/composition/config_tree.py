"""Reading and writing single nodes of a composed config, without ever resolving the whole of it.

Real configs hold ``???``, resolvers that only work once the job runs, and resolvers that raise. So every function here looks
at one node, raw first, and answers instead of raising. All use of OmegaConf's private corners is in this module, but for what
``hydra_hook.py`` asks of the node that it is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

ABSENT: Final = object()
"""Nothing is there, or it cannot be read before the job runs."""

ROOT: Final = "."
"""The path of the config itself, for applications that keep everything flat at the top."""

NOT_THE_JOBS: Final = frozenset({"hydra", "precision_policy"})
"""Nodes at the root that say nothing about the application's own job."""


def select(root: DictConfig, path: str) -> Any:
    """The value at a dotted path, interpolations followed; ``ABSENT`` where there is none, it is ``???`` or unreadable."""
    if path == ROOT:
        return root
    try:
        return OmegaConf.select(root, path, default=ABSENT, throw_on_resolution_failure=False)
    except OmegaConfBaseException:
        return ABSENT


def parent_and_name(root: DictConfig, path: str) -> tuple[DictConfig | None, str]:
    """The mapping that holds a dotted path's last part, or None where there is no mapping; and that last part."""
    above, _, name = path.rpartition(".")
    parent = select(root, above) if above else root
    return (parent if isinstance(parent, DictConfig) else None), name


def keys(node: DictConfig) -> list[str]:
    """The keys of a mapping. None of its values is touched."""
    return [str(k) for k in node]


def has(node: DictConfig, key: str) -> bool:
    """Whether the key is there, whatever it holds (``in`` would answer no for ``???`` and resolve interpolations)."""
    return key in keys(node)


def is_missing(node: DictConfig, key: str) -> bool:
    """Whether the value is ``???``."""
    return OmegaConf.is_missing(node, key)


def exists(root: DictConfig, path: str) -> bool:
    """Whether the path is there, whatever it holds: null, ``???`` and unreadable values included."""
    parent, name = parent_and_name(root, path)
    return has(parent, name) if parent is not None else select(root, path) is not ABSENT


def raw_value(node: DictConfig, key: str) -> Any:
    """The value at one key as it stands, interpolations as text; None where there is none."""
    child = node._get_node(key, validate_access=False)  # no public call gives an interpolation unresolved
    return child._value() if child is not None and not isinstance(child, list) else None


def interpolation(node: DictConfig, key: str) -> str | None:
    """What an interpolation says between its braces, or None for a plain value."""
    if not OmegaConf.is_interpolation(node, key):
        return None
    raw = str(raw_value(node, key))
    return raw[2:-1] if raw.startswith("${") and raw.endswith("}") else raw


def value(node: DictConfig | ListConfig, key: str | int) -> Any:
    """The value at one key or index, its interpolation resolved; ``ABSENT`` for ``???`` and what cannot be resolved now."""
    try:
        return ABSENT if OmegaConf.is_missing(node, key) else node[key]  # type: ignore[index]  # an index goes with a list
    except Exception:  # a resolver is the application's code: it may raise anything
        return ABSENT


def path_of_key(node: DictConfig, name: str) -> str:
    """The dotted path of a key of a node, from where the node really lives, which an interpolation may hide."""
    path = str(node._get_full_key(name))  # no public call gives a node's own path
    return path.replace("[", ".").replace("]", "")  # a list's index, as overrides spell it


def path_of(node: DictConfig) -> str:
    """The dotted path of a node; empty for the root."""
    return path_of_key(node, "_").rpartition(".")[0]


def schema(node: DictConfig) -> type | None:
    """The dataclass behind a typed node, or None for an open mapping."""
    kind = OmegaConf.get_type(node)
    return None if kind is None or kind is dict or issubclass(kind, dict) else kind


def field_type(node: DictConfig, key: str) -> Any:
    """The type that a typed node gives to a key; ``Any`` where it gives none."""
    child = node._get_node(key, validate_access=False)  # no public call tells the type of a field that holds null
    return Any if child is None or isinstance(child, list) else child._metadata.ref_type


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """The keys or indices of a mapping or list with their nodes, raw; nothing for null, ``???`` and interpolations."""
    content = node.__dict__["_content"]  # no public call reads children without a look at each one's value
    if isinstance(content, dict):
        for key, child in content.items():
            yield str(key), child
    elif isinstance(content, list):
        for index, child in enumerate(content):
            yield str(index), child


def mappings(root: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Every mapping of the application's own config with its dotted path, the root first; interpolations are not followed."""

    def below(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
        if isinstance(node, DictConfig) and isinstance(node.__dict__["_content"], dict):
            yield path, node
        for key, child in children(node):
            if isinstance(child, (DictConfig, ListConfig)) and (path or key not in NOT_THE_JOBS):
                yield from below(child, f"{path}.{key}" if path else key)

    return below(root, "")


def all_paths(root: DictConfig) -> list[str]:
    """The dotted path of everything in the application's own config."""
    paths = []
    for path, node in mappings(root):
        for key, _ in children(node):
            paths.append(f"{path}.{key}" if path else key)
    return paths


def write(node: DictConfig, key: str, new: Any) -> None:
    """Set one key, on struct and read-only nodes too, and leave the node's flags as they were.

    Raises:
        OmegaConfBaseException: a typed field refuses the value.
    """
    with flag_override(node, ["readonly", "struct"], [False, False]):
        node[key] = new


def record(parent: DictConfig, key: str, values: Mapping[str, Any]) -> None:
    """Put a mapping of plain values, or of such mappings, at one key, whatever was there and whatever the node's type.

    Built node by node: OmegaConf's own way looks at each value as if a user had given it, and takes three times as long.
    """
    parent.__dict__["_content"][key] = _mapping(values, key, parent)


def _mapping(values: Mapping[str, Any], key: str, parent: DictConfig) -> DictConfig:
    node = DictConfig({}, key=key, parent=parent)
    content = node.__dict__["_content"]
    for name, item in values.items():
        content[name] = _mapping(item, name, node) if isinstance(item, Mapping) else AnyNode(item, key=name, parent=node)
    return node
