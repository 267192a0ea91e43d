"""Clocks, memory meters and the machine's ceilings, on a CPU or a GPU."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Tensor]
# Larger than any last-level cache, so that copies come from memory and a flush leaves nothing.
CPU_COPY_BYTES, CUDA_COPY_BYTES = 128 << 20, 1 << 30
FLUSH_BYTES = 256 << 20
CEILING_ROUNDS = 7
MATMUL_SECONDS = 0.05  # a product is made at least this long, so that starting it does not show


class Clock:
    """Times single calls on one device.

    On a GPU each call starts with a cold second-level cache and is timed by events, so that gaps
    in which the GPU waits for Python count too, as they do in a model. On a CPU the wall clock is
    read around the call.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._flush: Tensor | None = None

    def milliseconds(self, call: Call) -> float:
        """The time of one call."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._flush.zero_()
        start_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event))

    def memory(self, call: Call) -> tuple[Tensor, int]:
        """The result of one call, and the peak of the memory it held beside that and its inputs.

        On a GPU by torch's allocator, on a CPU by the profiler's record of torch's allocations:
        what a library takes past torch is not seen.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with _no_stderr():
                recorded.start()
            try:
                result = call()
            finally:
                with _no_stderr():
                    recorded.stop()
            peak = _peak_of_record(recorded)
        return result, max(0, peak - result.untyped_storage().nbytes())

    def free_bytes(self) -> int | None:
        """Memory that can still be taken; None where nobody can tell."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return int(torch.cuda.mem_get_info()[0]) + cached
        try:
            with open("/proc/meminfo") as lines:
                for line in lines:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
        return None

    def forget(self) -> None:
        """Give back memory that nobody uses any more."""
        # What a run leaves behind is young; going through all that was imported takes long.
        gc.collect(1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """For releases of the profiler's library that print a line to the terminal at each turn."""
    # Below Python's sys.stderr: the lines come from C++.
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak_of_record(recorded: Any) -> int:
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def quiet_process(threads: int | None) -> Iterator[None]:
    """No gradients, no garbage collection within a call, and a given number of threads."""
    before = torch.get_num_threads()
    collecting = gc.isenabled()
    if threads:
        torch.set_num_threads(threads)
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class Ceilings:
    """The best that this machine was seen to do.

    Args:
        copy_gb_per_s: bytes read and written by a copy of `copy_bytes`, in 10^9 a second.
        matmul_tflop_per_s: of a square product of `matmul_size` in the inputs' dtype.
        copy_ms, matmul_ms: every sample.
    """

    copy_gb_per_s: float
    matmul_tflop_per_s: float
    copy_bytes: int
    matmul_size: int
    copy_ms: tuple[float, ...]
    matmul_ms: tuple[float, ...]


def measure_ceilings(clock: Clock, dtype: torch.dtype, *, small: bool = False) -> Ceilings:
    """Copy bandwidth and matrix-product rate; a second or two.

    Args:
        small: a thousandth of the work, where no rate will be believed.
    """
    size = CUDA_COPY_BYTES if clock.device.type == "cuda" else CPU_COPY_BYTES
    size = size >> 10 if small else size
    source = torch.ones(size, dtype=torch.uint8, device=clock.device)
    copy_ms = _samples(clock, partial(torch.empty_like(source).copy_, source))
    del source
    clock.forget()
    side, matmul_ms = _matmul(clock, dtype, limit=128 if small else 8192)
    clock.forget()
    return Ceilings(
        copy_gb_per_s=2 * size / min(copy_ms) / 1e6,
        matmul_tflop_per_s=2 * side**3 / min(matmul_ms) / 1e9,
        copy_bytes=size,
        matmul_size=side,
        copy_ms=copy_ms,
        matmul_ms=matmul_ms,
    )


def _matmul(clock: Clock, dtype: torch.dtype, *, limit: int) -> tuple[int, tuple[float, ...]]:
    # On a GPU the largest at once: a size that fills it is not found by doubling a slow start.
    side = limit if clock.device.type == "cuda" else min(512, limit)
    while True:
        # Random numbers: products of constants draw less power and run faster than real ones.
        a = torch.randn(side, side, device=clock.device).to(dtype)
        b = torch.randn(side, side, device=clock.device).to(dtype)
        call = partial(torch.matmul, a, b)
        call()
        if side >= limit or clock.milliseconds(call) >= 1e3 * MATMUL_SECONDS:
            return side, _samples(clock, call)
        side *= 2


def better(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of each rate, for a machine that was busy at one of two times."""
    copy = first if first.copy_gb_per_s >= second.copy_gb_per_s else second
    matmul = first if first.matmul_tflop_per_s >= second.matmul_tflop_per_s else second
    return replace(
        copy,
        matmul_tflop_per_s=matmul.matmul_tflop_per_s,
        matmul_size=matmul.matmul_size,
        matmul_ms=matmul.matmul_ms,
    )


def _samples(clock: Clock, call: Call) -> tuple[float, ...]:
    call()
    return tuple(clock.milliseconds(call) for _ in range(CEILING_ROUNDS))


def device_lives(device: torch.device) -> bool:
    """Whether a device still answers: a kernel that reads where it must not takes it along."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
