"""Names for parts of a model: heads, attention and MLP layers, neurons, the stream, and the inputs of a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch import Tensor

from mechhier.arguments import is_whole, one_of, shown, whole_number
from mechhier.models.hooked import Hooked, SiteName

Index: TypeAlias = "tuple[slice | int, ...]"
Input: TypeAlias = Literal["q", "k", "v"]


def _check_whole(part: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(part, name, whole_number(f"{type(part).__name__}.{name}", getattr(part, name)))


@dataclass(frozen=True)
class Head:
    """One attention head; its output is z, before W_O."""

    layer: int
    head: int

    def __post_init__(self) -> None:
        _check_whole(self, "layer", "head")

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class Attention:
    """All that a layer's attention adds to the residual stream: every head and the biases."""

    layer: int

    def __post_init__(self) -> None:
        _check_whole(self, "layer")

    def __str__(self) -> str:
        return f"attn{self.layer}"


@dataclass(frozen=True)
class MLP:
    """All that a layer's MLP adds to the residual stream."""

    layer: int

    def __post_init__(self) -> None:
        _check_whole(self, "layer")

    def __str__(self) -> str:
        return f"mlp{self.layer}"


@dataclass(frozen=True)
class Neurons:
    """The neurons `start` up to, not including, `stop` of a layer's MLP: what enters its output matrix."""

    layer: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        _check_whole(self, "layer", "start", "stop")

    def __str__(self) -> str:
        return f"mlp{self.layer}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Resid:
    """The residual stream that enters a layer. It can be patched; ablating it would ablate everything before it."""

    layer: int

    def __post_init__(self) -> None:
        _check_whole(self, "layer")

    def __str__(self) -> str:
        return f"resid{self.layer}"


@dataclass(frozen=True)
class HeadInput:
    """A head's queries, keys or values, as a receiver of a path.

    With grouped queries k and v are those of the head's group, which its other heads read too.
    """

    layer: int
    head: int
    input: Input

    def __post_init__(self) -> None:
        _check_whole(self, "layer", "head")
        one_of("input", self.input, get_args(Input))

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}.{self.input}"


Component: TypeAlias = Head | Attention | MLP | Neurons
Part: TypeAlias = Component | Resid | HeadInput
Entries: TypeAlias = "Sequence[Component | tuple[Component, ...]]"
"""Components that are treated one after the other; those of a tuple at once. A pair of whole numbers is a head."""

_SITES: dict[type, SiteName] = {
    Head: "z",
    Attention: "attn_out",
    MLP: "mlp_out",
    Neurons: "mlp_post",
    Resid: "resid_pre",
}


def locate(hooked: Hooked, part: Part) -> tuple[SiteName, int, Index]:
    """Where a part of the model is: its site, its layer, and its place in the activation after batch and position."""
    if isinstance(part, HeadInput):
        # As many queries as heads; keys and values may be shared by groups of them.
        group = 1 if part.input == "q" else hooked.n_heads // hooked.n_kv_heads
        return part.input, part.layer, (part.head // group,)
    if isinstance(part, Head):
        index: Index = (part.head,)
    elif isinstance(part, Neurons):
        index = (slice(part.start, part.stop),)
    else:
        index = ()
    return _SITES[type(part)], part.layer, index


def at(index: Index) -> Index:
    """An index of `locate` with batch and position before it."""
    return (slice(None), slice(None), *index)


def read(activation: Tensor, index: Index) -> Tensor:
    """The part of an activation, [batch, pos, width]."""
    return activation[at(index)]


def grouped(entries: Any, *, accepted: tuple[type, ...], name: str = "components") -> list[tuple[Any, ...]]:
    """Entries as tuples; a single component is a tuple of one.

    A pair of whole numbers is a head wherever heads are accepted: `[(0, 0), (0, 1)]` are two heads, one after the other,
    `[((0, 0), (0, 1))]` the two together.

    Raises:
        TypeError: An entry is something else than `accepted`, or `entries` is no sequence.
        ValueError: There is no entry, or an empty one.
    """
    wanted = ", ".join(kind.__name__ for kind in accepted)
    if isinstance(entries, accepted) or _is_pair(entries, accepted):
        entries = [entries]
    expected = f"{name} must be a sequence of {wanted}, or tuples of them"
    if isinstance(entries, str | bytes | Mapping) or not isinstance(entries, Iterable) or isinstance(entries, Tensor):
        raise TypeError(f"{expected}, got {_other(entries)}; the order is (model, {name}, tokens, ...)")
    tuples: list[tuple[Any, ...]] = []
    of_array = isinstance(entries, np.ndarray)
    for given in entries.tolist() if of_array else entries:
        entry = tuple(given) if of_array and isinstance(given, list) else given
        parts = entry if isinstance(entry, tuple) and not _is_pair(entry, accepted) else (entry,)
        parts = tuple(Head(*part) if _is_pair(part, accepted) else part for part in parts)
        for part in parts:
            if not isinstance(part, accepted):
                raise TypeError(f"{expected}, got {_other(part)}{_how_to_make(accepted)}")
        if not parts:
            raise ValueError(f"an entry of {name} names no component; {expected}")
        tuples.append(parts)
    if not tuples:
        raise ValueError(f"{name}: no component was given; {expected}")
    return tuples


def _is_pair(entry: Any, accepted: tuple[type, ...]) -> bool:
    return Head in accepted and isinstance(entry, tuple) and len(entry) == 2 and all(map(is_whole, entry))


def _other(entry: Any) -> str:
    return f"the class {entry.__name__}" if isinstance(entry, type) else shown(entry)


def _how_to_make(accepted: tuple[type, ...]) -> str:
    if Head in accepted:
        return "; a head is Head(layer, head) or the pair (layer, head)"
    if HeadInput in accepted:
        return "; a head's queries are HeadInput(layer, head, 'q')"
    return "; attention to the first position is Edge(layer=0, head=0, keys=0)"


def label(parts: tuple[object, ...]) -> str:
    """`L3H5`, or `L3H5+mlp4` for several at once."""
    return "+".join(map(str, parts))


def check(hooked: Hooked, parts: Iterable[Part]) -> None:
    """Refuse what the model does not have.

    Raises:
        ValueError: A layer, a head, an MLP, neurons or a head's input that do not exist.
    """
    for part in parts:
        if not 0 <= part.layer < hooked.n_layers:
            raise ValueError(f"no {part}: the model has layers 0..{hooked.n_layers - 1}")
        if isinstance(part, Head | HeadInput) and not 0 <= part.head < hooked.n_heads:
            raise ValueError(f"no {part}: the model has heads 0..{hooked.n_heads - 1} in every layer")
        if isinstance(part, MLP | Neurons) and hooked.attn_only:
            raise ValueError(f"no {part}: the model has attention layers only")
        if isinstance(part, Neurons) and not 0 <= part.start < part.stop <= hooked.d_mlp:
            raise ValueError(f"no {part}: a range of neurons must lie in 0..{hooked.d_mlp} and not be empty")
