"""FlexAttention whose kernel is FlashAttention-4: full attention, as a rival.

Sources: `torch/nn/attention/flex_attention.py` of torch 2.13 (``kernel_options["BACKEND"]``) and
`torch/_inductor/kernel/flex/flex_flash_attention.py`, which takes static shapes and the block sizes
of FlashAttention-4. Never run on a card.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from sa_patch.kernels.flash.attention4 import blocks_for
from sa_patch.kernels.flash.libraries import LIBRARIES
from sa_patch.kernels.plans.plan import plan_of, whole_pass
from sa_patch.patterns import Full

NAME = "FlexAttention, FLASH"


def flex_flash_refusal(q: Tensor) -> str:
    """Why it takes no part for inputs like q; empty where it does."""
    if "FLASH" not in typing.get_args(getattr(flex, "_Backend", None)):
        return f"torch {torch.__version__} has no FLASH form of FlexAttention"
    if LIBRARIES[0].load() is None:
        return f"the FLASH form of FlexAttention needs {LIBRARIES[0].title}: not installed"
    if not q.is_cuda:
        return f"the FLASH form of FlexAttention runs on CUDA GPUs only, not on {q.device.type!r}"
    return ""


def causal_by_flex_flash(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Full causal attention: q ``[batch, heads, n, head_dim]``, k and v of KV heads."""
    out: Tensor = _compiled()(
        q,
        k,
        v,
        block_mask=_causal_blocks(q.shape[2], q.device, q.shape[3]),
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options={"BACKEND": "FLASH"},
    )
    return out


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex.flex_attention, dynamic=False)
    return compiled


@lru_cache(maxsize=4)
def _causal_blocks(n: int, device: torch.device, head_dim: int) -> flex.BlockMask:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    blocks = blocks_for(major, head_dim)
    heads = torch.zeros(1, 1, n, 1, device=device)
    lists = plan_of(whole_pass(Full()), heads, heads, layer=0, blocks=blocks).lists
    return flex.BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=(blocks.queries, blocks.keys),
        mask_mod=lambda batch, head, i, j: i >= j,
        seq_lengths=(n, n),
        compute_q_blocks=False,
    )
