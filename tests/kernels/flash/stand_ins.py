"""Stand-ins for the FlashAttention libraries: their parameters, their checks, computed in float32.

Parameter names and order, window sentinels and results are those of flash_attn 2.8.3,
FlashAttention-3 (hopper/flash_attn_interface.py at 01afd16, fa3_fwd 0.0.3) and flash-attn-4
4.0.0b36. An argument that the library does not have raises TypeError, as there. Their parameters
bear no types here, so that they can be compared with the originals at a glance.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def band(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None, right: int | None
) -> Tensor:
    """One row: q ``[nq, heads, d]``, k and v ``[n, kv_heads, d]``; aligned to the last key."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.float(), keys) * scale
    offset = len(k) - len(q)
    behind = torch.arange(len(q))[:, None] + offset - torch.arange(len(k))
    seen = torch.ones_like(behind, dtype=torch.bool)
    if left is not None:
        seen &= behind <= left
    if right is not None:
        seen &= behind >= -right
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weights, values).to(q.dtype)


def check(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.ndim == k.ndim == v.ndim == (3 if packed else 4)
    assert k.shape == v.shape and q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head_dim must be a multiple of 8"
    assert q.shape[-2] % k.shape[-2] == 0
    assert packed or q.shape[0] == k.shape[0]
    assert all(x.stride(-1) == 1 for x in (q, k, v))


def rows(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, *limits: Any
) -> Tensor:
    """Every row of a batch, or of packed rows, by `band`."""
    check(q, k, v, packed=cu_q is not None)
    if cu_q is None or cu_k is None:
        return torch.stack([band(*row, *limits) for row in zip(q, k, v, strict=True)])
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q) and cu_k[-1] == len(k)
    parts = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return torch.cat([band(q[a:b], k[c:d], v[c:d], *limits) for a, b, c, d in parts])


def check_longest(cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any) -> None:
    """A bound that is too small makes the real kernels skip tokens."""
    assert isinstance(max_q, int) and isinstance(max_k, int)
    assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()


def signed(causal: bool, window: tuple[int, int]) -> tuple[int | None, int | None]:
    """The window of generations 2 and 3: negative is unlimited, causal closes the right."""
    assert all(isinstance(side, int) for side in window)
    left, right = (None if side < 0 else side for side in window)
    return left, 0 if causal else right


def flash_attn_2() -> ModuleType:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and softmax_scale is not None
        return rows(q, k, v, None, None, softmax_scale, *signed(causal, window_size))

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check_longest(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        # Dao-AILab/flash-attention issues 1537 and 1619.
        assert cu_seqlens_q.diff().min() > 0, "shape is invalid for input of size"
        limits = signed(causal, window_size)
        return rows(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *limits)

    return module("flash_attn.flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def flash_attn_3(name: str, lacks: tuple[str, ...] = (), with_lse: bool = False) -> ModuleType:
    """`lacks` are build flags such as LOCAL; early versions returned the log-sum-exp as well."""

    def result(q: Tensor, out: Tensor, window: tuple[int | None, int | None]) -> Any:
        if "LOCAL" in lacks and window not in ((None, None), (None, 0)):
            raise RuntimeError("This flash attention build does not support local attention.")
        if "FP16" in lacks and q.dtype == torch.float16:
            raise RuntimeError("This flash attention build does not support FP16.")
        return (out, torch.zeros(1)) if with_lse else out

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        limits = signed(causal, window_size)
        return result(q, rows(q, k, v, None, None, softmax_scale, *limits), limits)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
        k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        check_longest(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        limits = signed(causal, window_size)
        out = rows(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *limits)
        return result(q, out, limits)

    return module(name, flash_attn_func, flash_attn_varlen_func)


def build_flags(name: str, lacks: tuple[str, ...]) -> ModuleType:
    """The configuration module beside generation 3, such as `fa3_fwd_config`."""
    made = ModuleType(name)
    flags = ("LOCAL", "FP16", "BACKWARD", "VARLEN", "SM8x", "HDIM64", "HDIM128", "HDIM256")
    built = {f"FLASHATTENTION_DISABLE_{flag}": flag in lacks for flag in flags}
    made.CONFIG = {"build_flags": built}  # type: ignore[attr-defined]
    return made


def flash_attn_4() -> ModuleType:
    def limited(
        causal: bool, window: tuple[int | None, int | None]
    ) -> tuple[int | None, int | None]:
        left, right = window
        if left is not None and right is not None and left < 0 and right < 0:
            left = right = None
        # A single negative side is taken at its word here, unlike in generations 2 and 3.
        return left, 0 if causal else right

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
        aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None,
        return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        limits = limited(causal, window_size)
        return rows(q, k, v, None, None, softmax_scale, *limits), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
        scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        check_longest(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        limits = limited(causal, window_size)
        return rows(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *limits), None

    return module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


def module(name: str, *functions: Any) -> ModuleType:
    made = ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made
