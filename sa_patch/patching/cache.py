"""Caches that drop what no later query will see.

A pattern of bounded reach shows a query the first tokens and the nearest ones, whatever lies
between. With ``decode="pattern"`` the cache of such a layer holds no more than these, and what was
in between is cut out: on the sequence that is left the same pattern sees the same keys, because
sinks keep their positions and distances among the nearest tokens stay. Rotary embeddings are in
the keys already. Where later layers take a layer's keys, more are kept: what any of them reaches.

Other layers of the model see a cache of the full length: the layers here report the length that
they would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import disable
from transformers.cache_utils import DynamicCache, DynamicLayer

from sa_patch.errors import UserError
from sa_patch.patching.mask import OUTSIDE_OF_GRAPHS, SparseMask

SPARE_TOKENS = 32
"""Tokens kept beyond the window, so that assisted decoding can take back as many candidates."""


class ReachLayer(DynamicLayer):
    """Keys and values of one layer: those of the first and of the latest tokens.

    Rows that are padded on the left drop nothing before the shortest row has something to drop.
    Where real tokens do not stand together at the right end, nothing is ever dropped.

    Args:
        sinks: first real tokens of every row to keep.
        window: latest tokens that a query may see, its own among them.

    Attributes:
        dropped: columns that are no longer held.
    """

    def __init__(self, sinks: int, window: int) -> None:
        super().__init__()
        self.sinks, self.window = sinks, window
        self.dropped = 0
        self._keeps_all = False
        # Columns of padding before the first token of each row, [batch]; None without any.
        self._padding: Tensor | None = None
        self._announced = False

    @property
    def _local_keys(self) -> int:
        """Latest tokens that the next query may see."""
        return max(self.window - 1, 0)

    @classmethod
    def taking_over(cls, layer: DynamicLayer, sinks: int, window: int) -> ReachLayer:
        """The layer that goes on where a plain one stands."""
        new = cls(sinks, window)
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
        return new

    def announce(self, sinks: int, window: int, mask: SparseMask) -> None:
        """Say what the next `update` is for; once something was dropped, none goes without.

        Raises:
            UserError: if it needs keys that were dropped.
        """
        aligned, padding = mask.left_padding()
        if not self.dropped:
            self.sinks, self.window, self._padding = sinks, window, padding
            self._keeps_all |= not aligned
        elif (sinks, window) != (self.sinks, self.window):
            raise UserError(
                "this cache has dropped keys that another pattern of this layer did not need; "
                "start with a new cache after patching"
            )
        elif not aligned or not _same(padding, self._padding):
            raise UserError(
                "this cache has dropped keys by the padding of its first tokens, and the "
                "attention_mask now shows another; only append ones to it, or use decode='full'"
            )
        self._announced = True

    # What is dropped depends on lengths and padding, as attention does: not for compiled graphs.
    @disable(reason=OUTSIDE_OF_GRAPHS)
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, return what is held and the new, and drop what no later query will see.

        Raises:
            UserError: if keys were dropped, and the model is no longer patched as it was then.
        """
        if self.dropped and not self._announced:
            raise UserError(
                "this cache has dropped keys under decode='pattern', which the model as it is now "
                "would see; start with a new cache"
            )
        self._announced = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        latest = self._local_keys + SPARE_TOKENS
        surplus = keys.shape[2] - self.sinks - latest
        padded = 0 if self.dropped or self._padding is None else int(self._padding.max())
        if surplus > padded and not self._keeps_all:
            self.keys, self.values = self._kept(keys, latest), self._kept(values, latest)
            self.dropped += surplus
        return keys, values

    def _kept(self, x: Tensor, latest: int) -> Tensor:
        """The sinks of every row and the latest columns of ``x [batch, kv_heads, n, head_dim]``."""
        latest_keys = x[:, :, x.shape[2] - latest :]
        if self._padding is None or self.dropped:
            return torch.cat([x[:, :, : self.sinks], latest_keys], dim=2)
        columns = self._padding.to(x.device)[:, None] + torch.arange(self.sinks, device=x.device)
        index = columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.cat([x.gather(2, index), latest_keys], dim=2)

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones counted."""
        return self.dropped + int(super().get_seq_length())

    def reset(self) -> None:
        """Forget all tokens."""
        # transformers 5.17 fills keys with zeros here, and goes on counting them.
        self.is_initialized = False
        super().reset()
        self.dropped, self._keeps_all, self._padding, self._announced = 0, False, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; see `DynamicLayer.crop`.

        Raises:
            UserError: if that would need keys that were dropped.
        """
        held = super().get_seq_length()
        if self.dropped and held + tokens_to_remove < self.sinks + self._local_keys:
            raise UserError(
                f"the cache can take back no more than {SPARE_TOKENS} tokens, because a sparse "
                "layer has dropped what lies behind its window; draft fewer tokens at a time, or "
                "use decode='full'"
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._padding is not None:
            self._padding = self._padding.repeat_interleave(repeats)

    def _select(self, rows: Tensor) -> None:
        if self._padding is not None:
            self._padding = self._padding[rows.to(self._padding.device)]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b.to(a.device))


@dataclass(frozen=True)
class DropBeyondReach:
    """Forward pre-hook of an attention module: puts a `ReachLayer` into the cache it is given.

    Only plain dynamic caches are changed; a static, quantized, sliding or foreign one keeps all.
    """

    sinks: int
    window: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None:
            self._put(module, kwargs)

    @disable(reason=OUTSIDE_OF_GRAPHS)
    def _put(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        mask = kwargs.get("attention_mask")
        if type(cache) is not DynamicCache or not isinstance(mask, SparseMask):
            return
        index: int = module.layer_idx  # type: ignore[assignment]
        if cache.layer_class_to_replicate is DynamicLayer:
            # As the cache itself does when its update is called.
            while len(cache.layers) <= index:
                cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if type(layer) is DynamicLayer:
            layer = ReachLayer.taking_over(layer, self.sinks, self.window)
            cache.layers[index] = layer
        if isinstance(layer, ReachLayer):
            layer.announce(self.sinks, self.window, mask)
