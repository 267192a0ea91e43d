"""A model and its tokenizer, loaded without the loader's own output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sa_patch.errors import UserError, one_line
from sa_patch.models.converted import TOKENIZER, converted_copy
from sa_patch.models.embedded import DEFAULT_MODEL, ModelSource, resolve_model
from sa_patch.models.gguf import reading_gguf_once
from sa_patch.models.quiet_output import silenced

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_pretrained(
    name: str = DEFAULT_MODEL,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """A causal language model, ready to evaluate, and its tokenizer.

    Args:
        name: ``smollm2-135m`` (embedded, nothing is downloaded), a folder, a GGUF file or a hub id.
        dtype: of the weights; "auto" for their own, which is float32 for GGUF files.
        device_map: as in transformers; "auto" spreads a large model. Default: GPUs where there are
            any, else the CPU.
        gguf_file: a GGUF file's name within that folder or hub repository.
        revision: a branch, tag or commit of a hub id.

    Returns:
        The model and the tokenizer.

    Raises:
        UserError: if the model cannot be found or loaded, with the reason.
    """
    source = resolve_model(name, gguf_file, revision)
    with reading_gguf_once():
        tokenizer = load_tokenizer(name, source)
        return load_causal_lm(name, source, dtype, device_map), tokenizer


def load_tokenizer(name: str, source: ModelSource) -> Any:
    """The tokenizer of a source; of a GGUF file through its converted copy.

    Args:
        name: what the user called the model, for messages.

    Raises:
        UserError: if it cannot be loaded, with the loader's own reason.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(source)
    if folder is not None:
        source = replace(source, pretrained=folder, gguf_file=None)
    return _load(name, AutoTokenizer, source)


def load_causal_lm(
    name: str, source: ModelSource, dtype: str = "auto", device_map: str | None = None
) -> Any:
    """The causal language model of a source, ready to evaluate; on GPUs where there are any.

    Its half-precision layers are as fast as the CPU allows (`sa_patch.models.half_products`).

    Raises:
        UserError: if it cannot be loaded, with the loader's own reason.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sa_patch.models.half_products import widen_products

    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    source = quickest_source(source)
    model = _load(name, AutoModelForCausalLM, source, dtype=dtype, device_map=device_map)
    widen_products(model)
    return model.eval()


def quickest_source(source: ModelSource) -> ModelSource:
    """The converted copy of a GGUF file, as a folder of the same identity; else the source."""
    copy = converted_copy(source)
    return source if copy is None else replace(source, pretrained=str(copy), gguf_file=None)


def tokenizer_folder(source: ModelSource) -> str | None:
    """Where the tokenizer in a source's converted copy lies; None without such a copy."""
    copy = converted_copy(source)
    return None if copy is None else str(copy / TOKENIZER)


def _load(name: str, loader: Any, source: ModelSource, **options: Any) -> Any:
    given = {"revision": source.revision, "gguf_file": source.gguf_file}
    options |= {key: value for key, value in given.items() if value is not None}
    with silenced(), reading_gguf_once():
        try:
            return loader.from_pretrained(source.pretrained, **options)
        except Exception as error:
            reason = one_line(error)
            raise UserError(f"the model {name!r} could not be loaded: {reason}") from error
