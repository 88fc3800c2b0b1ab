"""Reading and writing single nodes of a composed config, without ever resolving the whole of it.

Real config trees hold ``???``, resolvers that only work once the job runs, and resolvers that raise. So every function
here looks at one node, raw first, and answers instead of raising. All use of OmegaConf's private corners is here.
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


def at(root: DictConfig, path: str) -> Any:
    """The value at a dotted path, interpolations followed; ``ABSENT`` where there is none, it is ``???`` or unreadable."""
    if path == ROOT:
        return root
    try:
        return OmegaConf.select(root, path, default=ABSENT, throw_on_resolution_failure=False)
    except OmegaConfBaseException:
        return ABSENT


def nearest(root: DictConfig, path: str) -> str:
    """A clause that names the longest part of ``path`` that exists, and the keys that are there."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length])
        found = at(root, prefix)
        if isinstance(found, DictConfig):
            return f"{prefix} exists and holds: {_names(found)}"
        if found is not ABSENT:
            return f"{prefix} exists but is no mapping"
    return f"the config holds at its top: {_names(root)}"


def _names(node: DictConfig) -> str:
    return ", ".join(k for k in keys(node) if k not in ("hydra", "precision_policy")) or "nothing"


def keys(node: DictConfig) -> list[str]:
    """The keys of a mapping, none of its values touched."""
    return [str(k) for k in node]


def has(node: DictConfig, key: str) -> bool:
    """Whether the key is there, whatever it holds (``in`` would answer no for ``???`` and resolve interpolations)."""
    return key in keys(node)


def is_missing(node: DictConfig, key: str) -> bool:
    """Whether the value is ``???``."""
    return OmegaConf.is_missing(node, key)


def leads_somewhere(root: DictConfig, path: str) -> bool:
    """Whether the path exists, whatever it holds: null, ``???`` and unreadable values included."""
    above, _, name = path.rpartition(".")
    parent = at(root, above) if above else root
    return has(parent, name) if isinstance(parent, DictConfig) else at(root, path) is not ABSENT


def plain(node: DictConfig, key: str) -> Any:
    """The value at one key as it stands, interpolations as text; None where there is none."""
    child = node._get_node(key, validate_access=False)  # no public call gives an interpolation unresolved
    return child._value() if child is not None and not isinstance(child, list) else None


def pointer(node: DictConfig, key: str) -> str | None:
    """What an interpolation says between its braces, or None for a plain value."""
    if not OmegaConf.is_interpolation(node, key):
        return None
    raw = str(plain(node, key))
    return raw[2:-1] if raw.startswith("${") and raw.endswith("}") else raw


def value(node: DictConfig | ListConfig, key: str | int) -> Any:
    """The value at one key or index, its interpolation resolved; ``ABSENT`` for ``???`` and what cannot be resolved now."""
    try:
        return ABSENT if OmegaConf.is_missing(node, key) else node[key]  # type: ignore[index]  # an index goes with a list
    except Exception:  # a resolver is the application's code: it may raise anything
        return ABSENT


def key(node: DictConfig, name: str) -> str:
    """The dotted path of a key of a node, from where the node really lives, which an interpolation may hide."""
    path = str(node._get_full_key(name))  # no public call gives a node's own path
    return path.replace("[", ".").replace("]", "")  # a list's index, as overrides spell it


def full_path(node: DictConfig) -> str:
    """The dotted path of a node; empty for the root."""
    return key(node, "_").rpartition(".")[0]


def schema(node: DictConfig) -> type | None:
    """The dataclass behind a typed node, or None for an open mapping."""
    kind = OmegaConf.get_type(node)
    return None if kind is None or kind is dict or issubclass(kind, dict) else kind


def write(node: DictConfig, key: str, new: Any) -> None:
    """Set one key, on struct and read-only nodes too, and leave the node's flags as they were.

    Raises:
        OmegaConfBaseException: a typed field refuses the value.
    """
    with flag_override(node, ["readonly", "struct"], [False, False]):
        node[key] = new


def put(root: DictConfig, key: str, values: Mapping[str, Any]) -> None:
    """Put a mapping of plain values, or of such mappings, at one key of the root, whatever was there.

    Built node by node: OmegaConf's own way looks at each value as if a user had given it, and takes three times as long.
    """
    root.__dict__["_content"][key] = _mapping(values, key, root)


def _mapping(values: Mapping[str, Any], key: str, parent: DictConfig) -> DictConfig:
    node = DictConfig({}, key=key, parent=parent)
    content = node.__dict__["_content"]
    for name, value in values.items():
        if isinstance(value, Mapping):
            content[name] = _mapping(value, name, node)
        else:
            content[name] = AnyNode(value, key=name, parent=node)
    return node


def walk(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every mapping below (and with) ``node``, with its dotted path; interpolations are not followed."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return
    if node._is_none() or node._is_missing() or node._is_interpolation():  # there is nothing in it to look at
        return
    if isinstance(node, DictConfig):
        yield path, node
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        yield from walk(node._get_node(key), f"{path}.{key}" if path else str(key))
