"""What a benchmark found, as data: cells with every sample, and where and with what they came."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from sa_patch.errors import UserError, one_line
from sa_patch.files.atomic_write import write_whole
from sa_patch.files.provenance import describe_session

TIMED, WRONG, SKIPPED, OUT_OF_MEMORY, FAILED = (
    "timed",
    "wrong",
    "skipped",
    "out of memory",
    "failed",
)
STATUSES = (TIMED, WRONG, SKIPPED, OUT_OF_MEMORY, FAILED)
KERNEL_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4")


@dataclass(kw_only=True)
class Cell:
    """One contestant at one length.

    Args:
        n: tokens of each sequence.
        label: what is computed.
        backend: who computes it.
        status: one of `STATUSES`; a time is only given where it is "timed".
        reason: why it was not timed.
        extra_bytes: peak of memory beside what was there before the call; None if not measured.
        samples_ms: every timed call.
        started_s: when each of them began, in seconds since its pass did.
        passes: number of the pass that each was made in; a run that goes on makes another.
    """

    n: int
    label: str
    backend: str
    status: str = SKIPPED
    reason: str = ""
    extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.status == TIMED else None

    @property
    def quartiles_ms(self) -> tuple[float, float] | None:
        return quartiles(self.samples_ms) if self.status == TIMED else None

    def give_up(self, error: Exception) -> None:
        """Record a failure; what was timed before it does not count."""
        text = str(error).lower()
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        memory = memory or "allocate memory" in text or "out of memory" in text
        self.status = OUT_OF_MEMORY if memory else FAILED
        self.reason = one_line(error)
        self.samples_ms.clear()
        self.started_s.clear()
        self.passes.clear()

    def extend(self, later: Cell) -> None:
        """Add the calls of a later pass, if that came to a time."""
        if later.status == TIMED:
            self.samples_ms += later.samples_ms
            self.started_s += later.started_s
            self.passes += later.passes


C = TypeVar("C", bound=Cell)


@dataclass
class Bench(Generic[C]):
    """A whole run.

    Args:
        provenance: of `provenance`.
        options: of `Options.described`.
        cells: in the order in which they were measured.
        complete: whether everything that was asked for was reached.
    """

    kind: ClassVar[str]
    schema: ClassVar[int] = 1

    provenance: dict[str, Any]
    options: dict[str, Any]
    cells: list[C] = field(default_factory=list)
    complete: bool = False

    def where(self, **wanted: Any) -> list[C]:
        """The cells with these values, such as ``n=1024``."""
        return [c for c in self.cells if all(getattr(c, key) == wanted[key] for key in wanted)]

    def lengths(self, **wanted: Any) -> list[int]:
        """The lengths of these cells, ascending."""
        return sorted({cell.n for cell in self.where(**wanted)})

    def unsettled(self) -> list[C]:
        """What another run may still measure: cells that found no time."""
        return self.where(status=SKIPPED)

    def resume(self) -> None:
        """Forget what found no time, so that it is measured now."""
        self.cells = [cell for cell in self.cells if cell.status != SKIPPED]
        self.complete = False

    def content(self) -> dict[str, Any]:
        """The run as JSON values, save for the cells."""
        return {
            "kind": self.kind,
            "schema": self.schema,
            "complete": self.complete,
            "provenance": self.provenance,
            "options": self.options,
        }


def fastest(cells: Iterable[C]) -> C | None:
    """The one with the least median among those that were timed."""
    timed = [cell for cell in cells if cell.median_ms is not None]
    return min(timed, key=lambda cell: cell.median_ms or 0.0, default=None)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile; the extremes of fewer than four values."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """`describe_session`, with the versions of kernel packages and the load of the machine."""
    session = describe_session(command)
    for name in KERNEL_PACKAGES:
        try:
            session["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            session["versions"][name] = None
    session["machine_cores"] = os.cpu_count()
    session["load_average"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    return session


def machine(session: dict[str, Any], device: str, threads: int | None = None) -> str:
    """The GPU's name; or the processor's, with the number of threads if that is given."""
    hardware = session["hardware"]
    if device == "cuda":
        return str(hardware["gpus"][0])
    count = "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"
    return f"{hardware['cpu']}{count}"


def packages(session: dict[str, Any], *names: str) -> str:
    """Versions of torch, of these packages and of the kernels' own that are installed."""
    versions = session["versions"]
    kernels = [name for name in versions if "fla" in name or name == "triton"]
    return ", ".join(
        f"{name} {versions[name]}" for name in ("torch", *names, *kernels) if versions.get(name)
    )


def write_results(
    stem: Path,
    content: dict[str, Any],
    markdown: str | None = None,
    draw: Callable[[], bytes] | None = None,
) -> tuple[Path, ...]:
    """Write ``STEM.json``, ``STEM.md`` and ``STEM.png``, as far as they are given.

    Args:
        draw: makes the PNG, once the other files are written; it imports matplotlib, and where
            that is missing there is no figure.

    Raises:
        UserError: if the folder cannot be written.
    """
    written = [_write(stem, ".json", (json.dumps(content, indent=1) + "\n").encode())]
    if markdown is not None:
        written.append(_write(stem, ".md", markdown.encode()))
    if draw is not None:
        try:
            figure = draw()
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
        else:
            written.append(_write(stem, ".png", figure))
    return tuple(written)


def _write(stem: Path, suffix: str, data: bytes) -> Path:
    path = stem.with_name(stem.name + suffix)
    try:
        write_whole(path, data)
    except OSError as error:
        raise UserError(f"cannot write into {stem.parent}: {error.strerror}") from error
    return path


def read_content(path: Path, kind: str, schema: int) -> dict[str, Any]:
    """What `write_results` wrote into a JSON file of this kind and schema.

    Raises:
        UserError: if the file is missing, torn, or of another kind or schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a benchmark: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{path} is no {kind}")
    if content.get("schema") != schema:
        raise UserError(f"{path} has schema {content.get('schema')}; this version reads {schema}")
    return content
