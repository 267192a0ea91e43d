"""What a benchmark found, as data: cells with every sample, and where and with what they came."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sa_patch.errors import one_line
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
        started_s: when each of them began, in seconds since the run did.
    """

    n: int
    label: str
    backend: str
    status: str = SKIPPED
    reason: str = ""
    extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)

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
