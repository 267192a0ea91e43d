"""Methods of pre-training: how a model attends, read from text, built, and set for each step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.patching import patch_model
from sa_patch.patterns import SA, SWA, Full, Pattern, parse_pattern, seed_of, with_seed
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.permutation import hash_key
from sa_patch.patterns.registry import parse_value
from sa_patch.training.fractional.attention import check_pattern
from sa_patch.training.fractional.distance_kernel import DistanceKernel
from sa_patch.training.fractional.models import draw_patterns, fractional_model
from sa_patch.training.gated.models import gated_model
from sa_patch.training.pretraining.settings import PretrainingSettings

GATED, FRACTIONAL = "gated", "fna"
_EXAMPLE = "write fna:alpha=1.2, or fna:alpha=1.2,geometry=geodesic,pattern=sa:64"


@dataclass(frozen=True)
class Method:
    """How the models of a run attend.

    Args:
        pattern: which keys are visible; ``Full()`` where `gated_window` is given.
        gated_window: of both branches of gated SA + SWA.
        kernel: of fractional attention over `pattern`. Alpha and geometry only; the rest would let
            tokens see what follows them.

    Raises:
        UserError: for a pattern that fractional attention cannot follow.
    """

    pattern: Pattern
    gated_window: int | None = None
    kernel: DistanceKernel | None = None

    def __post_init__(self) -> None:
        if self.kernel is not None:
            check_pattern(self.pattern)

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
            if colon and not rest.removeprefix("window=").isdecimal():
                raise UserError(f"{name!r} is no method; write gated, or gated:64 for a window")
            own = int(rest.removeprefix("window=")) if colon else window
            return cls(Full(), gated_window=whole_number(own, "window", 1))
        if head == FRACTIONAL:
            return cls._read_fractional(rest, window)
        if name in ("sa", "swa"):
            return cls(SA(window) if name == "sa" else SWA(window))
        pattern = parse_pattern(name)
        if seed_of(pattern):
            raise UserError(f"{name!r} names a seed; a run's own seed (--seed) takes its place")
        return cls(pattern)

    @classmethod
    def _read_fractional(cls, text: str, window: int) -> Method:
        """From what stands after ``fna:``; ``pattern=`` comes last, since a pattern has commas."""
        head, mark, pattern = text.partition("pattern=")
        parts = head.removesuffix(",").split(",") if head else []
        named = (part if "=" in part else f"alpha={part}" for part in parts)
        given = dict(part.split("=", 1) for part in named)
        malformed = mark and (not pattern or (head and not head.endswith(",")))
        if malformed or len(given) < len(parts) or not given.keys() <= {"alpha", "geometry"}:
            raise UserError(f"'{FRACTIONAL}:{text}' is no method; {_EXAMPLE}")
        alpha: Any = parse_value(given.get("alpha", "1.2"))
        kernel = DistanceKernel(alpha, given.get("geometry", "euclidean"))
        inner = cls.read(pattern, window) if pattern else cls(Full())
        if inner.has_own_attention:
            raise UserError(f"'{FRACTIONAL}:{text}' is no method; {pattern!r} is not a pattern")
        return cls(inner.pattern, kernel=kernel)

    @property
    def has_own_attention(self) -> bool:
        """Whether the attention is part of the model and saved with it, not patched into it."""
        return self.gated_window is not None or self.kernel is not None

    def __str__(self) -> str:
        """The text form, which `read` understands."""
        if self.gated_window is not None:
            return f"{GATED}:window={self.gated_window}"
        # The seed that a pattern names is replaced by the run's.
        pattern = re.sub(r",seed=0\b", "", str(self.pattern))
        if self.kernel is None:
            return pattern
        text = f"{FRACTIONAL}:alpha={self.kernel.alpha_text}"
        if self.kernel.geometry != "euclidean":
            text += f",geometry={self.kernel.geometry}"
        return text if isinstance(self.pattern, Full) else f"{text},pattern={pattern}"


def build_model(
    method: Method, settings: PretrainingSettings, vocabulary: int, seed: int
) -> PreTrainedModel:
    """A new model. All methods start from the same weights at a seed, but for the gates.

    Leaves torch's global generator seeded with `seed`.
    """
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(settings.llama(vocabulary))
    if method.gated_window is not None:
        model = gated_model(model, method.gated_window, seed=seed, backend=settings.backend)
    if method.kernel is not None:
        model = fractional_model(
            model,
            float(method.kernel.alpha),
            geometry=method.kernel.geometry,
            pattern=str(_seeded(method.pattern, seed)),
        )
    torch.manual_seed(seed)
    return model


def set_attention(
    model: Any, method: Method, settings: PretrainingSettings, seed: int, step: int | None
) -> None:
    """Give a model the attention of a training step, or of evaluation where `step` is None.

    Random patterns are drawn anew for every step, and by the run's seed for evaluation. Gated
    models do so themselves.
    """
    step_seed = seed if step is None else hash_key(seed, step)
    if method.kernel is not None:
        draw_patterns(model, None if step is None else step_seed)
    elif method.gated_window is None and not isinstance(method.pattern, Full):
        pattern = _seeded(method.pattern, step_seed)
        patch_model(model, pattern, decode="pattern", backend=settings.backend)


def _seeded(pattern: Pattern, seed: int) -> Pattern:
    return pattern if seed_of(pattern) is None else with_seed(pattern, seed)
