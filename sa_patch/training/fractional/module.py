"""Self-attention with its projections: fractional, or by dot products for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import orthogonal

from sa_patch.errors import UserError
from sa_patch.patterns import Pattern
from sa_patch.training.fractional.attention import check_pattern, fractional_attention
from sa_patch.training.fractional.distance_kernel import DistanceKernel


class FractionalAttention(nn.Module):
    """Self-attention by distance (Qu, Ly & Gong, arXiv 2511.10208); see `DistanceKernel`.

    Args:
        hidden: width of the input and the output.
        heads, head_dim: query heads, and the length of their vectors.
        alpha: 1 to 2; None for dot-product attention with the same projections.
        kv_heads: heads of keys and values; as many as `heads` by default.
        shared: the keys are the queries, and no token sees itself, since that distance is 0.
        orthonormal: the projections to queries and keys have orthonormal rows (or columns, where
            the heads together are wider than `hidden`) throughout training, so that they do not
            rescale distances.
        geometry, bandwidth, density, causal, pattern, layer: see `fractional_attention`.

    Raises:
        UserError: for values that do not fit together.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        alpha: float | None,
        *,
        kv_heads: int | None = None,
        shared: bool = False,
        orthonormal: bool = False,
        geometry: str = "euclidean",
        bandwidth: float | str = 1.0,
        density: float = 0.0,
        causal: bool = False,
        pattern: Pattern | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads or (shared and kv_heads != heads):
            raise UserError(
                f"heads must be a multiple of kv_heads, and equal to it where queries and keys "
                f"are shared, got {heads} and {kv_heads}"
            )
        if alpha is None and pattern is not None:
            raise UserError("dot-product attention takes no pattern here")
        self.kernel = None if alpha is None else DistanceKernel(alpha, geometry, bandwidth, density)
        if self.kernel is not None:
            self.kernel.check_head_dim(head_dim)
            check_pattern(pattern, causal)
        self.head_dim, self.shared, self.causal = head_dim, shared, causal
        self.kv_heads = kv_heads
        self.pattern, self.layer = pattern, layer
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = None if shared else nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        if orthonormal:
            for projection in (self.q_proj, self.k_proj):
                if projection is not None:
                    orthogonal(projection)

    def forward(self, hidden_states: Tensor, padding: Tensor | None = None) -> Tensor:
        """Self-attention of a batch.

        Args:
            hidden_states: ``[batch, n, hidden]``.
            padding: bool ``[batch, n]``, True at real tokens; None for all.

        Returns:
            ``[batch, n, hidden]``, zero at padding.
        """
        v = self._heads(self.v_proj(hidden_states))
        out = self._attend(hidden_states, v, padding)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def weights(self, hidden_states: Tensor, padding: Tensor | None = None) -> Tensor:
        """The attention weights ``[batch, heads, n, n]`` of the same input, row i of query i."""
        batch, n = hidden_states.shape[:2]
        # The attention output of unit vectors as values is the weights themselves.
        units = torch.eye(n, dtype=hidden_states.dtype, device=hidden_states.device)
        return self._attend(hidden_states, units.expand(batch, self.kv_heads, n, n), padding)

    def _attend(self, hidden_states: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """Attention ``[batch, heads, n, ...]`` over values ``[batch, kv_heads, n, ...]``."""
        q = self._heads(self.q_proj(hidden_states))
        k = q if self.k_proj is None else self._heads(self.k_proj(hidden_states))
        if self.kernel is None:
            return self._dot_products(q, k, v, padding)
        return fractional_attention(
            q,
            k,
            v,
            self.kernel.alpha,
            geometry=self.kernel.geometry,
            bandwidth=self.kernel.bandwidth,
            density=self.kernel.density,
            exclude_self=self.shared,
            causal=self.causal,
            padding=padding,
            pattern=self.pattern,
            layer=self.layer,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _dot_products(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        n = q.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device)
        if self.causal:
            seen = seen.tril()
        if self.shared:
            seen = seen & ~torch.eye(n, dtype=torch.bool, device=q.device)
        mask = seen[None, None]
        if padding is not None:
            mask = mask & padding[:, None, None, :]
        # A row without visible keys gets key 0, as its softmax would be 0 / 0, and is zeroed later.
        empty = ~mask.any(-1, keepdim=True)
        first = torch.arange(n, device=q.device) == 0
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask | (empty & first), enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out.masked_fill(empty, 0)
        return out if padding is None else out.masked_fill(~padding[:, None, :, None], 0)
