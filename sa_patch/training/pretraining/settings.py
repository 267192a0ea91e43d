"""The settings of a pre-training run: one YAML file, checked before anything slow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from transformers import LlamaConfig

from sa_patch.errors import UserError
from sa_patch.files.settings import LISTED, Positive, Settings, Text, read_yaml
from sa_patch.kernels import check_backend

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """A Llama's size; see `transformers.LlamaConfig`."""

    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    intermediate: Positive
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise UserError(
                "hidden must be an even multiple of heads, and heads a multiple of kv_heads, "
                f"got {self.hidden}, {self.heads} and {self.kv_heads}"
            )
        return self


class TextSettings(Settings):
    """Where the text comes from, and how it is tokenized.

    Args:
        vocabulary: size of the byte-level BPE tokenizer that is trained on the text.
        validation_tokens: held-out tokens that perplexity is measured on, at most.
        source: "installed" for the sources and documentation of the running Python (no download),
            or the first argument of ``datasets.load_dataset`` (a hub id, or "text", "json", ...).
        subset, data_files, split: further arguments of ``load_dataset``.
        validation_split: the held-out split; None to hold out every 100th document instead.
        column: the column that holds the text.
        max_tokens: training tokens to read, at most; None for all.
    """

    vocabulary: int = Field(ge=512)
    validation_tokens: Positive
    source: Text = "installed"
    subset: Text | None = None
    data_files: Annotated[tuple[Text, ...], LISTED] = ()
    split: Text = "train"
    validation_split: Text | None = None
    column: Text = "text"
    max_tokens: Positive | None = None


class RecallSettings(Settings):
    """Generated documents that ask for the values of keys shown before.

    Args:
        share: of the training sequences that are recall documents, 0 to 1; the rest is text.
        documents: held-out ones that recall is measured on; 0 for none.
        weight: of an answer in the loss, where a token of text weighs 1. Only the answers of a
            recall document, a fifth of its tokens, are trained on.
    """

    share: Share = 0.0
    documents: int = Field(default=0, ge=0)
    weight: float = Field(default=1.0, gt=0)


class PretrainingSettings(Settings):
    """A pre-training run without its method and seed.

    Args:
        name: of the run's folder and figures; the file's name by default.
        sequence: tokens of a sequence, n; at least 2, since the first is not scored.
        batch: sequences of an optimizer step, over all processes.
        micro_batch: largest number of sequences in one forward pass of a process.
        steps: optimizer steps.
        warmup: steps in which the learning rate rises linearly to `learning_rate`.
        learning_rate: the peak, from which a cosine falls to `final_share` of it.
        window: of the methods "swa", "sa" and "gated" where they name none.
        checkpoint_every, validate_every, log_every: in steps.
        betas, weight_decay: of AdamW; norms and biases do not decay.
        clip: largest norm of the gradient.
        precision: of ``accelerate.Accelerator(mixed_precision=...)``.
        backend: kernel backend of sparse attention, or "auto".
    """

    name: Text
    model: ModelSettings
    text: TextSettings
    sequence: int = Field(ge=2)
    batch: Positive
    micro_batch: Positive
    steps: Positive
    warmup: int = Field(ge=0)
    learning_rate: float = Field(gt=0)
    window: Positive
    checkpoint_every: Positive
    validate_every: Positive
    recall: RecallSettings = RecallSettings()
    betas: Annotated[tuple[Beta, Beta], LISTED] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    final_share: Share = 0.1
    log_every: Positive = 10
    precision: Literal["no", "bf16", "fp16"] = "no"
    backend: Annotated[Text, AfterValidator(check_backend)] = "auto"

    @field_validator("recall")
    @classmethod
    def _check_sequence(cls, recall: RecallSettings, info: ValidationInfo) -> RecallSettings:
        if (recall.share or recall.documents) and info.data.get("sequence", 64) < 64:
            raise UserError("recall documents need a sequence of at least 64 tokens")
        return recall

    def llama(self, vocabulary: int) -> LlamaConfig:
        """The stock configuration that every method starts from."""
        size = self.model
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=self.sequence,
            tie_word_embeddings=size.tie_embeddings,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return self.model_dump(mode="json")


def load_settings(path: Path) -> PretrainingSettings:
    """Read and check a YAML file such as those of ``configs/pretrain``.

    Raises:
        UserError: for an unknown or missing key or a value that is not allowed, with the file's
            name.
    """
    raw = read_yaml(path)
    if isinstance(raw, Mapping):
        raw = {"name": path.stem, **raw}
    try:
        return PretrainingSettings.read(raw, "the training file")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
