"""The one signature that every backend shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.inputs import check_factor
from sa_patch.patterns import Pattern
from sa_patch.patterns.rivals.by_head import take_heads


def _whole(number: Any) -> int:
    """A whole number, as a sum of a mask of floats gives it too."""
    return int(number) if isinstance(number, float) and number.is_integer() else index(number)


@dataclass(frozen=True)
class Spans:
    """Where the rows of a batch lie: right-padded, with plain integers so that no kernel syncs.

    Args:
        lengths: real tokens of each row, at most the keys' n.
        starts: position of each row's first query; 0 in prefill. Queries of row b stand at
            ``starts[b] + 0 .. starts[b] + nq - 1``; those at or beyond ``lengths[b]`` are padding.
        packed_in: of packed rows, which hold several sequences, the row of each; None where row b
            holds sequence b. A packed sequence that begins in column c has the start ``-c``.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    packed_in: tuple[int, ...] | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, lengths: Tensor | None) -> Spans:
        """Of right-padded rows whose queries, if fewer than the keys, are each row's last tokens.

        Args:
            q: ``[batch, q_heads, nq, head_dim]``.
            k: ``[batch, kv_heads, n, head_dim]``.
            lengths: integers ``[batch]``; all n by default.

        Raises:
            UserError: for lengths out of range, or more queries than a row has keys.
        """
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        try:
            real = (keys,) * batch if given is None else tuple(map(_whole, given))
        except TypeError:
            real = ()
        if len(real) != batch or any(not 0 <= n <= keys for n in real):
            raise UserError(
                f"lengths must hold {batch} whole numbers from 0 to {keys} (batch and keys of k), "
                f"got {given!r}"
            )
        starts = (0,) * batch if queries == keys else tuple(n - queries for n in real)
        if batch and min(starts) < 0:
            raise UserError(
                f"{queries} queries are more than the {min(real)} keys of the shortest row; "
                "queries must be the last tokens of each row"
            )
        return cls(real, starts)

    @classmethod
    def packed(cls, rows: Sequence[Sequence[int]]) -> Spans:
        """Of rows that hold sequences one after the other.

        Args:
            rows: the lengths of each row's sequences, which add up to n in every row.
        """
        return cls(
            lengths=tuple(length for row in rows for length in row),
            starts=tuple(
                n - end for row in rows for n, end in zip(row, accumulate(row), strict=True)
            ),
            packed_in=tuple(number for number, row in enumerate(rows) for _ in row),
        )

    def sequences(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Each sequence of packed rows alone: its parts of ``[batch, heads, n, head_dim]``."""
        lengths: list[list[int]] = [[] for _ in tensors[0]]
        for number, length in zip(self.packed_in or (), self.lengths, strict=True):
            lengths[number].append(length)
        # Splitting, unlike slicing, has a backward pass that touches each row once.
        rows = zip(*(x.split(1) for x in tensors), strict=True)
        for row, parts in zip(rows, lengths, strict=True):
            yield from zip(*(x.split(parts, dim=2) for x in row), strict=True)

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """Rows that share their (length, start), and so their positions and permutations."""
        rows: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self.lengths, self.starts, strict=True)):
            rows.setdefault(key, []).append(row)
        return rows

    def padded_queries(self, query_len: int, device: torch.device) -> Tensor | None:
        """bool ``[batch, nq]``, True at padding queries; None where there are none."""
        real = [n - start for n, start in zip(self.lengths, self.starts, strict=True)]
        if min(real) >= query_len:
            return None
        return torch.arange(query_len, device=device) >= torch.tensor(real, device=device)[:, None]

    def padded_keys(self, key_len: int, device: torch.device) -> Tensor | None:
        """bool ``[batch, n]``, True at padding keys; None where there are none."""
        if min(self.lengths) >= key_len:
            return None
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(key_len, device=device) >= lengths[:, None]


def check_starts(pattern: Pattern, spans: Spans) -> None:
    """Raise `UserError` where a pattern cannot choose keys for queries that begin there."""
    shared = pattern.shared_queries
    if pattern.looks_ahead and any(spans.starts):
        raise UserError(
            f"{pattern} chooses keys by all queries of a prompt, and those before position "
            f"{max(spans.starts)} are not there; give whole prompts, and read what follows them "
            "with full attention (decode='full')"
        )
    for start in spans.starts:
        if start % shared:
            raise UserError(
                f"{pattern} shares choices in tiles of {shared} queries: the first query must "
                f"begin a tile, at a multiple of {shared}; got position {start}"
            )


def as_scored(pattern: Pattern, q: Tensor, scale: float) -> Tensor:
    """Queries for a choice by softmax weights, which scales scores by ``head_dim ** -0.5``.

    Args:
        q: ``[.., head_dim]``.
        scale: factor of the layer's scores.
    """
    factor = scale * q.shape[-1] ** 0.5
    # Other choices order scores, which a factor leaves as they are.
    return q.float() * factor if pattern.weighs_scores and abs(factor - 1) > 1e-6 else q


@dataclass(frozen=True, eq=False)
class Softmax:
    """What a model changes about the softmax of a layer.

    Args:
        softcap: every scaled score s becomes ``softcap * tanh(s / softcap)`` (Gemma 2).
        sink: ``[q_heads]``, of each head the score of one more key, whose value is zero (gpt-oss).
    """

    softcap: float | None = None
    sink: Tensor | None = None

    @classmethod
    def read(cls, q: Tensor, softcap: float | None, sink: Tensor | None) -> Softmax:
        """Of what a caller asks for; `PLAIN` where that is nothing.

        Raises:
            UserError: for a cap that is none, or not one score for each head of
                ``q [batch, q_heads, nq, head_dim]``.
        """
        softcap = None if softcap is None else check_factor("softcap", softcap)
        if not isinstance(sink, Tensor | None):
            raise UserError(f"sink must be a tensor of torch, got {type(sink).__name__}")
        if sink is not None and tuple(sink.shape) != (q.shape[1],):
            raise UserError(
                f"sink must hold one score for each of the {q.shape[1]} query heads, got the shape "
                f"{tuple(sink.shape)}"
            )
        return PLAIN if softcap is None and sink is None else cls(softcap, sink)

    def of_heads(self, heads: list[int]) -> Softmax:
        """Of some query heads alone."""
        if self.sink is None:
            return self
        return Softmax(self.softcap, take_heads(self.sink, heads, 0))

    def cap(self, scores: Tensor) -> Tensor:
        """Scaled scores under the cap."""
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap

    def share(self, out: Tensor, lse: Tensor) -> Tensor:
        """What is left to the keys beside the sink.

        Args:
            out: ``[batch, q_heads, nq, head_dim]``, attention over the keys alone.
            lse: ``[batch, q_heads, nq]``, natural log-sum-exp of their scores.
        """
        if self.sink is None:
            return out
        share = (lse - self.sink.to(lse)[:, None]).sigmoid()
        return (out * share[..., None]).to(out.dtype)


PLAIN = Softmax()
"""The softmax of most models."""


class Attend(Protocol):
    """Attention of `q` over the keys that `pattern` makes visible.

    Shapes: q ``[batch, q_heads, nq, head_dim]``, k and v ``[batch, kv_heads, n, head_dim]``,
    result as q. Inputs are finite everywhere; what is returned at padding queries is ignored.
    """

    def __call__(
        self,
        pattern: Pattern,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        spans: Spans,
        scale: float,
        softmax: Softmax = PLAIN,
    ) -> Tensor: ...


def no_other_softmax(softmax: Softmax) -> str:
    """The reason of backends that compute the plain softmax alone."""
    return "" if softmax is PLAIN else "it has neither soft caps nor learned sinks of a model's own"


def any_softmax(softmax: Softmax) -> str:
    """Of backends that compute all there are."""
    return ""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a pattern."""

    name: str
    summary: str
    supports: Callable[[Pattern, Tensor, Tensor], tuple[bool, str]]
    """``supports(pattern, q, k) -> (ok, reason)``; the reason is empty where it is able."""
    attend: Attend
    packs: Callable[[Pattern], bool] = lambda pattern: False
    """Whether `attend` takes packed rows; others are called for each of their sequences."""
    refuses: Callable[[Softmax], str] = no_other_softmax
    """Why a softmax of a model's own cannot be served; empty where it can."""
