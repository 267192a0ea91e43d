"""Caches that hold keys before a patched model reads its first token, as prefix tuning fills them.

To a layer, a prompt behind such keys looks like decoding. With ``decode="full"`` it would see
everything, and the pattern would never apply; with ``decode="pattern"`` the pattern goes on over
prefix and prompt.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.compiler import disable
from transformers import DynamicCache

from sa_patch.errors import UserError
from sa_patch.patching.layers import wrappers
from sa_patch.patching.mask import OUTSIDE_OF_GRAPHS

# PEFT's adapters that put keys and values into the cache.
_PREFIX_TYPES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})

_BEGUN = "_sa_patch_begun"


def refuse_prefix_adapter(model: object, decode: str) -> None:
    """Raise `UserError` if an active adapter would keep a pattern from ever applying."""
    for wrapper in wrappers(model):
        config = getattr(wrapper, "active_peft_config", None)
        kind = str(getattr(getattr(config, "peft_type", None), "value", None))
        if decode == "full" and kind in _PREFIX_TYPES:
            raise UserError(
                f"this model's {kind} adapter puts keys into the cache before the prompt, which "
                "with decode='full' would then see all of it, without any pattern; patch with "
                "decode='pattern', by which the pattern goes on over prefix and prompt"
            )


class RefuseForeignKeys:
    """Forward pre-hook of a sparse attention module with ``decode="full"``.

    An adapter that was put around a patched model shows only here: by a cache with keys in it
    that no patched model has begun, and a prompt.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        if cache is None or getattr(cache, _BEGUN, False):
            return
        states = kwargs.get("hidden_states", args[0] if args else None)
        prompt = states is not None and states.shape[1] > 1
        # Of other caches the length is a tensor, which a graph could not ask.
        begin = _begin if type(cache) is DynamicCache else _begin_outside
        begin(cache, module.layer_idx, prompt)


def _begin(cache: Any, layer: Any, prompt: bool) -> None:
    cached = int(cache.get_seq_length(layer))
    if not cached:
        setattr(cache, _BEGUN, True)
    elif prompt:
        raise UserError(
            f"the cache holds {cached} keys from before this model was patched, or of a prefix "
            "adapter: with decode='full' a prompt behind them would see everything, without "
            "any pattern; start with a new cache, or patch with decode='pattern'"
        )


_begin_outside = disable(_begin, reason=OUTSIDE_OF_GRAPHS)
