"""The model of a method, and what it must be told at every step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from sa_patch.patching import patch_model
from sa_patch.patterns import Full, seed_of, with_seed
from sa_patch.patterns.permutation import hash_key
from sa_patch.training.fractional.models import draw_patterns, fractional_model
from sa_patch.training.gated.models import gated_model
from sa_patch.training.pretraining.settings import Method, Settings


def build_model(method: Method, settings: Settings, vocabulary: int, seed: int) -> PreTrainedModel:
    """A new model. Methods with the same seed start from the same weights; the gates are extra.

    Leaves torch's global generator seeded with `seed`.
    """
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(settings.llama(vocabulary))
    if method.gated_window is not None:
        model = gated_model(model, method.gated_window, seed=seed, backend=settings.backend)
    if method.fractional is not None:
        kernel, pattern = method.fractional.kernel, method.fractional.pattern
        if seed_of(pattern) is not None:
            pattern = with_seed(pattern, seed)
        model = fractional_model(
            model, kernel.alpha, geometry=kernel.geometry, pattern=str(pattern)
        )
    torch.manual_seed(seed)
    return model


def attend_at(model: Any, method: Method, settings: Settings, seed: int, step: int | None) -> None:
    """Give a model the attention of a training step, or of evaluation where `step` is None.

    Random patterns are drawn anew in every step, and by the run's seed in evaluation. Gated models
    see to that themselves.
    """
    if method.fractional is not None:
        draw_patterns(model, None if step is None else hash_key(seed, step))
        return
    if method.gated_window is not None or isinstance(method.pattern, Full):
        return
    pattern = method.pattern
    if seed_of(pattern) is not None:
        pattern = with_seed(pattern, seed if step is None else hash_key(seed, step))
    patch_model(model, pattern, decode="pattern", backend=settings.backend)
