"""FlashAttention-4 over a block plan: our mask in CuTe, our lists, one call.

A kernel is compiled for each structure of a mask, soft cap, dtype, head_dim and group of query
heads; windows, seeds, lengths and the numbers of a pattern are arguments. The library keeps
compiled kernels on disk where FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED is set to 1.

Source: flash-attn-4 4.0.0b36 (`flash_attn/cute/interface.py`). Compiled for cards that were not
there; never run on one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from sa_patch.kernels.flash.walk import Kernel, MaskKind
from sa_patch.kernels.plans.block_lists import Blocks, Lists
from sa_patch.kernels.plans.mask import visible
from sa_patch.kernels.plans.pages import PagedPlan, paged_mask
from sa_patch.kernels.plans.tables import Structure

# Rows of a tile of queries, by major capability; two tiles are in flight on 10.x.
_ROWS = {8: 128, 9: 128, 10: 256, 11: 256}
# Wider heads leave shared memory for fewer keys.
_KEYS, _KEYS_OF_WIDE_HEADS, _WIDE = 128, 64, 128

# What was compiled, or found in the library's cache, in this process.
_KNOWN: set[Hashable] = set()


def blocks_for(major: int, head_dim: int) -> Blocks:
    """Rows and keys that the kernel takes at once on cards of this major capability."""
    few = head_dim > _WIDE or major == 8
    return Blocks(_ROWS[major], _KEYS_OF_WIDE_HEADS if few else _KEYS)


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    mask: MaskKind,
    blocks: Blocks,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Passes by lists: one call of FlashAttention-4, inference only."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    plan = mask.plan
    out, lse = _call(
        (softcap, plan.structure, mask.fold, q.dtype, q.shape[1] // k.shape[1], q.shape[3]),
        plan.numbers.tolist(),
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        softcap=softcap,
        mask_mod=cute_mask(plan.structure, mask.fold, mask.kv_heads),
        aux_tensors=[plan.tables],
        block_sparse_tensors=BlockSparseTensorsTorch(
            *lists, block_size=(blocks.queries, blocks.keys)
        ),
    )
    return out.transpose(1, 2), lse


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    plan: PagedPlan,
    group: int,
    blocks: Blocks,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Passes by pages: one call of FlashAttention-4, inference only."""
    out, lse = _call(
        (softcap, "pages", plan.page, plan.shared, group, q.dtype, q.shape[3]),
        plan.numbers,
        q.transpose(1, 2),
        k,
        v,
        page_table=page_table,
        seqused_k=plan.used.flatten(),
        softmax_scale=scale,
        softcap=softcap,
        mask_mod=cute_paged_mask(plan.page, plan.shared, group),
        aux_tensors=[plan.tables],
        # Whole steps of keys are listed, and a tile's rows are 128.
        tile_mn=(_ROWS[9], blocks.keys),
    )
    return out.transpose(1, 2), lse


def _call(
    kind: Hashable, numbers: Sequence[int], *tensors: Tensor, **given: Any
) -> tuple[Tensor, Tensor]:
    """A call of the library, and once for each kind how long it took to be ready."""
    import cutlass
    from flash_attn.cute.interface import _flash_attn_fwd

    began = time.perf_counter()
    scalars = tuple(map(cutlass.Int32, numbers))
    out, lse, *_ = _flash_attn_fwd(*tensors, aux_scalars=scalars, return_lse=True, **given)
    if kind not in _KNOWN:
        _KNOWN.add(kind)
        seconds = time.perf_counter() - began
        logging.getLogger(__name__).info(
            "FlashAttention-4 was ready for %s in %.1f s", kind, seconds
        )
    return out, lse


@lru_cache(maxsize=256)
def cute_mask(structure: Structure, fold: int, kv_heads: int) -> Any:
    """`visible` as a mask function of FlashAttention-4.

    Args:
        fold: query heads whose rows follow each other, 1 for none.
        kv_heads: where rows are folded, how many rows of the batch are one of the model's.
    """
    import cutlass
    from flash_attn.cute import utils

    def mask(batch: Any, head: Any, i: Any, j: Any, lengths: Any, tables: Any, numbers: Any) -> Any:
        batch, head, i, j = (x[0] for x in (batch, head, i, j))
        if fold > 1:
            head, i = (batch % kv_heads) * fold + i % fold, i // fold
            batch = batch // kv_heads
        seen = visible(
            structure,
            lambda number: numbers[number],
            lambda index: tables[0][index],
            lambda truth: truth.to(cutlass.Int32),
            batch,
            head,
            i,
            j,
        )
        return utils.scalar_to_ssa(seen, cutlass.Boolean)

    # What the library tells compiled masks apart by; its own way would read the source of this one
    # alone.
    mask.__cute_hash__ = f"sa_patch {structure} {fold} {kv_heads}"  # type: ignore[attr-defined]
    return mask


@lru_cache(maxsize=64)
def cute_paged_mask(page: int, shared: int, group: int) -> Any:
    """`paged_mask` as a mask function of FlashAttention-4."""
    import cutlass
    from flash_attn.cute import utils

    def mask(batch: Any, head: Any, i: Any, j: Any, lengths: Any, tables: Any, numbers: Any) -> Any:
        seen = paged_mask(
            page,
            shared,
            lambda number: numbers[number],
            lambda index: tables[0][index],
            lambda truth: truth.to(cutlass.Int32),
            batch[0],
            i[0] // group,
            j[0],
        )
        return utils.scalar_to_ssa(seen, cutlass.Boolean)

    mask.__cute_hash__ = f"sa_patch pages {page} {shared} {group}"  # type: ignore[attr-defined]
    return mask


KERNEL = Kernel(attend_lists, attend_pages)
