"""Options of a prefill benchmark, checked before anything slow begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.prefill.models import PUBLISHED, check_model
from sa_patch.errors import UserError
from sa_patch.kernels import check_backend
from sa_patch.models.embedded import DEFAULT_MODEL
from sa_patch.patterns import Pattern, parse_pattern

DTYPES = ("float32", "bfloat16", "float16")
PATTERNS = ("sa:256", "swa:256", "moba:window=256", "sinks:4+swa:126+sa:126", "full")
SMALL_PATTERNS = ("sa:32", "swa:32", "moba:16,2", "sinks:4+swa:14+sa:14", "full")
GPU_BACKENDS = ("triton", "flash")
GPU_LENGTHS = (2048, 8192, 32768, 65536, 131072)
CPU_LENGTHS, SMALL_LENGTHS = (8192,), (256, 512)
# Building the models is not in it.
GPU_BUDGET, CPU_BUDGET, SMALL_BUDGET = 480.0, 600.0, 60.0


@dataclass(frozen=True)
class PrefillOptions:
    """What to measure.

    Args:
        models: of `PUBLISHED`, or what `load_pretrained` takes.
        n: tokens of the prompts, ascending.
        patterns: text forms.
        backends: each is asked for every pattern.
        small: shrink the published models: a rehearsal.
        decoded: tokens written after the prompt.
        checked: tokens of the prompt on which the models are checked first.
        budget: seconds for measuring, all models together.
        threads: of a CPU.
    """

    device: str
    models: tuple[str, ...]
    n: tuple[int, ...]
    patterns: tuple[str, ...]
    backends: tuple[str, ...]
    dtype: str
    small: bool
    decoded: int
    checked: int
    budget: float
    threads: int
    out: Path

    def parsed(self) -> list[Pattern]:
        return list(dict.fromkeys(parse_pattern(text) for text in self.patterns))

    def described(self) -> dict[str, Any]:
        """The options as JSON values."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def make_options(
    *,
    device: str | None = None,
    models: Sequence[str] | None = None,
    n: Sequence[int] | None = None,
    patterns: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    dtype: str | None = None,
    small: bool = False,
    decoded: int = 64,
    budget: float | None = None,
    threads: int | None = None,
    out: Path = Path("runs/prefill"),
) -> PrefillOptions:
    """Options with defaults for what is None.

    Raises:
        UserError: for what is not allowed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device here; use --device cpu")
    if device not in ("cuda", "cpu"):
        raise UserError(f"device must be cuda or cpu, got {device!r}")
    on_gpu = device == "cuda"
    if models is None:
        models = PUBLISHED if on_gpu or small else (DEFAULT_MODEL,)
    if small and (others := [name for name in models if name not in PUBLISHED]):
        raise UserError(
            f"--small shrinks {' and '.join(PUBLISHED)} only, not {others[0]}; leave one out"
        )
    if n is None:
        n = SMALL_LENGTHS if small else GPU_LENGTHS if on_gpu else CPU_LENGTHS
    if budget is None:
        budget = SMALL_BUDGET if small else GPU_BUDGET if on_gpu else CPU_BUDGET
    if backends is None:
        backends = GPU_BACKENDS if on_gpu else ("banded",) if small else ("auto",)
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    found = PrefillOptions(
        device=device,
        models=tuple(dict.fromkeys(models)),
        n=tuple(sorted(set(n))),
        patterns=tuple(patterns or (SMALL_PATTERNS if small else PATTERNS)),
        backends=tuple(dict.fromkeys(backends)),
        dtype=dtype,
        small=small,
        decoded=decoded,
        checked=SMALL_LENGTHS[0] if small else 1024,
        budget=budget,
        threads=threads or torch.get_num_threads(),
        out=out,
    )
    _check(found)
    return found


def _check(options: PrefillOptions) -> None:
    if not options.models or not options.n or min(options.n) < 1:
        raise UserError("name at least one model and one length of at least 1 token")
    if options.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.decoded < 0 or options.threads < 1 or not options.budget > 0:
        raise UserError("--decoded must be at least 0, --threads at least 1, --budget above 0")
    for name in options.models:
        check_model(name)
    for name in options.backends:
        check_backend(name)
    options.parsed()
