"""Which layers are sparse, and by which pattern: one form for every way in which it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.patching.layers import (
    attention_layers,
    default_layers,
    format_layers,
    parse_layers,
)
from sa_patch.patterns import Full, Pattern, parse_pattern


@dataclass(frozen=True)
class Schedule:
    """Which layers of a model are sparse.

    Args:
        listed: the layers that take the given pattern, all others being stock; None where there
            is no such list.
        own: layers with a pattern of their own, None for stock attention, in order of the index;
            every other layer takes the given pattern. None where there is no such mapping.
    """

    listed: tuple[int, ...] | None = None
    own: tuple[tuple[int, Pattern | None], ...] | None = None

    @classmethod
    def read(cls, layers: Layers) -> Schedule:
        """From indices, text such as ``"4-35"``, or a mapping of these to patterns.

        In a mapping, None, "full" and ``Full()`` mean stock attention.

        Raises:
            UserError: if it is none of these, is empty, or names a layer twice.
        """
        if isinstance(layers, Schedule):
            return layers
        if layers is None:
            return cls()
        if isinstance(layers, Mapping):
            return cls(own=_read_mapping(layers))
        listed = tuple(sorted(parse_layers(layers)))
        if not listed:
            raise UserError("layers is empty; name at least one layer, or leave it out for all")
        return cls(listed=listed)

    @property
    def named(self) -> tuple[int, ...]:
        """The layers that are spelt out."""
        return self.listed or tuple(index for index, _ in self.own or ())

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns that layers have of their own, each once."""
        found = {pattern: None for _, pattern in self.own or () if pattern is not None}
        return tuple(found)

    def assign(self, model: PreTrainedModel, pattern: Pattern | None) -> dict[int, Pattern | None]:
        """The pattern of every attention layer of a model, None where it keeps its stock attention.

        Args:
            pattern: of the layers that are listed, or have none of their own.

        Raises:
            UserError: for a layer that the model does not have.
        """
        available = attention_layers(model)
        unknown = sorted(set(self.named) - set(available))
        if unknown:
            raise UserError(
                f"layers {unknown} are not attention layers of this model; it has "
                f"{format_layers(available)}"
            )
        patched = default_layers(model) if self.listed is None else set(self.listed)
        given = {index: pattern if index in patched else None for index in available}
        return given | dict(self.own or ())

    def to_plain(self) -> None | list[int] | dict[str, str]:
        """For JSON and YAML: null, a list of indices, or a mapping of layer texts to patterns.

        Equal schedules give equal values, and `read` takes them back.
        """
        if self.own is None:
            return None if self.listed is None else list(self.listed)
        grouped: dict[str, list[int]] = {}
        for index, pattern in self.own:
            grouped.setdefault("full" if pattern is None else str(pattern), []).append(index)
        return {format_layers(indices): text for text, indices in grouped.items()}

    def __str__(self) -> str:
        """In one line, for people; empty for the default."""
        plain = self.to_plain()
        if plain is None:
            return ""
        if isinstance(plain, list):
            return format_layers(plain)
        return "; ".join(f"{layers}: {pattern}" for layers, pattern in plain.items())


Layers = Iterable[int] | Mapping[Any, Pattern | str | None] | Schedule | str | int | None
"""The ways to write a `Schedule`: indices, text, or a mapping from them to patterns."""


def _read_mapping(
    mapping: Mapping[Any, Pattern | str | None],
) -> tuple[tuple[int, Pattern | None], ...]:
    own: dict[int, Pattern | None] = {}
    for key, value in mapping.items():
        pattern = _read_own(key, value)
        for index in parse_layers(key):
            if index in own:
                raise UserError(f"layers names layer {index} twice; give every layer one pattern")
            own[index] = pattern
    if not own:
        raise UserError("layers is empty; name at least one layer, or leave it out for all")
    return tuple(sorted(own.items(), key=lambda item: item[0]))


def _read_own(key: Any, value: Pattern | str | None) -> Pattern | None:
    if isinstance(value, str):
        value = parse_pattern(value)
    if value is not None and not isinstance(value, Pattern):
        raise UserError(
            f"layers {key!r} must be given a pattern, its text form, or full; got {value!r}"
        )
    return None if isinstance(value, Full) else value
