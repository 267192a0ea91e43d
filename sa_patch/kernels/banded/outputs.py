"""Where the kernels of `banded` write the attention of a part: outputs and log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.merge import attend_with_lse
from sa_patch.kernels.tiling import RowWriter


class OutputWriter:
    """Attends tiles and writes them to their place, log-sum-exps too where they are wanted.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        sums: whether the log-sum-exps are wanted, for a merge with other parts; then all that is
            written is fp32 at least.
        softcap: of `Softmax`; goes with sums.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        sums: bool,
        softcap: float | None = None,
    ):
        self._q, self._scale, self._softcap = q, scale, softcap
        wide = torch.promote_types(q.dtype, torch.float32) if sums else q.dtype
        self._rows = RowWriter(q, k, v, dtype=wide)
        self._sums = RowWriter(q[..., :1], k, v, dtype=wide) if sums else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of tiles, arguments and results as of `attend_with_lse`.

        Without sums every query of a tile must see a key.
        """
        if self._sums is not None:
            return attend_with_lse(q, k, v, bias, self._scale, causal=causal, softcap=self._softcap)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            is_causal=causal,
            scale=self._scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out, None

    def write(self, part: tuple[Tensor, Tensor | None], low: int) -> None:
        """Queries ``low .. low + m - 1``: output ``[batch, q_heads, m, head_dim]`` and sums."""
        out, lse = part
        self._rows.write(out, low)
        if self._sums is not None and lse is not None:
            self._sums.write(lse[..., None], low)

    def write_tiles(
        self, parts: list[tuple[Tensor, Tensor | None]], low: int, stride: int = 1
    ) -> None:
        """Every `stride`-th tile from query `low` on.

        Args:
            parts: for each row of the batch its output ``[tiles, q_heads, tile, head_dim]`` and
                sums ``[tiles, q_heads, tile]``.
        """
        out = torch.stack([out for out, _ in parts]).transpose(1, 2).flatten(2, 3)
        sums = [lse for _, lse in parts if lse is not None]
        lse = torch.stack(sums).transpose(1, 2).flatten(2, 3) if sums else None
        if stride == 1:
            self.write((out, lse), low)
            return
        tiles, _, tile = parts[0][0].shape[:3]
        begins = low + torch.arange(tiles, device=out.device)[:, None] * (stride * tile)
        self.scatter((out, lse), (begins + torch.arange(tile, device=out.device)).view(1, -1))

    def scatter(self, part: tuple[Tensor, Tensor | None], places: Tensor) -> None:
        """Queries at ``places [draws, m]``, like `write`."""
        out, lse = part
        self._rows.scatter(out, places)
        if self._sums is not None and lse is not None:
            self._sums.scatter(lse[..., None], places)

    def nothing(self, low: int, high: int) -> None:
        """Queries ``low .. high - 1`` see no key."""
        out = torch.zeros_like(self._q[:, :, low:high], dtype=self._rows.dtype)
        lse = out.new_full(out.shape[:3], -torch.inf)
        self.write((out, lse), low)

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Output ``[batch, q_heads, nq, head_dim]`` and log-sum-exps ``[batch, q_heads, nq]``."""
        lse = None if self._sums is None else self._sums.result().squeeze(-1)
        return self._rows.result(), lse
