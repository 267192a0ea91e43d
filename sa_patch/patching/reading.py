"""What a forward pass behind cached keys reads: more of a prompt, or tokens that were written.

The pattern rules prompts, and a prompt may arrive in pieces: in chunks (`prefill_chunk_size`), or
as a second turn behind a cache. Seen from a layer these look like drafted tokens that are verified,
so `generate` has to say which of them it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.patching.mask import SparseMask
from sa_patch.patterns import Pattern

# How `generate` reads prompts. An attribute of this name on the model itself comes before the
# method of its class, and is gone when it is taken away.
_METHOD = "_prefill"


class Reading:
    """What the tokens of a forward pass are, shared by the layers of a model.

    Several tokens are prompt, unless they are a draft; a single one behind cached keys is written,
    unless it is the rest of a prompt in chunks.
    """

    def __init__(self) -> None:
        self._draft = 0
        self._assisting = False
        self._in_prefill = self._prompt_begun = False

    def verifies(self, tokens: int) -> None:
        """The next pass of so many tokens verifies a draft; 0: no pass does."""
        self._draft = tokens

    def begins_prefill(self, *, assistant: bool) -> None:
        """The following passes read a prompt; an assistant's, what it drafts behind, too."""
        self._draft = 0
        self._in_prefill, self._prompt_begun, self._assisting = True, False, assistant

    def ends_prefill(self) -> None:
        """The following passes read what is written."""
        self._in_prefill = self._prompt_begun = self._assisting = False

    def is_prompt(self, mask: SparseMask) -> bool:
        """Whether the tokens of this forward pass are prompt."""
        several = mask.tokens > 1
        if mask.cached > 0:
            if self._assisting or (several and mask.tokens == self._draft):
                return False
            if not several and not self._prompt_begun:
                return False
        self._prompt_begun = self._in_prefill
        return True


class ReadPrompt:
    """Stands in for the method by which `generate` of a model reads prompts."""

    def __init__(self, model: PreTrainedModel, reading: Reading) -> None:
        self.model, self.reading = model, reading

    def __call__(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method returns."""
        method = getattr(type(self.model), _METHOD)
        self.reading.begins_prefill(assistant=bool(generation_config.is_assistant))
        try:
            return method(self.model, input_ids, generation_config, *args, **kwargs)
        finally:
            self.reading.ends_prefill()


def read_prompts(model: PreTrainedModel, reading: Reading | None) -> None:
    """Have a model's `generate` say what it reads, or no longer."""
    model.__dict__.pop(_METHOD, None)
    # A model that cannot generate has no such method.
    if reading is not None and hasattr(model, _METHOD):
        model.__dict__[_METHOD] = ReadPrompt(model, reading)


def refuse_pieces(pattern: Pattern, cached: int) -> None:
    """Raise `UserError` for a prompt behind cached keys under a pattern that needs it whole."""
    if not pattern.prefix_stable:
        raise UserError(
            f"{pattern} needs a prompt in one piece, and {cached} keys are cached before this part "
            "of it, which changes what they should have seen; give the whole prompt at once, "
            "without prefill_chunk_size, a cache or a prefix adapter, or patch with a "
            "prefix-stable pattern such as sinks:4+swa:128+psa:128"
        )


def refuse_last_queries(pattern: Pattern, mask: SparseMask, arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for a mask of the last queries where earlier ones are needed.

    Args:
        arguments: of the layer's attention, as `SparseMask.documents` takes them.
    """
    if mask.query_len == mask.tokens:
        return
    if pattern.looks_ahead or pattern.shared_queries > 1:
        needs, other = str(pattern), ", or patch with a pattern such as sinks:4+swa:252"
    elif mask.documents(arguments) is not None:
        needs, other = "a row of several documents", ", or give each document a row of its own"
    else:
        return
    raise UserError(
        f"{needs} needs all queries, and where few logits are asked for, this model computes only "
        "the last ones in layers that share keys; leave out logits_to_keep, in generate() set "
        f"output_hidden_states=True and return_dict_in_generate=True{other}"
    )
