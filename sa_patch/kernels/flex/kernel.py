"""FlexAttention over lists of key blocks, compiled once for each family of shapes.

A family is the number of heads, head_dim, dtype, device, scale, memory layout, whether there is
one row or several, and how many rings and choices the mask reads. Sequence length, batch size and
the pattern's numbers are inputs of the compiled code: tensors of one element where the mask reads
them, so that no value is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sa_patch.errors import UserError

# Measured at n = 2048, 8 query and 2 KV heads of 64, one CPU thread, SWA w = 256 and 64 in fp32,
# milliseconds for blocks of 32, 64, 128, 256: 36, 37, 47, 61 and 14, 17, 33, 59; in bf16
# 13, 9.1, 9.0, 10.5 and 5.1, 4.4, 6.4, 8.9. On GPUs 128 is what FlexAttention's tiles divide.
_CPU_BLOCK, _GPU_BLOCK = 64, 128
# Families that may be compiled before a call fails. Dynamo's own bound, 8, is soon met by models
# of different widths in one process.
_FAMILIES = 128

_COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


class _Uncompiled(UserError):
    """A call was run as plain Python."""


_Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Table(NamedTuple):
    """Numbers by position within the one tensor of tables that a mask reads.

    A single tensor, and nothing but tensors of one element beside it: every index brings the size
    of its tensor into the mask, to wrap negative ones around, and so does every int. The C++
    template of torch 2.13 replaces the names of two sizes in a mask as text: the first two that are
    free, ks1 and ks2 where there is but one size, whose own name must begin with neither.
    """

    start: Tensor
    """where the table begins, one element"""
    by_head: Tensor
    """numbers for each head, one element; 0 where all heads share them"""


class LocalWindow(NamedTuple):
    """Who is within reach of whom on a ring, in the order of a call's queries and keys."""

    queries: Table
    """points"""
    keys: Table
    """points"""
    reach: Table
    """of queries"""
    size: Tensor
    """circumference, one element; too large to matter for an open line"""


class Chosen(NamedTuple):
    """Blocks of keys that queries chose; of each number one element."""

    start: Tensor
    """where the table ``[batch, q_heads, picks, n]`` begins; in it where the blocks begin,
    ascending, and n where there is none"""
    of_row: Tensor
    """numbers for each row of the batch"""
    of_head: Tensor
    """numbers for each head"""
    halves: tuple[Tensor, ...]
    """n times half the picks, a quarter, and so on down to 1; picks are a power of two"""
    size: Tensor
    """tokens in a block"""


class Call(NamedTuple):
    """What every mask is called with."""

    lists: tuple[Tensor, ...]
    """counts and blocks, then those of full blocks if there are any"""
    scale: float
    sentinel: Tensor | None = None
    """index of a key that every query sees, one element"""
    lse: bool = False
    """return the log-sum-exp of the scores as well; on GPUs only"""


def block_size(device: torch.device) -> int:
    """Queries, and keys, of one block."""
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: _Mask) -> Any:
    # Run without compilation, FlexAttention ignores the lists and builds all n x n scores.
    if not torch.compiler.is_compiling():
        raise _Uncompiled(
            "flex must be compiled, and torch did not: compilation is turned off, or a "
            "TorchDispatchMode is active"
        )
    block = block_size(q.device)
    full_counts, full_blocks = call.lists[2:] or (None, None)
    block_mask = BlockMask.from_kv_blocks(
        call.lists[0],
        call.lists[1],
        full_counts,
        full_blocks,
        BLOCK_SIZE=(block, block),
        mask_mod=mask if call.sentinel is None else _or_sentinel(mask, call.sentinel),
        seq_lengths=(q.shape[2], k.shape[2]),
        # Only gradients walk the lists from the keys' side.
        compute_q_blocks=torch.is_grad_enabled(),
    )
    result = flex_attention(  # type: ignore[call-overload]
        q,
        k,
        v,
        block_mask=block_mask,
        scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        # Its kernel for short queries would be a second family below 128 tokens.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        return_aux=AuxRequest(lse=True) if call.lse else None,
    )
    if call.lse:
        out, aux = result
        return out, aux.lse
    return result


def _or_sentinel(mask: _Mask, sentinel: Tensor) -> _Mask:
    return lambda batch, head, i, j: mask(batch, head, i, j) | (j == sentinel)


def _window(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor, window: Tensor) -> Any:
    """The first `sinks` keys and the nearest `window`."""

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < window) | (j < sinks))

    return _attend(q, k, v, call, visible)


def _ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    tables: Tensor,
    positions: tuple[Table, Table],
    reach: tuple[Tensor, Tensor] | LocalWindow,
    hidden: tuple[Tensor, Tensor],
    others: tuple[LocalWindow, ...],
) -> Any:
    """Keys within reach on a ring, those left out that are seen otherwise.

    Args:
        tables: int32 ``[numbers]``.
        positions: of queries and keys, which stand in the order of their points.
        reach: by points; or where points are places in the order, (reach, size) of one element.
        hidden: (sinks, window), whose keys are left out, one element each.
        others: rings whose keys are left out.
    """

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if isinstance(reach, LocalWindow):
            near = _within(tables, reach, head, i, j)
        else:
            apart = (i - j).abs()
            near = (apart <= reach[0]) | (apart >= reach[1] - reach[0])
        key = _at(tables, positions[1], head, j)
        behind = _at(tables, positions[0], head, i) - key
        sinks, window = hidden
        seen = near & (behind >= 0) & (behind >= window) & (key >= sinks)
        for other in others:
            seen = seen & ~_within(tables, other, head, i, j)
        return seen

    return _attend(q, k, v, call, visible)


def _content(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    tables: Tensor,
    fixed: tuple[Tensor, Tensor],
    first_near: Table,
    choices: tuple[Chosen, ...],
    others: tuple[LocalWindow, ...],
) -> Any:
    """Sinks and window; a neighbourhood and chosen blocks, but for keys that `others` see.

    Args:
        tables: int32 ``[numbers]``.
        fixed: (sinks, window), one element each.
        first_near: the first key of each query's neighbourhood.
    """
    sinks, window = fixed

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= _at(tables, first_near, head, i)
        for choice in choices:
            seen = seen | _in_block(tables, choice, batch, head, i, j)
        for other in others:
            seen = seen & ~_within(tables, other, head, i, j)
        return (seen | (i - j < window) | (j < sinks)) & (j <= i)

    return _attend(q, k, v, call, visible)


def _within(tables: Tensor, near: LocalWindow, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    apart = (_at(tables, near.queries, head, i) - _at(tables, near.keys, head, j)).abs()
    reach = _at(tables, near.reach, head, i)
    return (apart <= reach) | (apart >= near.size - reach)


def _in_block(
    tables: Tensor, choice: Chosen, batch: Tensor, head: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """Whether the last chosen block that does not begin behind the key holds it."""
    place = choice.start + choice.of_row * batch + choice.of_head * head + i
    place = place + torch.zeros_like(j)
    for half in choice.halves:
        ahead = place + half
        place = torch.where(tables[ahead] <= j, ahead, place)
    step = j - tables[place]
    return (step >= 0) & (step < choice.size)


def _at(tables: Tensor, table: Table, head: Tensor, place: Tensor) -> Tensor:
    return tables[table.start + table.by_head * head + place]


def _compiled(attend: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(
        attend, dynamic=True, fullgraph=True, options={"assert_indirect_indexing": False}
    )

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Any:
        graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if not graded:
            q, k, v = q.detach(), k.detach(), v.detach()
        with (
            torch.set_grad_enabled(graded),
            torch._dynamo.config.patch(recompile_limit=_FAMILIES),
            # Otherwise sizes that are equal by chance in the first call are compiled in as equal.
            fx_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            try:
                return compiled(q, k, v, *rest)
            except _Uncompiled:
                # Dynamo would go on to skip this code for good.
                reset_code(attend.__code__)
                raise
            except _COMPILER_ERRORS as error:
                first_line = str(error).strip().partition("\n")[0]
                raise UserError(f"flex could not be compiled: {first_line}") from error

    return call


window = _compiled(_window)
ring = _compiled(_ring)
content = _compiled(_content)
