"""What a pre-training run is: one YAML file, read strictly before anything slow."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from sa_patch.errors import UserError
from sa_patch.files.yaml_values import choice, known_mapping, listed, read_yaml, text
from sa_patch.kernels import check_backend
from sa_patch.patterns import SA, SWA, Full, Pattern, parse_pattern, seed_of
from sa_patch.patterns.base import whole_number
from sa_patch.training.fractional.text_form import FRACTIONAL, Fractional, method_text, split_text

PRECISIONS = ("no", "bf16", "fp16")
GATED, WINDOWED = "gated", ("sa", "swa")


@dataclass(frozen=True)
class ModelSettings:
    """A Llama's size; see `transformers.LlamaConfig`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    tie_embeddings: bool = True


@dataclass(frozen=True)
class TextSettings:
    """Where the text comes from, and how it is cut into tokens.

    Args:
        source: "installed" for the sources and documents of the running Python (no download), or
            the first argument of ``datasets.load_dataset`` (a hub id, or "text", "json", ...).
        subset, data_files, split, column: further arguments of it, and the column with the text.
        validation_split: None to hold out every 100th document instead.
        vocabulary: size of the byte-level BPE tokenizer that is trained on the text.
        max_tokens: stop reading after as many training tokens; None for all.
        validation_tokens: held-out tokens that perplexity is measured on, at most.
    """

    vocabulary: int
    validation_tokens: int
    source: str = "installed"
    subset: str | None = None
    data_files: tuple[str, ...] = ()
    split: str = "train"
    validation_split: str | None = None
    column: str = "text"
    max_tokens: int | None = None


@dataclass(frozen=True)
class RecallSettings:
    """Generated key-value recall.

    Args:
        share: of the training sequences that are recall documents, 0 to 1; the rest is text.
        documents: held-out ones that recall is measured on; 0 for none.
        weight: tokens of text that an answer counts as in the loss, above 0; only the answers of a
            recall document are learnt, a fifth of its tokens.
    """

    share: float = 0.0
    documents: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Settings:
    """A pre-training run but for its method and seed.

    Args:
        sequence: tokens of a sequence, n.
        batch: sequences of an optimizer step, over all processes.
        micro_batch: sequences of a process that go through the model at once, at most.
        steps: optimizer steps.
        learning_rate: at its peak; it rises linearly over `warmup` steps, then falls by a cosine
            to `final_share` of the peak at the last step.
        betas, weight_decay: of AdamW; norms and biases do not decay.
        clip: largest norm of the gradient.
        window: of "swa", "sa" and "gated" where they name none.
        checkpoint_every, validate_every, log_every: steps.
    """

    name: str
    model: ModelSettings
    text: TextSettings
    sequence: int
    batch: int
    micro_batch: int
    steps: int
    warmup: int
    learning_rate: float
    window: int
    checkpoint_every: int
    validate_every: int
    recall: RecallSettings = field(default_factory=RecallSettings)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    final_share: float = 0.1
    log_every: int = 10
    precision: str = "no"
    backend: str = "auto"

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
        plain: dict[str, Any] = dataclasses.asdict(self)
        plain["betas"] = list(self.betas)
        plain["text"]["data_files"] = list(self.text.data_files)
        return plain


@dataclass(frozen=True)
class Method:
    """How the models of a run attend.

    Args:
        pattern: of "swa" and its like; ``Full()`` for stock attention.
        gated_window: of both branches of gated SA + SWA; then `pattern` is not used.
        fractional: fractional attention, with a pattern of its own; likewise.
    """

    pattern: Pattern
    gated_window: int | None = None
    fractional: Fractional | None = None

    @classmethod
    def read(cls, name: str, window: int) -> Method:
        """From "full", "swa", "sa", "gated", "gated:64", "fna:alpha=1.2" or a pattern's text form.

        Args:
            window: of those that name none.

        Raises:
            UserError: for anything else.
        """
        head, colon, rest = name.partition(":")
        if head == GATED:
            if colon and not rest.removeprefix("window=").isdigit():
                raise UserError(f"{name!r} is no method; write gated, or gated:64 for a window")
            own = int(rest.removeprefix("window=")) if colon else window
            return cls(Full(), whole_number(own, "window", 1))
        if head == FRACTIONAL:
            kernel, seen = split_text(rest)
            inner = cls(Full()) if seen is None else cls.read(seen, window)
            if inner.gated_window is not None or inner.fractional is not None:
                raise UserError(f"{name!r} is no method; {seen!r} is not a pattern")
            return cls(Full(), fractional=Fractional(kernel, inner.pattern))
        if name in WINDOWED:
            return cls(SA(window) if name == "sa" else SWA(window))
        pattern = parse_pattern(name)
        if seed_of(pattern):
            raise UserError(f"{name!r} names a seed; a run's own seed (--seed) takes its place")
        return cls(pattern)

    def __str__(self) -> str:
        if self.gated_window is not None:
            return f"{GATED}:window={self.gated_window}"
        if self.fractional is not None:
            return method_text(self.fractional, str(Method(self.fractional.pattern)))
        # The seed that a pattern names is replaced by the run's.
        return re.sub(r",seed=0\b", "", str(self.pattern))


def load_settings(path: Path) -> Settings:
    """Read and check a YAML file of ``configs/pretrain``.

    Raises:
        UserError: for anything unknown, missing or not allowed, with the file's name.
    """
    raw = read_yaml(path)
    try:
        return parse_settings(raw, path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_settings(raw: Any, default_name: str) -> Settings:
    """The settings that a YAML file's mapping stands for, checked.

    Raises:
        UserError: for anything unknown, missing or not allowed.
    """
    given = _known(raw, "the training file", Settings)
    given["name"] = text(given.get("name", default_name), "name")
    given["model"] = _model(given.get("model"))
    given["text"] = _text(given.get("text"))
    given["recall"] = _recall(given.get("recall", {}))
    for key in ("sequence", "batch", "micro_batch", "steps", "window", "log_every"):
        _whole(given, key, 1)
    for key in ("checkpoint_every", "validate_every"):
        _whole(given, key, 1)
    _whole(given, "warmup", 0)
    for key, low, high in (
        ("learning_rate", 0.0, math.inf),
        ("clip", 0.0, math.inf),
        ("weight_decay", -math.ulp(0.0), math.inf),
        ("final_share", -math.ulp(0.0), 1.0),
    ):
        _real(given, key, low, high)
    betas = tuple(listed(given.get("betas", [0.9, 0.95]), "betas"))
    if len(betas) != 2 or not all(
        isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in betas
    ):
        raise UserError(f"betas must be two numbers from 0 to below 1, got {list(betas)}")
    given["betas"] = betas
    choice(given.get("precision", "no"), "precision", PRECISIONS)
    check_backend(text(given.get("backend", "auto"), "backend"))
    _complete(given, "the training file", Settings)
    if given["recall"].share and given["sequence"] < 64:
        raise UserError("recall documents need a sequence of at least 64 tokens")
    return Settings(**given)


def _model(raw: Any) -> ModelSettings:
    given = _known(raw, "'model'", ModelSettings)
    _complete(given, "'model'", ModelSettings)
    for key in ("layers", "hidden", "heads", "kv_heads", "intermediate"):
        _whole(given, key, 1)
    size = ModelSettings(**given)
    if size.hidden % (2 * size.heads) or size.heads % size.kv_heads:
        raise UserError(
            "hidden must be an even multiple of heads, and heads a multiple of kv_heads, "
            f"got {size.hidden}, {size.heads} and {size.kv_heads}"
        )
    return size


def _text(raw: Any) -> TextSettings:
    given = _known(raw, "'text'", TextSettings)
    _complete(given, "'text'", TextSettings)
    _whole(given, "vocabulary", 512)
    _whole(given, "validation_tokens", 1)
    if given.get("max_tokens") is not None:
        _whole(given, "max_tokens", 1)
    for key in ("source", "subset", "split", "validation_split", "column"):
        if given.get(key) is not None:
            text(given[key], key)
    files = listed(given.get("data_files"), "data_files")
    given["data_files"] = tuple(text(file, "data_files") for file in files)
    return TextSettings(**given)


def _recall(raw: Any) -> RecallSettings:
    given = _known(raw, "'recall'", RecallSettings)
    _real(given, "share", -math.ulp(0.0), 1.0)
    _whole(given, "documents", 0)
    _real(given, "weight", 0.0, math.inf)
    return RecallSettings(**given)


def _known(raw: Any, what: str, kind: type) -> dict[str, Any]:
    if raw is None:
        raise UserError(f"{what} is missing")
    return known_mapping(raw, what, [each.name for each in dataclasses.fields(kind)])


def _complete(given: Mapping[str, Any], what: str, kind: type) -> None:
    for each in dataclasses.fields(kind):
        optional = (
            each.default is not dataclasses.MISSING
            or each.default_factory is not dataclasses.MISSING
        )
        if each.name not in given and not optional:
            raise UserError(f"{what} lacks the key {each.name!r}")


def _whole(given: Mapping[str, Any], key: str, minimum: int) -> None:
    if key in given:
        whole_number(given[key], key, minimum)


def _real(given: dict[str, Any], key: str, above: float, most: float) -> None:
    if key not in given:
        return
    value = given[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value <= most:
        least = f"above {above:g}" if above == 0 else "of at least 0"
        raise UserError(f"{key} must be a number {least} and at most {most:g}, got {value!r}")
    given[key] = float(value)
