"""Whether a model has the layers and the context asked for, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable

from sa_patch.errors import UserError
from sa_patch.harness.embedded import ModelSource
from sa_patch.patching import format_layers


def check_layers(source: ModelSource, layers: Iterable[int] | None) -> None:
    """Refuse layers beyond a model's last one before its weights are loaded.

    A configuration that cannot be read is left to the loader, which says why.

    Raises:
        UserError: for an index that the model does not have.
    """
    if layers is None:
        return
    count = layer_count(source)
    unknown = sorted(index for index in layers if count is not None and index >= count)
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


def layer_count(source: ModelSource) -> int | None:
    """Layers of a model by its configuration; None where that cannot be read."""
    return _setting(source, "num_hidden_layers")


def _setting(source: ModelSource, name: str) -> int | None:
    """A whole number of the configuration; None where it cannot be read."""
    from transformers import AutoConfig

    given = {"revision": source.revision, "gguf_file": source.gguf_file}
    try:
        config = AutoConfig.from_pretrained(
            source.pretrained, **{key: value for key, value in given.items() if value is not None}
        )
        return int(getattr(config.get_text_config(), name))
    except Exception:
        return None
