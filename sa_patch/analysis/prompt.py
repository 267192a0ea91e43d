"""A model and what it is to read as tokens, for ``sa-patch analyze``: checked, then loaded."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_patch.errors import UserError, choice, one_line
from sa_patch.models.embedded import ModelSource, resolve_model
from sa_patch.models.layer_check import check_place
from sa_patch.models.loading import DTYPES, load_causal_lm, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor


_DEFAULT_TEXT = textwrap


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and the model that is to read them.

    Args:
        name: what the user called the model.
        tokens: int64 ``[1, n]``.
    """

    name: str
    source: ModelSource
    dtype: str
    tokens: Tensor

    @property
    def identity(self) -> str:
        """The model's id and revision, or a hash of its content."""
        return self.source.identity

    def load(self) -> Any:
        """The causal language model.

        Raises:
            UserError: if it cannot be loaded, with the loader's own reason.
        """
        return load_causal_lm(self.name, self.source, self.dtype)


def prepare_prompt(
    model: str,
    text: str,
    *,
    layer: int,
    head: int,
    dtype: str = "auto",
    gguf_file: str | None = None,
    revision: str | None = None,
) -> Prompt:
    """Check everything that can be checked before the weights are loaded.

    Raises:
        UserError: for an empty prompt, an unknown dtype, a model that cannot be found, or a layer
            or head that it does not have.
    """
    if not text.strip():
        raise UserError("the prompt is empty; give the text to read")
    choice(dtype, "dtype", DTYPES)
    source = resolve_model(model, gguf_file, revision)
    check_place(source, layer, head)
    tokens = load_tokenizer(model, source)(text, return_tensors="pt")["input_ids"]
    return Prompt(model, source, dtype, tokens)


def prepare_text(
    model: str,
    file: Path | None,
    tokens: int,
    *,
    dtype: str = "auto",
    gguf_file: str | None = None,
    revision: str | None = None,
) -> Prompt:
    """The first `tokens` tokens of a file, by default of a module of Python's standard library.

    Raises:
        UserError: for a file that cannot be read or is too short, an unknown dtype, or a model
            that cannot be found.
    """
    choice(dtype, "dtype", DTYPES)
    path = Path(inspect.getfile(_DEFAULT_TEXT)) if file is None else file
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    source = resolve_model(model, gguf_file, revision)
    read = load_tokenizer(model, source)(text, return_tensors="pt")["input_ids"]
    if read.shape[1] < tokens:
        raise UserError(
            f"{path} has only {read.shape[1]} of the {tokens} tokens asked for; give a longer file "
            "or a smaller --n"
        )
    return Prompt(model, source, dtype, read[:, :tokens])
