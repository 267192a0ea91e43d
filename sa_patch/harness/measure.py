"""What a pattern really spent: visible keys and attention FLOPs of the sequences that were run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sa_patch.patterns import Full, Pattern


@dataclass(frozen=True)
class Spent:
    """Counts for one sequence, summed over the layers of a model and averaged over heads.

    Args:
        visible: query-key pairs that entered a softmax.
        last: keys that the last query saw.
        dots: dot products spent on choosing keys.
    """

    visible: float
    last: float
    dots: float


@lru_cache(maxsize=65536)
def _spent_in_layer(pattern: Pattern, seq_len: int, layer: int, heads: int) -> Spent:
    counts = pattern.count_visible(seq_len, layer=layer, heads=heads).double().mean(0)
    dots = float(pattern.selection_dots(seq_len).sum())
    return Spent(float(counts.sum()), float(counts[-1]), dots)


class PatternMeter:
    """Counts what the prefills of a patched model see and cost.

    Visible keys are counted from the pattern itself, with the permutations that the layers really
    drew, for every sequence length that was run. Layers that keep their stock attention count as
    full attention. Tokens generated after the prefill are not counted.

    Args:
        pattern: the pattern of the sparse layers.
        sparse_layers: indices of the layers that carry it.
        all_layers: indices of all attention layers.
        heads: query heads of a layer.
        head_dim: length of a query or key, for FLOPs.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        sparse_layers: Iterable[int],
        all_layers: Iterable[int],
        heads: int,
        head_dim: int,
    ) -> None:
        self.pattern = pattern
        self._sparse = frozenset(sparse_layers)
        self._layers = tuple(all_layers)
        self._heads = heads
        self._head_dim = head_dim
        self._lengths: Counter[int] = Counter()

    def reset(self) -> None:
        """Forget all sequences counted so far."""
        self._lengths.clear()

    def add(self, lengths: Iterable[int]) -> None:
        """Count prefills of these numbers of real tokens."""
        self._lengths.update(int(n) for n in lengths if n > 0)

    def counts(self) -> dict[int, int]:
        """How many prefills of each length were counted."""
        return dict(self._lengths)

    def _spent(self, seq_len: int) -> Spent:
        visible = last = dots = 0.0
        for layer in self._layers:
            pattern = self.pattern if layer in self._sparse else Full()
            # Only a pattern that draws anew per layer and head needs counting in each of them.
            drawn = not pattern.prefix_stable
            part = _spent_in_layer(
                pattern, seq_len, layer if drawn else 0, self._heads if drawn else 1
            )
            visible, last, dots = visible + part.visible, last + part.last, dots + part.dots
        return Spent(visible, last, dots)

    def summary(self) -> dict[str, Any]:
        """The measured figures of all sequences counted since the last `reset`.

        Returns:
            ``sequences``, ``tokens``, ``prompt_lengths`` (min, mean, max, in tokens),
            ``mean_keys_per_query`` (over all queries, layers and heads), ``last_query_keys`` (mean
            over sequences, layers and heads), ``attention_flops`` and ``full_attention_flops``
            (4 * head_dim per visible pair and head, 2 * head_dim per dot product spent on
            choosing, projections not counted; summed over sequences and layers) and
            ``saturated_fraction`` (share of sequences in which the pattern was in truth dense).
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
                "saturated_fraction": None,
            }
        visible = last = dots = full = 0.0
        for n, times in sorted(self._lengths.items()):
            spent = self._spent(n)
            visible += times * spent.visible
            last += times * spent.last
            dots += times * spent.dots
            full += times * len(self._layers) * n * (n + 1) / 2
        saturated = sum(t for n, t in self._lengths.items() if self.pattern.saturated(n))
        per_dot = 2.0 * self._head_dim * self._heads
        return {
            "sequences": sequences,
            "tokens": tokens,
            "prompt_lengths": {
                "min": min(self._lengths),
                "mean": tokens / sequences,
                "max": max(self._lengths),
            },
            "mean_keys_per_query": visible / (tokens * len(self._layers)),
            "last_query_keys": last / (sequences * len(self._layers)),
            "attention_flops": per_dot * (2 * visible + dots),
            "full_attention_flops": per_dot * 2 * full,
            "saturated_fraction": saturated / sequences,
        }


def head_shape(config: Any) -> tuple[int, int]:
    """Query heads and head_dim of a model's configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, int(head_dim)


def padding_lengths(mask: torch.Tensor) -> list[int]:
    """Real tokens of each row of a padding mask ``[batch, n]``."""
    lengths: list[int] = mask.sum(1).tolist()
    return lengths
