"""What the Triton kernels share: tiles of queries, rows of memory, and the online softmax.

The softmax is kept in base 2: weights are ``exp2(scale * (score - top))`` with log2(e) folded into
`scale`, which is never negative, so that the largest score is the largest exponent.

Kernels become interpreted ones where TRITON_INTERPRET=1 was set when this module was imported.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
LN_2 = tl.constexpr(0.6931471805599453)
# Later than every position, and so never visible.
UNSEEN = tl.constexpr(2**31 - 1)


@triton.jit
def query_tile(
    table: tl.tensor,
    heads: tl.tensor,
    query_len: tl.tensor,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """This program's queries: batch row, first head, and of each row its head, its place among
    the queries, its position, and whether it is one; then the tile's first and last position."""
    program = tl.program_id(0)
    head = program % (heads // PACK) * PACK
    entry = table + program // (heads // PACK) * 5
    batch = tl.load(entry).to(tl.int64)
    first = tl.load(entry + 1)
    offset = tl.load(entry + 2)
    length = tl.load(entry + 3)
    slot = tl.arange(0, BLOCK_M) // PACK
    rows = first + slot
    real = (slot < BLOCK_M // PACK) & (rows < query_len) & (offset + rows < length)
    positions = tl.where(real, offset + rows, 0)
    members = (head + tl.arange(0, BLOCK_M) % PACK).to(tl.int64)
    last = tl.minimum(length, offset + tl.minimum(query_len, first + BLOCK_M // PACK)) - 1
    # Rows that are no query read the first, and write nothing.
    rows = tl.where(real, rows, 0).to(tl.int64)
    return batch, head, members, rows, positions, real, offset + first, last


@triton.jit
def first_column(start: tl.tensor) -> tl.tensor:
    """Where the keys of a `Row` of this start begin: those of a packed sequence behind others."""
    return tl.maximum(-start, 0).to(tl.int64)


@triton.jit
def nearest_bfloat16(x: tl.tensor) -> tl.tensor:
    """fp32 rounded to what bfloat16 can hold, ties to even: the interpreter's cast cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(
    base: tl.tensor, offsets: tl.tensor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Rows that begin at ``base + offsets [m]`` as ``[m, BLOCK_D]``, zero beyond HEAD_DIM.

    Offsets from the start of a sequence are int64: a row times its stride passes 2^31 in long ones.
    """
    columns = tl.arange(0, BLOCK_D)
    places = base + offsets[:, None] + columns[None, :]
    if HEAD_DIM == BLOCK_D:
        loaded = tl.load(places)
    else:
        loaded = tl.load(places, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return loaded


@triton.jit
def store_rows(
    base: tl.tensor,
    offsets: tl.tensor,
    values: tl.tensor,
    real: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Write those rows of ``values [m, BLOCK_D]`` that are `real [m]` to ``base + offsets``."""
    columns = tl.arange(0, BLOCK_D)
    places = base + offsets[:, None] + columns[None, :]
    inside = real[:, None] & (columns[None, :] < HEAD_DIM)
    if WIDEN and base.dtype.element_ty == tl.bfloat16:
        values = nearest_bfloat16(values)
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def hyperbolic_tangent(x: tl.tensor) -> tl.tensor:
    """tanh, to 1e-7: beyond either end the exponential is 0 or infinite, and the result -1 or 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def softmax_step(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    visible: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Take a block of keys into the running softmax of every row.

    Args:
        acc, top, total: fp32 ``[m, d]``, ``[m]``, ``[m]``: weighted sum of values, largest raw
            score (-inf where nothing was visible yet) and sum of weights.
        q, k, v: ``[m, d]``, ``[n, d]``, ``[n, d]``.
        visible: bool ``[m, n]``, read where MASKED.
        cap: CAPPED, every score s counts as ``tanh(cap * s)``, which `scale` is for.
        WIDEN: round and multiply in fp32, for the interpreter, which has no bfloat16 product.

    Returns:
        acc, top and total with the block in them.
    """
    if WIDEN:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        scores = hyperbolic_tangent(cap * scores)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # Where no key was visible so far the pivot must be finite: -inf - -inf is not a number.
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - (pivot * scale)[:, None])
    faded = tl.exp2((top - pivot) * scale)
    total = total * faded + tl.sum(weights, 1)
    acc = acc * faded[:, None]
    if WIDEN:
        if v.dtype == tl.bfloat16:
            weights = nearest_bfloat16(weights)
        else:
            weights = weights.to(v.dtype).to(tl.float32)
        acc = tl.dot(weights, v.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, higher, total


@triton.jit
def start_softmax(ROWS: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """acc, top and total before the first key."""
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    return acc, top, total


@triton.jit
def finish_softmax(acc: tl.tensor, top: tl.tensor, total: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Output ``[m, d]`` and log2-sum-exp2 ``[m]``; zero and -inf for rows that saw nothing."""
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    return acc / total[:, None], tl.where(seen, top * scale + tl.log2(total), float("-inf"))


@triton.jit
def join(
    acc: tl.tensor, top: tl.tensor, total: tl.tensor, other: tl.tensor, log_other: tl.tensor
) -> tl.tensor:
    """Take a finished result over other keys into a softmax whose scale is 1.

    Args:
        acc, top, total: of `softmax_step`.
        other, log_other: of `finish_softmax`; finite, -inf where nothing was seen.
    """
    higher = tl.maximum(top, log_other)
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    faded = tl.exp2(top - pivot)
    weight = tl.exp2(log_other - pivot)
    return acc * faded[:, None] + other * weight[:, None], higher, total * faded + weight


@triton.jit
def store_result(
    out: tl.tensor,
    lse: tl.tensor,
    offsets: tl.tensor,
    places: tl.tensor,
    state: tl.tensor,
    scale: tl.tensor,
    real: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOIN: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Write what the `real` rows saw.

    Args:
        out: rows begin at ``out + offsets``.
        lse: fp32, natural logarithms at ``lse + places``; written WITH_LSE.
        state: acc, top and total.
        JOIN: what stands in `out` and `lse` is the result over other keys, to be joined.
    """
    acc, top, total = state
    result, log_total = finish_softmax(acc, top, total, scale)
    if JOIN:
        before = load_rows(out, offsets, HEAD_DIM, BLOCK_D).to(tl.float32)
        log_before = tl.load(lse + places, mask=real, other=float("-inf")) / LN_2
        ones = tl.where(log_total == float("-inf"), 0.0, 1.0)
        acc, top, total = join(result, log_total, ones, before, log_before)
        result, log_total = finish_softmax(acc, top, total, 1.0)
    store_rows(out, offsets, result, real, HEAD_DIM, BLOCK_D, WIDEN)
    if WITH_LSE:
        tl.store(lse + places, log_total * LN_2, mask=real)
