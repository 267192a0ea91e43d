"""Whether a model has the layers that are asked for, from its configuration alone."""

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
    from transformers import AutoConfig

    given = {"revision": source.revision, "gguf_file": source.gguf_file}
    try:
        config = AutoConfig.from_pretrained(
            source.pretrained, **{key: value for key, value in given.items() if value is not None}
        )
        count = int(config.get_text_config().num_hidden_layers)
    except Exception:
        return
    unknown = sorted(index for index in layers if index >= count)
    if unknown:
        raise UserError(
            f"layers {unknown} are not attention layers of this model; it has "
            f"{format_layers(range(count))}"
        )
