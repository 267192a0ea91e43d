"""The one mask, and the one call of compiled FlexAttention.

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

from sa_patch.errors import UserError
from sa_patch.kernels.backend import Softmax
from sa_patch.kernels.flex.plan import Plan, Structure, block_size

# Compilations before a call fails. Dynamo's own bound, 8, is soon met by models of different widths
# in one process.
_MOST_COMPILATIONS = 128

_COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


class _Uncompiled(UserError):
    """A call was run as plain Python."""


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
            return _compiled(q, k, v, plan.lists, plan.tables, plan.structure, scale, softcap)
        except _Uncompiled:
            # Dynamo would go on to skip this code for good.
            reset_code(_attend.__code__)
            raise
        except _COMPILER_ERRORS as error:
            first_line = str(error).strip().partition("\n")[0]
            raise UserError(f"flex could not be compiled: {first_line}") from error


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, ...],
    tables: Tensor,
    structure: Structure,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compiled for every number of heads, head_dim, dtype, device, scale and memory layout."""
    # Run without compilation, FlexAttention ignores the lists and builds all n x n scores.
    if not torch.compiler.is_compiling():
        raise _Uncompiled(
            "flex must be compiled, and torch did not: compilation is turned off, or a "
            "TorchDispatchMode is active"
        )
    block = block_size(q.device)
    counts, blocks, whole_counts, whole_blocks = lists
    block_mask = BlockMask.from_kv_blocks(
        counts,
        blocks,
        whole_counts,
        whole_blocks,
        BLOCK_SIZE=(block, block),
        mask_mod=mask_function(tables, structure),
        seq_lengths=(q.shape[2], k.shape[2]),
        # Only gradients walk the lists from the keys' side.
        compute_q_blocks=torch.is_grad_enabled(),
    )

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return Softmax(softcap).cap(score)

    out: Tensor = flex_attention(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        # Its kernel for short queries would be compiled beside the other below 128 tokens.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out


_compiled = torch.compile(
    _attend, dynamic=True, fullgraph=True, options={"assert_indirect_indexing": False}
)


def mask_function(
    tables: Tensor, structure: Structure
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``visible(batch, head, i, j)``: whether the query in place i sees the key in place j.

    Args:
        tables, structure: of a `Plan`.
    """
    # Five numbers each, as `plan._tables` writes them.
    rings = [5 * (1 + ring) for ring in range(structure.rings)]
    choices = [5 * (1 + len(rings) + choice) for choice in range(len(structure.halvings))]

    def at(number: int, head: Tensor, place: Tensor) -> Tensor:
        return tables[tables[number].long() + tables[number + 1] * head + place]

    def within_reach(ring: int, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (at(ring, head, i) - at(ring, head, j)).abs()
        reach = at(ring + 2, head, i)
        return (distance <= reach) | (distance >= tables[ring + 4] - reach)

    def in_chosen_block(
        choice: int, halvings: int, batch: Tensor, head: Tensor, i: Tensor, j: Tensor
    ) -> Tensor:
        """Whether the last chosen block that does not begin behind the key holds it."""
        start, of_head, heads, seq_len, size = (tables[choice + n].long() for n in range(5))
        place = start + of_head * (heads * batch + head) + i + torch.zeros_like(j)
        for bit in reversed(range(halvings)):
            # A choice between two places would double what is compiled, here and below.
            place = place + (seq_len << bit) * (tables[place + (seq_len << bit)] <= j)
        step = j - tables[place]
        return (step >= 0) & (step < size)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query, key = (at(0, head, i), at(0, head, j)) if structure.ordered else (i, j)
        # No key comes before the first.
        seen = (key < tables[4]) | (key >= at(2, head, i)) if structure.local else key < 0
        for ring in rings:
            seen = seen | within_reach(ring, head, i, j)
        for choice, halvings in zip(choices, structure.halvings, strict=True):
            seen = seen | in_chosen_block(choice, halvings, batch, head, i, j)
        return seen & (key <= query)

    return visible
