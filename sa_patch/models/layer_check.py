"""Whether a model has the layers and the context asked for, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sa_patch.errors import UserError
from sa_patch.models.converted import find_copy
from sa_patch.models.embedded import ModelSource
from sa_patch.patching import format_layers
from sa_patch.patching.layers import full_layers, own_windows
from sa_patch.patterns import SWA


def check_layers(source: ModelSource, layers: Iterable[int] | None) -> None:
    """Refuse layers beyond a model's last one before its weights are loaded.

    A configuration that cannot be read is left to the loader, which says why.

    Raises:
        UserError: for an index that the model does not have.
    """
    named = list(layers or ())
    if not named:
        return
    count = layer_count(source)
    unknown = sorted(index for index in named if count is not None and index >= count)
    if unknown:
        raise UserError(
            f"layers {unknown} are not attention layers of this model; it has "
            f"{format_layers(range(count or 0))}"
        )


def check_context(source: ModelSource, tokens: int) -> None:
    """Refuse more tokens than a model was made for before its weights are loaded.

    Raises:
        UserError: if its configuration says that it takes fewer.
    """
    context = _setting(source, "max_position_embeddings")
    if context is not None and tokens > context:
        raise UserError(f"--n {tokens} is more than the model's context of {context} tokens")


def check_own_windows(source: ModelSource, layers: Iterable[int], tokens: int) -> None:
    """Refuse layers whose own window is shorter than a sequence before weights are loaded.

    Args:
        layers: those asked for; none at all stand for the usual ones (`usual_layers`).

    Raises:
        UserError: naming those layers and the window.
    """
    windows = own_windows(_config(source))
    asked = windows.keys() & (set(layers) or usual_layers(source))
    short = sorted(index for index in asked if not windows[index].saturated(tokens))
    if not short:
        return
    first = windows[short[0]]
    does = "slide a window" if isinstance(first, SWA) else "attend within chunks"
    others = len(windows) < (layer_count(source) or 0)
    raise UserError(
        f"layers {format_layers(short)} {does} of {first.effective_window} tokens of the model's "
        f"own, shorter than --n {tokens}; "
        + ("leave them out of --layers, or give a smaller --n" if others else "give a smaller --n")
    )


def check_place(source: ModelSource, layer: int, head: int) -> None:
    """Refuse a layer or query head that a model does not have before its weights are loaded.

    A configuration that cannot be read is left to the loader, which says why.

    Raises:
        UserError: which layers or heads it has.
    """
    for name, value, count in (
        ("layer", layer, layer_count(source)),
        ("head", head, _setting(source, "num_attention_heads")),
    ):
        if count is not None and not 0 <= value < count:
            raise UserError(f"--{name} must be from 0 to {count - 1} for this model, got {value}")


def layer_count(source: ModelSource) -> int | None:
    """Layers of a model by its configuration; None where that cannot be read."""
    return _setting(source, "num_hidden_layers")


def queries_per_key(source: ModelSource) -> int | None:
    """Query heads that share a KV head; None where the configuration cannot be read."""
    heads, kv_heads = (
        _setting(source, name) for name in ("num_attention_heads", "num_key_value_heads")
    )
    return None if heads is None else heads // (kv_heads or heads)


def usual_layers(source: ModelSource) -> list[int]:
    """The layers that `sa_patch.patch_model` takes by default, by a model's configuration.

    None at all where that cannot be read.
    """
    return sorted(full_layers(_config(source), range(layer_count(source) or 0)))


def _setting(source: ModelSource, name: str) -> int | None:
    """A whole number of the configuration; None where it cannot be read."""
    try:
        return int(getattr(_config(source), name))
    except (AttributeError, TypeError, ValueError):
        return None


# A GGUF file's takes seconds to read, and is asked for several times.
@lru_cache(maxsize=4)
def _config(source: ModelSource) -> Any:
    """A model's configuration; None where it cannot be read."""
    from transformers import AutoConfig

    copy = find_copy(source)
    if copy is not None:
        source = replace(source, pretrained=str(copy), gguf_file=None)
    given = {"revision": source.revision, "gguf_file": source.gguf_file}
    try:
        return AutoConfig.from_pretrained(
            source.pretrained, **{key: value for key, value in given.items() if value is not None}
        ).get_text_config()
    except Exception:
        return None
