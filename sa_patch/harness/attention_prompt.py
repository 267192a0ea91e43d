"""A model, and a prompt as its tokens, for ``sa-patch analyze attention``: checked, then loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_patch.errors import UserError
from sa_patch.harness.config import DTYPES
from sa_patch.harness.embedded import ModelSource, resolve_model
from sa_patch.harness.layer_check import check_place
from sa_patch.harness.loading import load_causal_lm, load_tokenizer
from sa_patch.harness.yaml_values import choice

if TYPE_CHECKING:
    from torch import Tensor


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
