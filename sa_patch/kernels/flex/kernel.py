"""The one call of compiled FlexAttention.

What is compiled anew: a structure of the mask, and what `_attend` says. Sequence length, batch size
and a pattern's numbers are inputs of the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from sa_patch.errors import UserError
from sa_patch.kernels.plans.block_lists import Blocks, Lists
from sa_patch.kernels.plans.mask import mask_function
from sa_patch.kernels.plans.plan import Plan
from sa_patch.kernels.plans.tables import Structure

# Compilations before a call fails. Dynamo's own bound, 8, is soon met by models of different widths
# in one process.
_MOST_COMPILATIONS = 128

_COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


# Measured at n = 2048, 8 query and 2 KV heads of 64, one CPU thread, SWA w = 256 and 64 in fp32,
# milliseconds for blocks of 32, 64, 128, 256: 36, 37, 47, 61 and 14, 17, 33, 59; in bf16
# 13, 9.1, 9.0, 10.5 and 5.1, 4.4, 6.4, 8.9. On GPUs 128 is what FlexAttention's tiles divide.
# At least two of everything, because sizes of 1 are compiled in.
_CPU_BLOCKS, _GPU_BLOCKS = Blocks(64, 64, least=2), Blocks(128, 128, least=2)


class _Uncompiled(UserError):
    """A call was run as plain Python."""


def blocks_on(device: torch.device) -> Blocks:
    """How FlexAttention cuts tokens there."""
    return _CPU_BLOCKS if device.type == "cpu" else _GPU_BLOCKS


def attend_in_order(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of tokens that stand in the order of the plan.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        softcap: of `Softmax`.

    Raises:
        UserError: if torch did not compile it.
    """
    graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not graded:
        q, k, v = q.detach(), k.detach(), v.detach()
    lists = _lists_of_heads(plan.lists, q.shape[1])
    # As a number it would be compiled in, or be a symbol, which FlexAttention does not take.
    cap = None if softcap is None else torch.full((), softcap, device=q.device)
    with (
        torch.set_grad_enabled(graded),
        torch._dynamo.config.patch(recompile_limit=_MOST_COMPILATIONS, specialize_int=True),
        # Otherwise sizes that are equal by chance in the first call are compiled in as equal, and
        # batches of one row. The second is not tried on GPUs.
        fx_config.patch(  # type: ignore[attr-defined]
            use_duck_shape=False, backed_size_oblivious=q.device.type == "cpu"
        ),
    ):
        try:
            return _compiled(q, k, v, lists, plan.tables, plan.structure, scale, cap)
        except _Uncompiled:
            # Dynamo would go on to skip this code for good.
            reset_code(_attend.__code__)
            raise
        except _COMPILER_ERRORS as error:
            first_line = str(error).strip().partition("\n")[0]
            raise UserError(f"flex could not be compiled: {first_line}") from error


def _lists_of_heads(lists: Lists, heads: int) -> Lists:
    """The lists for every query head where KV heads differ, as wide as all rows.

    FlexAttention's CPU template takes their width for the number of key blocks, and so do
    gradients, for which it turns them round.
    """
    choosers, rows, width = lists.blocks.shape[1:]
    each = heads // choosers if choosers > 1 else 1
    counts, blocks, whole_counts, whole_blocks = (x.repeat_interleave(each, dim=1) for x in lists)
    room = (0, rows - width)
    return Lists(counts, pad(blocks, room), whole_counts, pad(whole_blocks, room))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    tables: Tensor,
    structure: Structure,
    scale: float,
    cap: Tensor | None,
) -> Tensor:
    """Compiled for every number of heads, head_dim, dtype, device, scale and memory layout."""
    # Run without compilation, FlexAttention ignores the lists and builds all n x n scores.
    if not torch.compiler.is_compiling():
        raise _Uncompiled(
            "flex must be compiled, and torch did not: compilation is turned off, or a "
            "TorchDispatchMode is active"
        )
    blocks = blocks_on(q.device)
    block_mask = BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=(blocks.queries, blocks.keys),
        mask_mod=mask_function(tables, structure),
        seq_lengths=(q.shape[2], k.shape[2]),
        # Only gradients walk the lists from the keys' side.
        compute_q_blocks=torch.is_grad_enabled(),
    )
    out: Tensor = flex_attention(
        q,
        k,
        v,
        score_mod=None if cap is None else score_cap(cap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        # Its kernel for short queries would be compiled beside the other below 128 tokens.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out


def score_cap(cap: Tensor) -> Callable[..., Tensor]:
    """What `Softmax` does to scaled scores, for a cap of shape ``[]``."""
    return lambda score, *place: cap * torch.tanh(score / cap)


_compiled = torch.compile(
    _attend, dynamic=True, fullgraph=True, options={"assert_indirect_indexing": False}
)
