"""torch's own step, with fp32 leaves in the place of bf16 parameters.

The application's parameter groups and its state stay as they are: the optimizer is given others for the time of the step, and
gets its own back whatever happens. What the step made is written only when all of it is there. So an operation that raises, as
when memory runs out, leaves each parameter with the whole step or with none of it. A signal that raises, such as Ctrl-C, may do
so when a fused kernel is done: then the states of that step are there, and its weights are not.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # what DistributedDataParallel's users have of it
from torch.optim import Optimizer

from precision_policy.estimate import parameters
from precision_policy.job.pieces import LOW_BITS, WHOLE, Member, Piece
from precision_policy.job.torch_states import Kind

# A parameter's state: its entries by name.
Entry = dict[Any, Any]
Step = Callable[..., Any]


def step_rest(optimizer: Optimizer, step: Step, rest: Sequence[Sequence[torch.Tensor]]) -> None:
    """Let torch step the parameters that get no master weights; ``rest`` has those of each group."""
    groups = []
    for group, params in zip(optimizer.param_groups, rest, strict=True):
        if params:
            groups.append({**group, "params": list(params)})
    with _standing_in(optimizer, groups, optimizer.state):
        step(optimizer)


def step_piece(optimizer: Optimizer, step: Step, kind: Kind, piece: Piece) -> None:
    """Step the members of a piece, which are whole parameters."""
    entries = _ready_entries(optimizer, kind, piece)
    if entries is not None and piece.are_small and _can_be_one(optimizer, kind, piece):
        _step_as_one(optimizer, step, kind, piece, entries)
        return
    groups = [{**optimizer.param_groups[number], "params": leaves} for number, leaves in piece.leaves_by_group().items()]
    is_ready = entries is not None
    if entries is not None:
        lows = owns = [entry[LOW_BITS] for entry in entries]
    else:
        entries = [entry_for_leaf(optimizer, member, kind) for member in piece.members]
        lows, owns = _kept_of_all(optimizer, piece.members)
    state = defaultdict(dict, zip(piece.leaves, entries, strict=True))
    with _undone_on_failure(_changed_by_step(groups, kind, entries)):
        _make_step(optimizer, step, [piece], groups, state, lows, owns)
    failure = _write([piece], owns)
    if not is_ready:
        for member, entry, own in zip(piece.members, entries, owns, strict=True):
            put_back(optimizer, member, kind, entry, own)
    if failure is not None:
        raise failure


def _can_be_one(optimizer: Optimizer, kind: Kind, piece: Piece) -> bool:
    """Whether several parameters can be stepped as one tensor, bit for bit: they keep no number each, such as ``step``.

    A fused step on a CPU rounds the last few elements of a tensor in another way than the others.
    """
    if kind.stateless_without is None or any(member.times > 1 for member in piece.members):
        return False
    return not any(optimizer.param_groups[number].get("fused") for number in piece.spans_by_group)


def _step_as_one(optimizer: Optimizer, step: Step, kind: Kind, piece: Piece, entries: Sequence[Entry]) -> None:
    """Step small members as one tensor, since torch takes as long over a small tensor as over a large one."""
    (name,) = kind.states  # what is stepped as one has one state, or none
    lows = [entry[LOW_BITS] for entry in entries]
    values = [entry.get(name) for entry in entries]
    states = [value for value in values if value is not None]
    groups = []
    flat_states: defaultdict[Any, Entry] = defaultdict(dict)
    for number, span in piece.spans_by_group.items():
        leaf = piece.flat_leaf(span)
        groups.append({**optimizer.param_groups[number], "params": [leaf]})
        if states:
            flat_states[leaf] = {name: piece.flat_state(span)}
    if states:
        torch._foreach_copy_(piece.state_views, states)
    _make_step(optimizer, step, [piece], groups, flat_states, lows, lows)
    failure = _write([piece], lows, states)
    if failure is not None:
        raise failure


def step_parts(optimizer: Optimizer, step: Step, kind: Kind, parts: Sequence[Piece]) -> None:
    """Step a parameter that is larger than a piece, one part after the other, as if it were stepped once."""
    member = parts[0].members[0]
    group = optimizer.param_groups[member.group]
    entry = entry_for_leaf(optimizer, member, kind)
    lows, owns = _kept_of_all(optimizer, [member])
    made: Entry = {}

    def step_part(part: Piece) -> BaseException | None:
        # The last part takes the single numbers, such as `step`; those before it take copies of them, as they all count.
        own = _entry_of_part(part, kind, entry, copies_numbers=part is not parts[-1])
        groups = [{**group, "params": part.leaves * member.times}]
        with _undone_on_failure(_changed_by_step(groups, kind, [own])):
            _make_step(optimizer, step, [part], groups, defaultdict(dict, {part.leaves[0]: own}), lows, owns)
            for name in kind.states:
                if torch.is_tensor(own.get(name)) and name not in entry:
                    if name not in made:
                        made[name] = member.new(torch.float32)
                    part.of(made[name]).copy_(own[name])
        if part is parts[-1]:
            made.update({name: value for name, value in own.items() if name not in kind.states})
        return _write([part], owns)

    failure: BaseException | None = None
    for part in parts:
        try:
            failure = step_part(part) or failure
        except BaseException as error:
            # The parts before this one have made the step. So this one and the rest make it as well, if they can, before the
            # application hears of it.
            if part is parts[0] or failure is not None:
                raise
            failure = error
            step_part(part)
    put_back(optimizer, member, kind, {**entry, **made}, owns[0])
    if failure is not None:
        raise failure


def step_all(optimizer: Optimizer, step: Step, kind: Kind, pieces: Sequence[Piece]) -> None:
    """Step all parameters in one call, those without master weights too.

    What a class of the application's own writes into the groups and the state meanwhile is taken over.
    """
    members = [member for piece in pieces for member in piece.members]
    leaves = [leaf for piece in pieces for leaf in piece.leaves]
    leaf_of = {id(member.param): leaf for member, leaf in zip(members, leaves, strict=True)}
    groups = []
    for group in optimizer.param_groups:
        params = [leaf_of.get(id(param), param) for param in group["params"]]
        groups.append({**group, "params": params})
    entries = [entry_for_leaf(optimizer, member, kind) for member in members]
    state: defaultdict[Any, Any] = defaultdict(dict, optimizer.state)
    for member in members:
        state.pop(member.param, None)
    others = set(state)
    state.update(zip(leaves, entries, strict=True))
    lows, owns = _kept_of_all(optimizer, members)
    with _undone_on_failure(_changed_by_step(groups, kind, entries)):
        _make_step(optimizer, step, pieces, groups, state, lows, owns)
    failure = _write(pieces, owns)
    for member, leaf, own in zip(members, leaves, owns, strict=True):
        put_back(optimizer, member, kind, state.pop(leaf, {}), own)
    for key in others - set(state):
        optimizer.state.pop(key, None)
    optimizer.state.update(state)
    for group, its in zip(optimizer.param_groups, groups, strict=True):
        del its["params"]
        group.update(its)
    if failure is not None:
        raise failure


def _make_step(
    optimizer: Optimizer,
    step: Step,
    pieces: Sequence[Piece],
    groups: list[Entry],
    state: Any,
    lows: Sequence[torch.Tensor | None],
    owns: Sequence[torch.Tensor],
) -> None:
    """Everything but writing: what the application sees is as it was, but for states, which torch changes in place."""
    start = 0
    for piece in pieces:
        piece.join(lows[start : start + len(piece.members)])
        piece.take_grads()
        start += len(piece.members)
    with _standing_in(optimizer, groups, state):
        step(optimizer)
    start = 0
    for piece in pieces:
        piece.prepare_write(owns[start : start + len(piece.members)])
        start += len(piece.members)


def _write(pieces: Sequence[Piece], owns: Sequence[torch.Tensor], states: Sequence[torch.Tensor] = ()) -> BaseException | None:
    """Write what was made, all of it: where an exception comes in between, once more from the start. Nothing here needs memory.

    Returns:
        The exception, for the caller to raise when the states are put back as well.
    """
    try:
        _write_once(pieces, owns, states)
    except BaseException as failure:
        _write_once(pieces, owns, states)
        return failure
    return None


def _write_once(pieces: Sequence[Piece], owns: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> None:
    start = 0
    for piece in pieces:
        piece.round_off()
        piece.write(owns[start : start + len(piece.members)])
        start += len(piece.members)
    if states:
        (piece,) = pieces  # states are written of a single piece, that was stepped as one tensor
        torch._foreach_copy_(list(states), piece.state_views)


@contextlib.contextmanager
def _standing_in(optimizer: Optimizer, groups: list[Entry], state: Any) -> Iterator[None]:
    """Let an optimizer have other parameter groups and another state."""
    before = optimizer.param_groups, optimizer.state
    try:
        optimizer.param_groups, optimizer.state = groups, state
        yield
    finally:
        optimizer.param_groups, optimizer.state = before


@contextlib.contextmanager
def _undone_on_failure(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Give tensors their values back where something raises."""
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    # One call and one piece of memory for all of them: ten thousand clones would take longer than the step.
    copies = [(present, _flat_copy(present)) for present in alike.values()]
    try:
        yield
    except BaseException:
        for present, copied in copies:
            before = _unflatten_dense_tensors(copied, present)  # type: ignore[no-untyped-call]  # torch gives it no types
            torch._foreach_copy_(present, list(before))
        raise


def _flat_copy(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The elements of tensors in one new tensor."""
    if len(tensors) == 1:  # the flat form of a single one may be itself
        return tensors[0].flatten().clone()
    flat: torch.Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]  # as above
    return flat


def _changed_by_step(groups: Sequence[Entry], kind: Kind, entries: Sequence[Entry]) -> list[torch.Tensor]:
    """The states that a step which raises may leave changed."""
    names = ("step", *kind.numbers)
    # A fused step adds 1 to `step` first; then it is a single kernel for the tensors of a group.
    is_one_kernel = kind.by_tensor and len(groups) == 1 and groups[0].get("fused")
    if not is_one_kernel:
        names += kind.states
    if not kind.is_known:
        names = tuple({name for entry in entries for name in entry})
    changed = []
    for name in names:
        values = [entry[name] for entry in entries if name in entry]
        changed += [parameters.local(value) for value in values if isinstance(value, torch.Tensor)]
    return [tensor for tensor in changed if tensor.is_floating_point()]


def _ready_entries(optimizer: Optimizer, kind: Kind, piece: Piece) -> list[Entry] | None:
    """The parameters' own states, where leaves can have these, because all is there that the step needs, as it needs it.

    Then torch changes nothing but the values of tensors. So it is at nearly every step, and with ten thousand parameters it
    takes as long to copy the dicts of their states as to step them.
    """
    if not kind.elementwise or not piece.is_plain:
        return None
    state = optimizer.state
    entries = [state.get(member.param) for member in piece.members]
    if None in entries:
        return None
    present: list[Any] = entries
    if not piece.has_layout([entry.get(LOW_BITS) for entry in present], torch.bfloat16):
        return None
    is_stateless = True
    for name in kind.states:
        values = [entry.get(name) for entry in present]
        if all(value is None for value in values):
            continue
        is_stateless = False
        if not piece.has_layout(values, torch.float32):
            return None
    if is_stateless:
        # Ready only if this step makes no state either: SGD without momentum.
        setting = kind.stateless_without
        if setting is None or any(optimizer.param_groups[number][setting] for number in piece.spans_by_group):
            return None
    return present


def entry_for_leaf(optimizer: Optimizer, member: Member, kind: Kind) -> Entry:
    """A parameter's state as its leaf has it: in fp32, and this rank's part alone where each element is stepped by itself."""
    entry = dict(optimizer.state.get(member.param, ()))
    entry.pop(LOW_BITS, None)
    entry.pop(WHOLE, None)
    names = kind.states if kind.is_known else tuple(entry)
    for name in (*names, *kind.numbers):
        value: Any = entry.get(name)
        if not kind.makes(name, value):
            continue
        if name == "sum" and value.dtype is torch.bfloat16 and float(entry["step"]) == 0:
            # Adagrad's constructor has filled it, with a number that bf16 may have rounded.
            start = optimizer.param_groups[member.group]["initial_accumulator_value"]
            value = torch.full_like(value, start, dtype=torch.float32)
        if kind.elementwise and name in kind.states:
            value = parameters.local(value)
            if value.shape == member.shape:
                value = member.lay(value, torch.float32)
        elif value.dtype is torch.bfloat16:
            value = value.float()
        entry[name] = value
    return entry


def _entry_of_part(part: Piece, kind: Kind, entry: Entry, copies_numbers: bool) -> Entry:
    """The state of a part of a parameter, in the memory of the whole one's."""
    own = dict(entry)
    for name, value in entry.items():
        if not torch.is_tensor(value):
            continue
        if name in kind.states:
            own[name] = part.of(value)
        elif copies_numbers:
            own[name] = value.clone()
    return own


def low_and_whole(optimizer: Optimizer, member: Member) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The low bits of a member and its whole fp32 copy, if its state has some that fit; of a whole copy the low bits too."""
    entry = optimizer.state.get(member.param, {})
    low = _fitting(entry.get(LOW_BITS), member, torch.bfloat16)
    whole = _fitting(entry.get(WHOLE), member, torch.float32)
    if low is None and whole is not None:
        low = whole.view(torch.int32).to(torch.int16).view(torch.bfloat16)
    return low, whole


def kept_of(optimizer: Optimizer, member: Member) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What a member is joined with, and where to write what is kept of it: new memory where its state has none that fits."""
    low, whole = low_and_whole(optimizer, member)
    if not member.keeps_whole:
        return low, low if low is not None else member.new(torch.bfloat16)
    return low, whole if whole is not None else member.new(torch.float32)


def _kept_of_all(optimizer: Optimizer, members: Sequence[Member]) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    """What :func:`kept_of` tells of each member, in two lists."""
    lows = []
    owns = []
    for member in members:
        low, own = kept_of(optimizer, member)
        lows.append(low)
        owns.append(own)
    return lows, owns


def _fitting(value: Any, member: Member, dtype: torch.dtype) -> torch.Tensor | None:
    """This rank's part of what was kept; None where it belongs to a parameter of another shape, or was cast."""
    if not torch.is_tensor(value):
        return None
    value = parameters.local(value)
    if value.shape != member.shape or value.dtype is not dtype:
        return None
    return member.lay(value, dtype)


def put_back(optimizer: Optimizer, member: Member, kind: Kind, made: Entry, own: torch.Tensor) -> None:
    """Make what the step made the parameter's state."""
    entry = optimizer.state.get(member.param)
    if entry is None:
        entry = optimizer.state[member.param] = {}
    name, other = (WHOLE, LOW_BITS) if member.keeps_whole else (LOW_BITS, WHOLE)
    if not member.is_shard:
        entry.update(made)
        entry[name] = own
        entry.pop(other, None)
        return
    for key, value in {**made, name: own}.items():
        present: Any = entry.get(key)
        if parameters.local(present) is value:
            continue
        is_part = key == name or (kind.elementwise and key in kind.states and torch.is_tensor(value))
        entry[key] = member.wrap(value) if is_part else value
    entry.pop(other, None)
