"""FlexAttention over lists of key blocks, compiled once for each family of shapes.

A family is the number of heads, head_dim, dtype, device, scale, memory layout and whether there is
one row or several. Sequence length, batch size and the pattern's numbers are inputs of the
compiled code: tensors of one element where the mask reads them, so that no value is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch.nn.attention.flex_attention import BlockMask, flex_attention

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


def block_size(device: torch.device) -> int:
    """Queries, and keys, of one block."""
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def listed(counts: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Lists in the form FlexAttention takes: ``[.., rows]`` and ``[.., rows, columns]``.

    It wants as many columns as there are blocks, n^2 / block^2 entries, though it reads only the
    counted ones. Short lists ``[rows, width]`` therefore become an overlapping view of O(rows)
    memory, whose uncounted columns run on into the rows below. There are at least two rows, since
    sizes of 1 are compiled in.
    """
    rows, width = max(2, blocks.shape[-2]), blocks.shape[-1]
    if blocks.ndim > 2:
        short = rows - blocks.shape[-2]
        pad = torch.nn.functional.pad
        return pad(counts, (0, short)), pad(blocks, (0, short, 0, short)).contiguous()
    # A stride of 1, or one that happens to equal the number of columns, would be compiled in.
    stride = max(2, width)
    stride += stride == rows
    room = blocks.new_zeros(rows * stride + rows)
    room[: rows * stride].view(rows, stride)[: len(blocks), :width] = blocks
    view = room.as_strided((1, 1, rows, rows), (len(room), len(room), stride, 1))
    return torch.nn.functional.pad(counts, (0, rows - len(counts)))[None, None], view


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, ...], mask: _Mask, scale: float
) -> Tensor:
    # Run without compilation, FlexAttention ignores the lists and builds all n x n scores.
    if not torch.compiler.is_compiling():
        raise _Uncompiled(
            "flex must be compiled, and torch did not: compilation is turned off, or a "
            "TorchDispatchMode is active"
        )
    block = block_size(q.device)
    full_counts, full_blocks = lists[2:] or (None, None)
    block_mask = BlockMask.from_kv_blocks(
        lists[0],
        lists[1],
        full_counts,
        full_blocks,
        BLOCK_SIZE=(block, block),
        mask_mod=mask,
        seq_lengths=(q.shape[2], k.shape[2]),
        # Only gradients walk the lists from the keys' side.
        compute_q_blocks=torch.is_grad_enabled(),
    )
    out: Tensor = flex_attention(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        # Its kernel for short queries would be a second family below 128 tokens.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out


def _window(
    q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, ...], window: Tensor, scale: float
) -> Tensor:
    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    return _attend(q, k, v, lists, visible, scale)


def _ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, ...],
    positions: Tensor,
    reach: Tensor,
    around: Tensor,
    scale: float,
) -> Tensor:
    shared = positions.shape[1] == 1

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        draw = torch.zeros_like(head) if shared else head
        apart = (i - j).abs()
        near = (apart <= reach) | (apart >= around)
        return near & (positions[_index(j), draw] <= positions[_index(i), draw])

    return _attend(q, k, v, lists, visible, scale)


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, ...],
    starts: Tensor,
    size: Tensor,
    scale: float,
) -> Tensor:
    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = torch.zeros_like(i, dtype=torch.bool)
        for pick in range(starts.shape[3]):
            step = j - starts[_index(i), batch, head, pick]
            seen = seen | ((step >= 0) & (step < size))
        return seen & (j <= i)

    return _attend(q, k, v, lists, visible, scale)


def _index(position: Tensor) -> Tensor:
    """A position as an index that is plainly not negative.

    The C++ template of torch 2.13 gets the names of sizes wrong that it meets inside a mask, and
    it needs them to wrap negative indices, to check bounds, and for strides. So a dimension of
    unknown size must come first, and its index must need neither.
    """
    return position.clamp(min=0)


def _compiled(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(
        attend, dynamic=True, fullgraph=True, options={"assert_indirect_indexing": False}
    )

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
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
chosen = _compiled(_chosen)
