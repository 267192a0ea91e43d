"""Options of a prefill benchmark, checked before anything slow begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.options import Options, choose_device
from sa_patch.benchmark.prefill.models import PUBLISHED, check_model
from sa_patch.errors import UserError
from sa_patch.models.embedded import DEFAULT_MODEL
from sa_patch.patterns import Pattern, parse_pattern

_COMMON: dict[str, Any] = dict(
    patterns=("sa:256", "swa:256", "moba:window=256", "sinks:4+swa:126+sa:126", "full"),
    small=False,
    decoded=64,
    checked=1024,
    out=Path("runs/prefill"),
)
# Building the models is not in the budget.
_CPU: dict[str, Any] = dict(
    models=(DEFAULT_MODEL,), n=(8192,), backends=("auto",), dtype="float32", budget=600.0
)
_CUDA: dict[str, Any] = dict(
    models=PUBLISHED,
    n=(2048, 8192, 32768, 65536, 131072),
    backends=("triton", "flash"),
    dtype="bfloat16",
    budget=480.0,
)
_SMALL: dict[str, Any] = dict(
    models=PUBLISHED,
    n=(256, 512),
    patterns=("sa:32", "swa:32", "moba:16,2", "sinks:4+swa:14+sa:14", "full"),
    checked=256,
    budget=60.0,
)


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(Options):
    """What to measure.

    Args:
        n: tokens of the prompts.
        models: of `PUBLISHED`, or what `load_pretrained` takes.
        patterns: text forms.
        backends: each is asked for every pattern; "auto" may be one.
        small: shrink the published models: a rehearsal.
        decoded: tokens written after the prompt.
        checked: tokens of the prompt on which the models are checked first.
        budget: seconds for measuring, all models together.
    """

    allows_auto = True

    models: tuple[str, ...]
    patterns: tuple[str, ...]
    small: bool
    decoded: int
    checked: int

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "models", tuple(dict.fromkeys(self.models)))
        if not self.models:
            raise UserError("name at least one model")
        if self.decoded < 0:
            raise UserError(f"--decoded must be at least 0, got {self.decoded}")
        if self.small and (others := [name for name in self.models if name not in PUBLISHED]):
            raise UserError(
                f"--small shrinks {' and '.join(PUBLISHED)} only, not {others[0]}; leave one out"
            )
        for name in self.models:
            check_model(name)
        self.parsed()

    def parsed(self) -> list[Pattern]:
        """The patterns, each once."""
        return list(dict.fromkeys(parse_pattern(text) for text in self.patterns))


def make_options(**given: Any) -> PrefillOptions:
    """Options with defaults for what is None or missing.

    Raises:
        UserError: for what is not allowed.
    """
    named = {key: value for key, value in given.items() if value is not None}
    device = choose_device(named.get("device"))
    values = _COMMON | (_CUDA if device == "cuda" else _CPU)
    if named.get("small"):
        values |= _SMALL | ({"backends": ("banded",)} if device == "cpu" else {})
    values |= {"threads": torch.get_num_threads()} | named | {"device": device}
    for field in ("models", "n", "patterns", "backends"):
        values[field] = tuple(values[field])
    return PrefillOptions(**values)
