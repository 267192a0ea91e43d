"""Who is measured: every method on every backend, and the rivals beside them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.benchmark.attention.flex_flash import NAME as FLEX_FLASH
from sa_patch.benchmark.attention.flex_flash import causal_by_flex_flash, flex_flash_refusal
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS, Backend, sparse_attention
from sa_patch.kernels.flash import backend as flash
from sa_patch.kernels.flash.libraries import Library
from sa_patch.kernels.triton.backend import interpreting
from sa_patch.patterns import SA, SWA, Full, Pattern

BASELINE = "SDPA full"
# Before what a rival that takes no part would have computed.
RIVAL = "rival: "
SDPA_KERNELS = {
    "torch, flash": SDPBackend.FLASH_ATTENTION,
    "torch, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class TwoSidedBand(Pattern):
    """Keys with ``|i - j| < window``: stochastic attention's band before causality.

    Not one to patch a model with, for it looks into the future: a rival's task, on which fused
    kernels show what the hardware gives for a band of this width.
    """

    window: int
    name = "band"

    def visible(self, query_positions: Tensor, seq_len: int, **rest: Any) -> Tensor:
        keys = torch.arange(seq_len, device=query_positions.device)
        return ((query_positions[:, None] - keys).abs() < self.window)[None]

    def keys_per_query(self, seq_len: int) -> Tensor:
        positions = torch.arange(seq_len, dtype=torch.float64)
        before = positions.clamp(max=self.window - 1)
        return 1 + before + before.flip(0)

    def saturated(self, seq_len: int) -> bool:
        return self.window >= seq_len

    @property
    def effective_window(self) -> int:
        return self.window

    def __str__(self) -> str:
        return f"two-sided band ({self.window - 1}, {self.window - 1})"


class Call(Protocol):
    """q ``[batch, heads, n, head_dim]``, k and v ``[batch, kv_heads, n, head_dim]``."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor: ...


@dataclass(frozen=True)
class Candidate:
    """One thing that is measured.

    Args:
        label: what is computed: a pattern's text form, or a rival's name.
        backend: who computes it: a backend's name, "torch" or FlashAttention's version.
        shown: which keys are visible.
        dense: whether its time and memory grow as n squared whatever the pattern.
        rival: whether it is no backend of this package.
    """

    label: str
    backend: str
    shown: Pattern
    call: Call
    dense: bool = False
    rival: bool = False

    @property
    def key(self) -> str:
        return f"{self.label} | {self.backend}"

    def needed_work(self, n: int) -> float:
        """Multiply-adds in units of head_dim for one head: visible pairs twice, choosing once."""
        # Every pattern's expected number of visible pairs is its exact number: stochastic attention
        # sees each pair of near slots once, whatever the permutation.
        pairs = float(self.shown.keys_per_query(n).sum())
        return 2 * pairs + float(self.shown.selection_dots(n).sum())

    def time_growth(self, shorter: int, longer: int) -> float:
        """Time goes with the FLOPs that the pattern needs; a dense mask's with n squared."""
        if self.dense:
            return (longer / shorter) ** 2
        return self.needed_work(longer) / self.needed_work(shorter)

    def memory_growth(self, shorter: int, longer: int) -> float:
        return float((longer / shorter) ** (2 if self.dense else 1))


@dataclass(frozen=True)
class NotServed:
    """A method that a backend refuses, in the backend's own words."""

    label: str
    backend: str
    reason: str


def gather(
    patterns: Sequence[Pattern], backends: Sequence[str], q: Tensor, k: Tensor
) -> tuple[list[Candidate], list[NotServed]]:
    """The contestants for inputs like q and k, the baseline first, and who could not take part."""
    found = [_baseline()]
    refused = []
    # What compiles for long comes last: where it uses up the time, the others have theirs.
    pairs = sorted(itertools.product(patterns, backends), key=lambda pair: pair[1] == "flex")
    for pattern, name in pairs:
        if reason := refusal(pattern, BACKENDS[name], q, k):
            refused.append(NotServed(str(pattern), name, reason))
        else:
            found.append(_on_backend(pattern, name))
    served = {(one.label, one.backend) for one in found}
    windows = [p.window for p in patterns if isinstance(p, (SA, SWA))]
    rivals, absent = _dense_rivals(q, k)
    banded, no_bands = _banded_rivals(list(dict.fromkeys(windows)), q, k)
    # A band that backend `flash` has served already is no rival's too.
    found += [*rivals, *(one for one in banded if (one.label, "flash") not in served)]
    refused += absent + no_bands
    if q.is_cuda:
        found += [_sdpa_by(name, kind) for name, kind in SDPA_KERNELS.items()]
    if "flex" in backends:
        if reason := flex_flash_refusal(q):
            refused.append(NotServed(f"{RIVAL}full", FLEX_FLASH, reason))
        else:
            found.append(Candidate("full", FLEX_FLASH, Full(), causal_by_flex_flash, rival=True))
    return found, refused


def refusal(
    pattern: Pattern, backend: Backend, q: Tensor, k: Tensor, *, interpreted: bool = False
) -> str:
    """Why a backend has no time for a pattern on inputs like q and k; empty where it has one.

    Args:
        interpreted: whether kernels in Triton's interpreter may take part, whose times mean
            nothing.
    """
    ok, reason = backend.supports(pattern, q, k)
    if not ok:
        return reason
    interpreter = backend.name == "triton" and (q.device.type == "cpu" or interpreting())
    if interpreter and not interpreted:
        return "interpreted kernels run for correctness, never for time"
    return ""


def _on_backend(pattern: Pattern, backend: str) -> Candidate:
    def call(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return sparse_attention(q, k, v, pattern, layer=layer, backend=backend)

    return Candidate(str(pattern), backend, pattern, call, dense=backend == "reference")


def _baseline() -> Candidate:
    def call(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    return Candidate(BASELINE, "torch", Full(), call, rival=True)


def _sdpa_by(name: str, kind: SDPBackend) -> Candidate:
    """SDPA with one of torch's kernels, which it may not choose by itself."""
    plain = _baseline().call

    def call(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        with sdpa_kernel(kind):
            return plain(q, k, v, layer)

    return Candidate(BASELINE, name, Full(), call, rival=True)


def _dense_rivals(q: Tensor, k: Tensor) -> tuple[list[Candidate], list[NotServed]]:
    """Full attention by each generation of FlashAttention; or why one takes no part."""
    found: list[Candidate] = []
    refused: list[NotServed] = []
    for title, library in flash.able_libraries(q, k).items():
        if isinstance(library, str):
            refused.append(NotServed(f"{RIVAL}full", title, library))
        else:
            call = _flash_full(library)
            found.append(Candidate("full", str(library.version()), Full(), call, rival=True))
    return found, refused


def _banded_rivals(
    windows: Sequence[int], q: Tensor, k: Tensor
) -> tuple[list[Candidate], list[NotServed]]:
    """The newest FlashAttention that can on bands; or why none takes part."""
    try:
        library = flash.serving(q, k, windowed=True)
    except UserError as error:
        return [], [NotServed(f"{RIVAL}bands", "FlashAttention", str(error))]
    bands = {TwoSidedBand(w): (w - 1, w - 1) for w in windows} | {
        SWA(w): (w - 1, 0) for w in windows
    }
    return [
        Candidate(str(shown), library, shown, _flash_band(*sides), rival=True)
        for shown, sides in bands.items()
    ], []


def _flash_full(library: Library) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return flash.full(q, k, v, 1 / math.sqrt(q.shape[3]), library)

    return call


def _flash_band(left: int, right: int) -> Call:
    """The keys up to so many before and after a query."""

    def call(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return flash.banded(q, k, v, left, right, 1 / math.sqrt(q.shape[3]))

    return call
