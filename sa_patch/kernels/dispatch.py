"""The backends by name, the automatic choice among them, and `sparse_attention`."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import UserError, suggest
from sa_patch.kernels import reference
from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans, as_scored, check_starts
from sa_patch.kernels.banded import backend as banded
from sa_patch.kernels.dense_tail import with_tail
from sa_patch.kernels.flash import backend as flash
from sa_patch.kernels.flex import backend as flex
from sa_patch.kernels.inputs import (
    autocasts,
    check_factor,
    check_tensors,
    in_widths,
    outside_autocast,
)
from sa_patch.kernels.self_check import failure
from sa_patch.kernels.tiling import needs_gradients
from sa_patch.kernels.triton import backend as triton_backend
from sa_patch.patterns import ByHead, Pattern, split_tail
from sa_patch.patterns.rivals.by_head import in_order

BACKENDS: dict[str, Backend] = {
    # `reference` takes every pattern by its definition, and is what the others are held against.
    reference.BACKEND.name: reference.BACKEND,
    **{
        module.BACKEND.name: with_tail(module.BACKEND, fallback=banded.BACKEND)
        for module in (banded, flex, flash, triton_backend)
    },
}

# Up to this many keys `auto` takes the dense mask, and `banded` beyond; twice as many in half
# precision, whose matrix products are faster. Measured by `scripts/bench_attention --short` on 2
# cores (one row, 9 query and 3 KV heads of 64): time of `banded` over time of `reference` at
# n = 128, 256, 512, 1024 in fp32 | n = 256, 512, 1024 in bf16
#   SWA w = 32: 0.99, 0.53, 0.24, 0.13 | 1.3, 0.54, 0.23    w = 128: 0.99, 0.82, 0.42, 0.24 | 1.1,
#   0.57, 0.29
#   SA w = 32: 2.2, 1.4, 0.63, 0.33 | 1.7, 0.91, 0.43    w = 128: 0.92, 2.0, 1.1, 0.51 | 2.1, 1.3,
#   0.63
#   MoBA, blocks of 16: 3.2, 1.6, 0.69, 0.25 | 2.1, 1.0, 0.47    of 64: 0.97, 1.8, 0.73, 0.27 | 2.4,
#   1.1, 0.49
# On CPUs `flex` is behind `banded` at all lengths measured (eval/results/attention). On an H200
# (eval/results/gpu, first table) `triton` is ahead of both for SA, SWA and MoBA from 2,048 tokens,
# in bf16, and torch's own attention, which `banded` calls, ahead of it where nothing is hidden. Not
# compared there: shorter prompts, fp32, PSA, block choices and unions.
_DENSE_KEYS, _DENSE_KEYS_DRAWN = 128, 256

# What sparse prompts are given to on CUDA, the first that can serve; by major compute capability
# and whether the pattern chooses by content. FlashAttention-4 where it is installed comes first on
# Hopper and Blackwell on PyTorch's word, that it outruns Triton under the same masks there. Choices
# of single queries spread over most key blocks of a tile (`sa-patch bench --plan`: 15,099 keys for
# 299 visible ones in block_topk at 32K), which Triton's kernels avoid. Measurements are to change
# this.
_FUSED_ORDER: dict[tuple[int, bool], tuple[str, ...]] = {
    (9, False): ("flash", "triton"),
    (10, False): ("flash", "triton"),
    (9, True): ("triton", "flash"),
    (10, True): ("triton", "flash"),
}
_ANY_CARD = ("triton",)


def _dense_keys(pattern: Pattern, dtype: torch.dtype) -> int:
    bands = pattern.prefix_stable and not pattern.reads_content
    return (_DENSE_KEYS if bands else _DENSE_KEYS_DRAWN) * (1 if dtype.itemsize >= 4 else 2)


def check_backend(name: str) -> str:
    """Return `name` if it is "auto" or a known backend.

    Raises:
        UserError: otherwise, with the nearest known name.
    """
    known = ["auto", *BACKENDS]
    if name not in known:
        raise UserError(
            f"unknown backend {name!r}{suggest(str(name), known)} known: {', '.join(known)}"
        )
    return name


def choose_backend(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    backend: str = "auto",
    *,
    v: Tensor | None = None,
    softmax: Softmax = PLAIN,
) -> Backend:
    """The backend that serves a call.

    Args:
        q, k: ``[batch, q_heads, nq, head_dim]`` and ``[batch, kv_heads, n, head_dim]``.
        backend: a name, which must be able, or "auto" for the fastest that is able. On CUDA that is
            the first of `_FUSED_ORDER` for prompts that a pattern does not saturate, once one small
            case of its kind has been compared with `reference` there.
        v: like k; whether it needs a gradient is asked as well.
        softmax: of the layer.

    Raises:
        UserError: for an unknown name, or a named backend that cannot serve (with its reason).
    """
    if check_backend(backend) != "auto":
        _, reason = BACKENDS[backend].supports(pattern.computed_as, q, k)
        reason = reason or BACKENDS[backend].refuses(softmax)
        if reason:
            raise UserError(f"backend {backend!r} cannot serve {pattern}: {reason}")
        return BACKENDS[backend]
    pattern = pattern.computed_as
    banded_ok, _ = BACKENDS["banded"].supports(pattern, q, k)
    if _fused_device(q.device):
        fused = _fused(pattern, q, k, v, softmax)
        if fused is not None:
            return fused
        # Torch's own attention, without a mask.
        if banded_ok and q.shape[2] == k.shape[2] and pattern.saturated(k.shape[2]):
            return BACKENDS["banded"]
    if k.shape[2] <= _dense_keys(pattern, q.dtype) or not banded_ok:
        return BACKENDS["reference"]
    return BACKENDS["banded"]


def _fused_device(device: torch.device) -> bool:
    return device.type == "cuda"


def _fused_order(pattern: Pattern, device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return _ANY_CARD
    major = torch.cuda.get_device_capability(device)[0]
    return _FUSED_ORDER.get((major, pattern.reads_content), _ANY_CARD)


def _fused(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor | None, softmax: Softmax
) -> Backend | None:
    """The first that takes a call, a sparse prompt: that can serve it and serves right here."""
    if q.shape[2] == 1 or pattern.saturated(k.shape[2]):
        return None
    if needs_gradients(q, k, *(() if v is None else (v,))):
        return None
    kind = split_tail(pattern)[0]
    for name in _fused_order(pattern, q.device):
        backend = BACKENDS[name]
        able, _ = backend.supports(pattern, q, k)
        able = able and not backend.refuses(softmax)
        # Older FlashAttention libraries were not compared with `triton`.
        if name == "flash" and not flash.attention4_serves(kind, q, k):
            continue
        if able and not failure(backend, kind, q, k, softmax):
            return backend
    return None


def attend(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    backend: str = "auto",
    softmax: Softmax = PLAIN,
) -> Tensor:
    """`sparse_attention` for callers that hold the rows' spans as integers already.

    Args:
        v: vectors of any length, which is that of the result's as well.
    """
    scale = check_factor("scale", scale)
    if pattern.weighs_scores and not pattern.looks_ahead:
        # Backends choose by the queries that they are given, whatever the scale.
        q, scale = as_scored(pattern, q, scale).to(q.dtype), q.shape[3] ** -0.5
    same: dict[str, Any] = {"layer": layer, "scale": scale, "softmax": softmax}
    whole = same | {"spans": spans, "backend": backend}
    if autocasts(q.device):
        with outside_autocast(q, k, v) as cast:
            return attend(pattern, *cast, **whole)
    if q.shape[3] != v.shape[3]:
        parts = [attend(pattern, q, k, part, **whole) for part in in_widths(v, q.shape[3])]
        return torch.cat(parts, dim=3)[..., : v.shape[3]]
    if isinstance(pattern, ByHead):
        return _attend_by_head(pattern, q, k, v, **whole)
    if spans.packed_in is not None:
        return _attend_packed(pattern, q, k, v, **whole)
    check_starts(pattern, spans)
    chosen = choose_backend(pattern, q, k, backend, v=v, softmax=softmax)
    pattern = pattern.computed_as
    padded_keys = spans.padded_keys(k.shape[2], k.device)
    padded_queries = spans.padded_queries(q.shape[2], q.device)
    # Padding may hold anything, NaN too, and 0 * NaN would reach real rows.
    if padded_keys is not None:
        k = k.masked_fill(padded_keys[:, None, :, None], 0)
        v = v.masked_fill(padded_keys[:, None, :, None], 0)
    if padded_queries is not None:
        q = q.masked_fill(padded_queries[:, None, :, None], 0)
    out = chosen.attend(pattern, q, k, v, spans=spans, **same)
    if padded_queries is not None:
        out = out.masked_fill(padded_queries[:, None, :, None], 0)
    return out


def _attend_by_head(
    pattern: ByHead, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, **same: Any
) -> Tensor:
    """The heads of each pattern by themselves.

    Args:
        same: what all are given alike.
    """
    heads: list[int] = []
    parts = []
    values = [content["k"] for _, _, content in pattern.split(q.shape[1], None, v)]
    for own_v, (own, mine, content) in zip(values, pattern.split(q.shape[1], q, k), strict=True):
        heads += mine
        own_softmax = softmax.of_heads(mine)
        parts.append(attend(own, content["q"], content["k"], own_v, softmax=own_softmax, **same))
    return in_order(parts, heads, 1)


def _attend_packed(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, spans: Spans, backend: str, **same: Any
) -> Tensor:
    """Rows of several sequences: at once where the backend can, else one sequence after another.

    Args:
        same: what every sequence is given alike.
    """
    chosen = choose_backend(pattern, q, k, backend, v=v, softmax=same["softmax"])
    if chosen.packs(pattern.computed_as):
        return chosen.attend(pattern.computed_as, q, k, v, spans=spans, **same)
    # Tokens before heads in memory, as models want it next.
    parts = [
        attend(
            pattern, *sequence, spans=Spans((sequence[0].shape[2],), (0,)), backend=backend, **same
        ).transpose(1, 2)
        for sequence in spans.sequences(q, k, v)
    ]
    return torch.cat(parts, dim=1).unflatten(1, (len(q), -1))[0].transpose(1, 2)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    layer: int = 0,
    lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention in which each query sees only the keys that `pattern` makes visible.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``, with rotary embeddings applied. Fewer queries
            than keys are the last ones of each sequence; they begin with a tile of queries
            where the pattern's choices are shared (``shared`` of `BlockTopK`).
        k, v: ``[batch, kv_heads, n, head_dim]``; `q_heads` is a multiple of `kv_heads`.
        pattern: which keys are visible.
        layer: index of the layer, for patterns drawn anew in each layer.
        lengths: integers ``[batch]``, the real tokens of right-padded rows; all n by default.
            Padding is never seen, whatever it holds.
        scale: factor of the scores, above 0; ``head_dim ** -0.5`` by default.
        backend: "auto", or a name in `BACKENDS`.
        softcap: above 0; every scaled score s becomes ``softcap * tanh(s / softcap)`` (Gemma 2).
        sink: ``[q_heads]``, of each head the score of one more key, whose value is zero (gpt-oss).

    Returns:
        ``[batch, q_heads, nq, head_dim]``, zero at padding; of autocast's dtype where that is on.

    Raises:
        UserError: for inputs that do not fit together, numbers out of range, or a backend that is
            unknown or cannot serve.
    """
    if not isinstance(pattern, Pattern):
        raise UserError(f"pattern must be a pattern such as SA(window=128), got {pattern!r}")
    if not isinstance(layer, Integral):
        raise UserError(f"layer must be a whole number such as 0, got {layer!r}")
    check_tensors(q, k, v)
    softmax = Softmax.read(q, softcap, sink)
    spans = Spans.of(q, k, lengths)
    if not q.numel():
        return q.new_zeros(q.shape)
    return attend(
        pattern,
        q,
        k,
        v,
        layer=layer,
        spans=spans,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        backend=backend,
        softmax=softmax,
    )
