"""The attention of a layer as an operator of torch's, for compiled and exported graphs.

What a pattern computes depends on lengths that a compiler would pin one by one. To the operator
they are a tensor, so that one graph serves all of them; the pattern is its text form, so that an
exported graph needs nothing but `import sa_patch`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels import PLAIN, Softmax, Spans, attend
from sa_patch.patching.documents import PADDING, documents_of_numbers
from sa_patch.patching.mask import Packing
from sa_patch.patterns import parse_pattern

_pattern = lru_cache(maxsize=256)(parse_pattern)


@torch.library.custom_op("sa_patch::layout", mutates_args=())
def layout(numbers: Tensor) -> Tensor:
    """Read once per forward pass, to the CPU, which document each token belongs to.

    Args:
        numbers: of `document_numbers`, or -1 at padding: int64 ``[batch, n]``.

    Returns:
        A copy on the CPU.

    Raises:
        UserError: for a mask that is neither causal nor causal within documents.
    """
    read = numbers.cpu().clone()
    documents_of_numbers(read)
    return read


@layout.register_fake
def _(numbers: Tensor) -> Tensor:
    return torch.empty_like(numbers, device="cpu")


def _packing(numbers: Tensor | None, batch: int, seq_len: int) -> Packing:
    if numbers is None or not bool(numbers.any()):
        return Packing.of(None, batch, 0, seq_len)
    real = numbers != PADDING
    if not bool(real.all()):
        return Packing.of(real, batch, 0, seq_len)
    return Packing(Spans.packed(documents_of_numbers(numbers)), None, None)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    numbers: Tensor | None,
    pattern: str,
    layer: int,
    scale: float,
    backend: str,
    softcap: float | None,
) -> Tensor:
    packing = _packing(numbers, len(q), q.shape[2])
    out = attend(
        _pattern(pattern),
        packing.pack(q, packing.query_order),
        packing.pack(k, packing.key_order),
        packing.pack(v, packing.key_order),
        layer=layer,
        spans=packing.spans,
        scale=scale,
        backend=backend,
        softmax=PLAIN if softcap is None and sink is None else Softmax(softcap, sink),
    )
    return packing.unpack(out).transpose(1, 2).contiguous()


@torch.library.custom_op("sa_patch::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    numbers: Tensor | None,
    pattern: str,
    layer: int,
    scale: float,
    backend: str,
    softcap: float | None,
) -> Tensor:
    """Attention of one layer.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        sink, softcap: of `Softmax`.
        numbers: of `layout`; None where each row is one document without padding.
        pattern: text form.

    Returns:
        ``[batch, n, q_heads, head_dim]``.
    """
    return _attend(q, k, v, sink, numbers, pattern, layer, scale, backend, softcap)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("sa_patch::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    numbers: Tensor | None,
    pattern: str,
    layer: int,
    scale: float,
    backend: str,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of `attention` by q, k, v and a sink, for which it is computed once more."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    sink = None if sink is None else sink.detach().requires_grad_()
    # Within an operator nothing is recorded, unless torch is told to dispatch to autograd again.
    recording = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with recording, torch.enable_grad():
        out = _attend(q, k, v, sink, numbers, pattern, layer, scale, backend, softcap)
    inputs = [q, k, v] if sink is None else [q, k, v, sink]
    return [x.contiguous() for x in torch.autograd.grad(out, inputs, gradient)]


@attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *others: Any
) -> list[Tensor]:
    inputs = [q, k, v] if sink is None else [q, k, v, sink]
    return [x.new_empty(x.shape) for x in inputs]


# Torch names the arguments.
def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.others = inputs[5:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(gradient, *ctx.saved_tensors, *ctx.others)
    return (*gradients, *[None] * (10 - len(gradients)))


attention.register_autograd(_backward, setup_context=_keep)
