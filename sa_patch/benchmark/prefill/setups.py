"""What a model is timed with: its stock attention, and every pattern on every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sa_patch.benchmark.attention.candidates import refusal
from sa_patch.kernels import BACKENDS, choose_backend
from sa_patch.patching import patched
from sa_patch.patterns import Full, Pattern

STOCK = "stock"


@dataclass(frozen=True)
class Setup:
    """One way to run a model; `pattern` None leaves it as it is."""

    pattern: Pattern | None = None
    backend: str = ""

    @property
    def label(self) -> str:
        return STOCK if self.pattern is None else str(self.pattern)

    @property
    def key(self) -> str:
        return self.label if self.pattern is None else f"{self.label} | {self.backend}"

    @property
    def full(self) -> bool:
        """Whether every query sees all keys before it: the rivals of sparse attention."""
        return self.pattern is None or isinstance(self.pattern, Full)


@contextmanager
def applied(model: PreTrainedModel, setup: Setup) -> Iterator[None]:
    """Run the model this way inside; it is then as it was."""
    if setup.pattern is None:
        yield
        return
    with patched(model, setup.pattern, backend=setup.backend):
        yield


def gather(
    model: PreTrainedModel,
    patterns: Sequence[Pattern],
    backends: Sequence[str],
    *,
    rehearsal: bool = False,
) -> tuple[list[Setup], dict[str, str]]:
    """The setups for a model, stock first, and why the others cannot be had.

    Args:
        backends: names of backends, or "auto", each of which is asked for every pattern.
        rehearsal: whether interpreted kernels may take part, whose times mean nothing.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    common = {"device": model.device, "dtype": model.dtype}
    q = torch.empty(1, config.num_attention_heads, 1024, width, **common)
    k = torch.empty(1, config.num_key_value_heads, 1024, width, **common)
    found, refused = [Setup()], {}
    for pattern in patterns:
        for backend in backends:
            setup = Setup(pattern, backend)
            server = choose_backend(pattern, q, k) if backend == "auto" else BACKENDS[backend]
            if reason := refusal(pattern, server, q, k, interpreted=rehearsal):
                refused[setup.key] = reason
            else:
                found.append(setup)
    return found, refused
