"""Caches that keep a tile's queries, for patterns whose queries share their choices.

A query sees what the queries of its tile up to it chose. Where a prompt comes in pieces, or tokens
are generated under the pattern, a tile may have begun behind the cache: its queries are then asked
once more together with the new ones, and the new ones' results are kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import disable
from transformers.cache_utils import DynamicCache, DynamicLayer

from sa_patch.errors import UserError
from sa_patch.kernels import Spans
from sa_patch.kernels.triton.tiles import on_device
from sa_patch.patching.cache import SPARE_TOKENS
from sa_patch.patching.mask import OUTSIDE_OF_GRAPHS, SparseMask

_LAYER = "_sa_patch_tile_queries"


class TileQueriesLayer(DynamicLayer):
    """Keys and values of one layer, and the latest queries of every row.

    Args:
        shared: queries of a tile.

    Attributes:
        queries: ``[batch, q_heads, kept, head_dim]``, the latest real ones of each row at the end;
            None before the first call.
    """

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.shared = shared
        # As many candidates of assisted decoding may be taken back as from other sparse caches.
        self._kept = shared - 1 + SPARE_TOKENS
        self._known = 0
        self.queries: Tensor | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer, shared: int) -> TileQueriesLayer:
        """The layer that goes on where a plain one stands."""
        new = cls(shared)
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
        return new

    def begin_tiles(self, q: Tensor, spans: Spans) -> tuple[Tensor, Spans, list[int]]:
        """Put the earlier queries of its first tile in front of each row, and keep the latest.

        Args:
            q: ``[batch, q_heads, nq, head_dim]``, rows padded on the right.
            spans: where they stand.

        Returns:
            The longer queries, where they stand, and how many of each row are earlier ones.

        Raises:
            UserError: if queries of a tile are not known.
        """
        earlier = [start % self.shared for start in spans.starts]
        if max(earlier) > self._known:
            raise UserError(
                f"a tile of {self.shared} queries, which share their choices, was begun before "
                "this cache was this pattern's; start with a new cache after patching, or use "
                "decode='full'"
            )
        queries = self.queries
        if queries is None or len(queries) != len(q):
            queries = q.new_zeros(*q.shape[:2], self._kept, q.shape[3])
        ends = zip(spans.lengths, spans.starts, strict=True)
        new = [max(0, min(q.shape[2], length - start)) for length, start in ends]
        # Queries that no row keeps are not copied: a prompt has far more of them.
        left_out = max(0, min(new) - self._kept)
        latest = torch.cat([queries, q[:, :, left_out : max(new)]], dim=2)
        self.queries = _columns(latest, [count - left_out for count in new], self._kept)
        self._known = min(self._kept, self._known + q.shape[2])
        if not any(earlier):
            return q, spans, earlier
        first = [self._kept - count for count in earlier]
        longer = _columns(torch.cat([queries, q], dim=2), first, max(earlier) + q.shape[2])
        begins = tuple(s - count for s, count in zip(spans.starts, earlier, strict=True))
        return longer, Spans(spans.lengths, begins), earlier

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; see `DynamicLayer.crop`."""
        removed = -tokens_to_remove
        super().crop(tokens_to_remove)
        if self.queries is not None and removed > 0:
            kept = self.queries[:, :, : max(0, self._kept - removed)]
            self.queries = torch.nn.functional.pad(kept, (0, 0, self._kept - kept.shape[2], 0))
            self._known = max(0, self._known - removed)

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        super().reset()
        self.queries, self._known = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.queries is not None:
            self.queries = self.queries.repeat_interleave(repeats, dim=0)

    def _select(self, rows: Tensor) -> None:
        if self.queries is not None:
            self.queries = self.queries[rows.to(self.queries.device)]


class _Weakly:
    """A layer of a cache, as a module may hold it: without keeping a whole prompt's keys alive."""

    def __init__(self, layer: TileQueriesLayer | None = None) -> None:
        self._layer = None if layer is None else weakref.ref(layer)

    def __call__(self) -> TileQueriesLayer | None:
        return None if self._layer is None else self._layer()

    def __reduce__(self) -> tuple[type[_Weakly], tuple[()]]:
        # A copy of the module has no such cache.
        return _Weakly, ()


def _columns(x: Tensor, first: Sequence[int], count: int) -> Tensor:
    """So many columns of each row of ``x [batch, heads, m, head_dim]``, from a first one on.

    Beyond the last column stands the last once more, as padding. A view where all rows begin with
    the same one, and have so many.
    """
    if max(first) == min(first) and first[0] + count <= x.shape[2]:
        return x[:, :, first[0] : first[0] + count]
    begin = on_device(torch.tensor(first), x.device)[:, None]
    columns = (begin + torch.arange(count, device=x.device)).clamp(max=x.shape[2] - 1)
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def without_earlier(out: Tensor, earlier: Sequence[int], count: int) -> Tensor:
    """The results of the `count` new queries of each row."""
    return _columns(out, earlier, count) if any(earlier) else out


def tile_queries(module: nn.Module) -> TileQueriesLayer | None:
    """What an attention module's cache keeps of the current tile; None without such a cache."""
    held = module.__dict__.get(_LAYER)
    return held() if isinstance(held, _Weakly) else None


def keep_queries(module: nn.Module, query: Tensor, mask: SparseMask) -> None:
    """Let the module's cache keep queries that see everything, for tiles that later ones share.

    Args:
        query: ``[batch, q_heads, nq, head_dim]``, rotary embeddings applied.
    """
    cache = tile_queries(module)
    if cache is not None:
        packing = mask.packing()
        cache.begin_tiles(packing.pack(query, packing.query_order), packing.spans)


def forget_tile_queries(module: nn.Module) -> None:
    """Take away what `KeepTileQueries` left on a module."""
    module.__dict__.pop(_LAYER, None)


@dataclass(frozen=True)
class KeepTileQueries:
    """Forward pre-hook of an attention module: puts a `TileQueriesLayer` into its cache.

    Only plain dynamic caches are changed; behind any other one pieces must begin with a tile.
    """

    shared: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None or tile_queries(module) is not None:
            self._put(module, kwargs)

    @disable(reason=OUTSIDE_OF_GRAPHS)
    def _put(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        forget_tile_queries(module)
        cache: Any = kwargs.get("past_key_values")
        if type(cache) is not DynamicCache:
            return
        if not isinstance(kwargs.get("attention_mask"), SparseMask):
            return
        index: int = module.layer_idx  # type: ignore[assignment]
        if cache.layer_class_to_replicate is DynamicLayer:
            # As the cache itself does when its update is called.
            while len(cache.layers) <= index:
                cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if type(layer) is DynamicLayer or (
            isinstance(layer, TileQueriesLayer) and layer.shared != self.shared
        ):
            layer = TileQueriesLayer.taking_over(layer, self.shared)
            cache.layers[index] = layer
        if isinstance(layer, TileQueriesLayer):
            module.__dict__[_LAYER] = _Weakly(layer)
