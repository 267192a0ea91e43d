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
    """Refuse layers whose own sliding window is shorter than a sequence before weights are loaded.

    Raises:
        UserError: naming those layers and the window.
    """
    window = _setting(source, "sliding_window")
    kinds = getattr(_config(source), "layer_types", None) or []
    sliding = {index for index, kind in enumerate(kinds) if kind == "sliding_attention"}
    short = sorted(sliding.intersection(layers))
    if window is not None and short and tokens > window:
        raise UserError(
            f"layers {format_layers(short)} slide a window of {window} tokens of the model's own, "
            f"shorter than --n {tokens}; leave them out of --layers, or give a smaller --n"
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
    kinds = getattr(_config(source), "layer_types", None) or []
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return full or list(range(layer_count(source) or 0))


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
