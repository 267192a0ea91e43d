"""Backend `flex`: torch's FlexAttention, compiled, over one mask and lists of key blocks.

One call serves a batch whatever its lengths where the pattern is prefix-stable, since causality
hides padding at the right; stochastic attention is one call for each length that occurs.

Run on CPUs and one GPU, an H200. The first call of a family of shapes compiles for some seconds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.plans.chosen import too_long
from sa_patch.kernels.plans.plan import KINDS, plan_of, whole_pass
from sa_patch.kernels.plans.rows import attend_by_length
from sa_patch.kernels.tiling import needs_gradients, take_rows
from sa_patch.patterns import BlockTopK, MoBA, Pattern, parts_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of FlexAttention's GPU kernels.
_SMALLEST_GPU_HEAD_DIM = 16
# On CPUs, narrower heads are widened with zeros. FlexAttention hands its products memory that was
# never written, to be overwritten; on an AMD CPU with AVX2, torch 2.13's library read it instead
# for some key counts of 8 to 56 at a head_dim of 8 and 16 (NaN and garbage), and at none of the
# head_dims from 17 to 128 that were tried.
_SMALLEST_CPU_HEAD_DIM = 32


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    reason = _refusal(pattern, q, k)
    return not reason, reason


def _refusal(pattern: Pattern, q: Tensor, k: Tensor) -> str:
    """Why flex cannot serve a call; empty where it can."""
    for part in parts_of(pattern):
        if not isinstance(part, KINDS):
            return f"flex has no rule for the pattern {part.name!r}"
        if isinstance(part, MoBA | BlockTopK) and (reason := too_long(part, q, k)):
            return reason
    if q.shape[2] != k.shape[2]:
        return "flex serves prefill only: as many queries as keys"
    if q.dtype not in _DTYPES:
        return f"flex takes float32, bfloat16 and float16, not {str(q.dtype).split('.')[-1]}"
    if q.device.type == "cpu":
        if needs_gradients(q, k):
            return "FlexAttention computes no gradients on the CPU"
        if pattern.weighs_scores and q.shape[3] < _SMALLEST_CPU_HEAD_DIM:
            return f"flex pads a head_dim of {q.shape[3]}, which changes what a threshold weighs"
        return _cpu_refusal()
    if q.device.type != "cuda":
        return f"flex runs on CPUs and CUDA GPUs, not on {q.device.type!r}"
    if q.shape[3] < _SMALLEST_GPU_HEAD_DIM:
        return f"FlexAttention needs a head_dim of at least {_SMALLEST_GPU_HEAD_DIM} on GPUs"
    if importlib.util.find_spec("triton") is None:
        return "flex needs Triton on GPUs, and it is not installed"
    return ""


@lru_cache(maxsize=1)
def _cpu_refusal() -> str:
    """What this machine lacks to compile FlexAttention for its CPU; empty where nothing."""
    if sys.platform != "linux":
        return "flex on CPUs was made for Linux only"
    if not torch.cpu._is_avx2_supported():
        return "FlexAttention needs an x86 CPU with AVX2"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"flex compiles C++ on CPUs, and the compiler {compiler!r} is not installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "flex compiles C++ on CPUs, and Python's own headers (Python.h) are not installed"
    return ""


def refuses(softmax: Softmax) -> str:
    if softmax.sink is None:
        return ""
    return "flex has no learned sinks: FlexAttention returns no log-sum-exps on CPUs"


def attend(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    softmax: Softmax = PLAIN,
) -> Tensor:
    if q.device.type == "cpu" and needs_gradients(q, k, v):
        raise UserError("FlexAttention computes no gradients on the CPU")
    narrower = _SMALLEST_CPU_HEAD_DIM - q.shape[3] if q.device.type == "cpu" else 0
    if narrower > 0:
        q, k, v = (torch.nn.functional.pad(x, (0, narrower)) for x in (q, k, v))
    own = {"layer": layer, "scale": scale, "softcap": softmax.softcap}
    out = _attend(pattern, q, k, v, spans, own)
    return out[..., : out.shape[3] - narrower] if narrower > 0 else out


def _attend(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, spans: Spans, own: dict[str, Any]
) -> Tensor:
    def rows(shown: Pattern, *tensors: Tensor) -> Tensor:
        return _attend_rows(shown, *tensors, **own)

    return attend_by_length(pattern, q, k, v, spans, rows)


def _attend_rows(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Whole rows of one length, or of any where the pattern is prefix-stable."""
    # Imported here, for it loads torch's compiler, which takes seconds.
    from sa_patch.kernels.flex.kernel import attend_in_order, blocks_on

    heads, seq_len = q.shape[1:3]
    if seq_len == 1:
        # One token sees itself.
        return v.repeat_interleave(heads // v.shape[1], dim=1)
    plan = plan_of(whole_pass(pattern), q, k, layer=layer, blocks=blocks_on(q.device))
    if not plan.structure.ordered:
        return attend_in_order(plan, q, k, v, scale, softcap)
    q, k, v = (take_rows(x, plan.keys, heads) for x in (q, k, v))
    return take_rows(attend_in_order(plan, q, k, v, scale, softcap), plan.places, heads)


BACKEND = Backend(
    name="flex",
    summary="torch's FlexAttention over a mask and lists of key blocks, compiled; CPU and CUDA",
    supports=supports,
    attend=attend,
    refuses=refuses,
)
