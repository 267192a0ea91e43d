"""What a pattern really spent: visible keys and attention FLOPs of the sequences that were run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sa_patch.evaluation.metering.model_clock import ModelClock
from sa_patch.evaluation.metering.observed_keys import Observed
from sa_patch.evaluation.metering.visited_meter import VisitedMeter
from sa_patch.kernels import Spans
from sa_patch.patterns import Full, Pattern, seed_of


@dataclass(frozen=True)
class HeadShape:
    """Query heads, KV heads and head_dim of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> HeadShape:
        """The shape that a model's configuration gives its layers."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(heads, kv_heads, int(head_dim))


@dataclass(frozen=True)
class Spent:
    """Counts for sequences, summed over the layers of a model and averaged over heads.

    Args:
        visible: query-key pairs that entered a softmax.
        last: keys that the last query saw.
        dots: dot products spent on choosing keys.
    """

    visible: float = 0.0
    last: float = 0.0
    dots: float = 0.0

    def plus(self, other: Spent, times: float = 1.0) -> Spent:
        return Spent(
            self.visible + times * other.visible,
            self.last + times * other.last,
            self.dots + times * other.dots,
        )


@lru_cache(maxsize=65536)
def _counted_in_layer(pattern: Pattern, seq_len: int, layer: int, heads: int) -> Spent:
    """Visible pairs and keys of the last query, from the pattern alone."""
    counts = pattern.count_visible(seq_len, layer=layer, heads=heads).double().mean(0)
    return Spent(float(counts.sum()), float(counts[-1]))


@lru_cache(maxsize=65536)
def _chosen_in_layer(pattern: Pattern, seq_len: int, group: int) -> Spent:
    return Spent(dots=float(pattern.selection_dots(seq_len, group).sum()))


class PatternMeter:
    """Counts what the prefills of a patched model see and cost.

    Visible keys are counted from the patterns themselves, with the permutations that the layers
    really drew, for every sequence length that was run. Where that cannot be, because chosen keys
    may coincide with others, they are counted where they are chosen: the model's layers must then
    call `observe`. Layers that keep their stock attention count as that, and full attention's
    figures are the stock model's: of a layer with a sliding window of its own, of that window.
    Tokens generated after the prefill are not counted.

    Args:
        patterns: the pattern of every attention layer, None for stock attention; several where a
            layer has several softmaxes side by side (gated attention), and a key then counts in
            each that sees it.
        shape: heads of a layer.
        stock: what layers show unpatched, by default all keys.
    """

    def __init__(
        self,
        patterns: Mapping[int, Pattern | Sequence[Pattern] | None],
        shape: HeadShape,
        stock: Mapping[int, Pattern] | None = None,
    ) -> None:
        self._stock = {layer: (stock or {}).get(layer, Full()) for layer in patterns}
        self._patterns = {
            layer: tuple(own) if isinstance(own, Sequence) else (own or self._stock[layer],)
            for layer, own in patterns.items()
        }
        self._shape = shape
        self._lengths: Counter[int] = Counter()
        self._reused = 0
        self._observed = Observed()
        self._visited = self._visited_meter()
        self.clock = ModelClock()

    def _visited_meter(self) -> VisitedMeter:
        return VisitedMeter(self._patterns, self._shape.heads, self._shape.kv_heads, self._stock)

    @property
    def observed_layers(self) -> list[int]:
        """The layers that must call `observe` for a summary."""
        return [i for i, each in self._each_pattern() if each.counts_need_content]

    @property
    def sampled_layers(self) -> list[int]:
        """The layers that should call `observe`: those above, and a few for visited keys."""
        return sorted({*self.observed_layers, *self._visited.layers})

    def _each_pattern(self) -> Iterator[tuple[int, Pattern]]:
        for layer, patterns in self._patterns.items():
            for pattern in patterns:
                yield layer, pattern

    def reset(self) -> None:
        """Forget all sequences counted so far."""
        self._lengths.clear()
        self._reused = 0
        self._observed = Observed()
        self._visited = self._visited_meter()
        self.clock = ModelClock()

    def add(self, lengths: Iterable[int]) -> None:
        """Count prefills of these numbers of real tokens."""
        self._lengths.update(int(n) for n in lengths if n > 0)

    def add_reused(self, lengths: Iterable[int]) -> None:
        """Count prefills that were not run: saturated ones, whose answers were known."""
        reused = [int(n) for n in lengths]
        self.add(reused)
        self._reused += len(reused)
        for layer in self.observed_layers:
            for n in reused:
                self._observed.add_dense(layer, n)

    def saturated(self, seq_len: int) -> bool:
        """Whether every layer is what it is unpatched for a sequence of this length."""
        return all(
            pattern.saturated(seq_len)
            for layer, pattern in self._each_pattern()
            if pattern != self._stock[layer]
        )

    def observe(self, layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        """Count what the queries of one prefill see in a layer that must be observed.

        Args:
            q: ``[batch, q_heads, n, head_dim]``.
            k: ``[batch, kv_heads, n, head_dim]``.
            spans: the rows' lengths.
        """
        # Gated attention never reads content, so that an observed layer has one pattern.
        (pattern,) = self._patterns[layer]
        if pattern.counts_need_content:
            self._observed.add(pattern, layer, q, k, spans)
        self._visited.observe(layer, q, k, spans)

    def counts(self) -> dict[int, int]:
        """How many prefills of each length were counted."""
        return dict(self._lengths)

    def _spent(self, seq_len: int) -> Spent:
        """One sequence in all layers, without the visible keys of those that are observed."""
        total = Spent()
        group = self._shape.heads // self._shape.kv_heads
        for layer, pattern in self._each_pattern():
            total = total.plus(_chosen_in_layer(pattern, seq_len, group))
            if pattern.counts_need_content:
                continue
            # Only a pattern that draws anew per layer and head needs counting in each of them.
            drawn = seed_of(pattern) is not None
            place = (layer, self._shape.heads) if drawn else (0, 1)
            total = total.plus(_counted_in_layer(pattern, seq_len, *place))
        return total

    def summary(self) -> dict[str, Any]:
        """The measured figures of all sequences counted since the last `reset`.

        Returns:
            ``sequences``, ``tokens``, ``prompt_lengths`` (min, mean, max, in tokens),
            ``mean_keys_per_query`` (over all queries, layers and heads), ``last_query_keys`` (mean
            over sequences, layers and heads), ``attention_flops`` and ``full_attention_flops``
            (4 * head_dim per visible pair and head, 2 * head_dim per dot product spent on
            choosing, projections not counted; summed over sequences and layers), ``visited_keys``
            and ``full_visited_keys`` (keys that a tile of 128 rows reads in blocks of 16, 64 and
            128, of the pattern and of full attention; see `sa_patch.kernels.visited_keys`),
            ``choosing_keys`` (the part of ``visited_keys`` that is read to choose blocks),
            ``saturated_fraction`` (share of sequences in which every layer was in truth dense),
            ``reused_fraction`` (share of sequences that were not run, their answers being those
            that full attention had given) and ``model_seconds`` (wall-clock time of the model's
            calls under ``clock``, the decoding of generated tokens included).
        """
        sequences = sum(self._lengths.values())
        tokens = sum(n * times for n, times in self._lengths.items())
        if not sequences:
            return {
                "sequences": 0,
                "tokens": 0,
                "prompt_lengths": None,
                "mean_keys_per_query": None,
                "last_query_keys": None,
                "attention_flops": 0.0,
                "full_attention_flops": 0.0,
                "visited_keys": None,
                "full_visited_keys": None,
                "choosing_keys": None,
                "saturated_fraction": None,
                "reused_fraction": None,
                "model_seconds": round(self.clock.seconds, 4),
            }
        spent, full, saturated = Spent(), 0.0, 0
        for n, times in sorted(self._lengths.items()):
            spent = spent.plus(self._spent(n), times)
            stock = (_counted_in_layer(own, n, 0, 1).visible for own in self._stock.values())
            full += times * sum(stock)
            saturated += times * self.saturated(n)
        for layer in self.observed_layers:
            keys, last = self._observed.means(layer)
            # A score that choosing took is not computed again.
            scored = tokens * keys if self._patterns[layer][0].scores_all else 0.0
            spent = spent.plus(Spent(tokens * keys, sequences * last, -scored))
        per_dot = 2.0 * self._shape.head_dim * self._shape.heads
        return {
            "sequences": sequences,
            "tokens": tokens,
            "prompt_lengths": {
                "min": min(self._lengths),
                "mean": tokens / sequences,
                "max": max(self._lengths),
            },
            "mean_keys_per_query": spent.visible / (tokens * len(self._patterns)),
            "last_query_keys": spent.last / (sequences * len(self._patterns)),
            "attention_flops": per_dot * (2 * spent.visible + spent.dots),
            "full_attention_flops": per_dot * 2 * full,
            **self._visited.summary(self._lengths),
            "saturated_fraction": saturated / sequences,
            "reused_fraction": self._reused / sequences,
            "model_seconds": round(self.clock.seconds, 4),
        }


def padding_lengths(mask: torch.Tensor) -> list[int]:
    """Real tokens of each row of a padding mask ``[batch, n]``."""
    lengths: list[int] = mask.sum(1).tolist()
    return lengths
