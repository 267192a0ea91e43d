"""Weights that fall as a power law of distance: the definition of fractional neural attention.

After *Fractional Neural Attention* (Qu, Ly & Gong, arXiv 2511.10208): attention weights fall with
distance as the jumps of a Levy process of index alpha do, between tokens in Euclidean space or on a
sphere. All weights are computed as logarithms, so that those of far keys do not underflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.errors import UserError

GEOMETRIES = ("euclidean", "geodesic")
# A squared distance below this share of |q|^2 + |k|^2 has lost half of its digits in the matrix
# product; such pairs are computed again from q - k.
_CANCELLATION = 1e-3
# If more than this share of all pairs are to be computed again, all of them are.
_RECOMPUTED_SHARE = 1 / 16


@dataclass(frozen=True)
class DistanceKernel:
    """The weight of a key by its distance from a query.

    With distance g, bandwidth kappa and dimension d of the space (head_dim, or head_dim - 1 on the
    sphere), before any normalization:

        (1 + g / kappa^(1/alpha))^-(d + alpha)               for 1 <= alpha < 2
        exp(-(g / kappa^(1/alpha))^(alpha / (alpha - 1)))    at alpha = 2

    g is ``|q - k|``, divided by ``sqrt(d) / (2^(1/d) - 1)`` below alpha = 2 and by ``sqrt(d)`` at
    2; or the angle between q and k, in radians. The second form is not the limit of the first,
    which keeps the tail of a power law, with exponent d + 2, however near alpha comes to 2.

    Args:
        alpha: 1 to 2. The smaller it is, the more weight far keys have; 1.2 is the paper's
            multiscale setting, 2 its local one.
        geometry: "euclidean" or "geodesic"; a zero vector is at a right angle to all others.
        bandwidth: kappa, above 0, or "median" of g over the visible pairs of a sequence and head,
            taken as a constant by gradients (1 where that median is 0).
        density: exponent a; weights are divided by the a-th powers of their row's and their
            column's sum before rows are normalized (the row's part then cancels).

    Raises:
        UserError: for values that are not of these kinds.
    """

    alpha: float
    geometry: str = "euclidean"
    bandwidth: float | str = 1.0
    density: float = 0.0

    def __post_init__(self) -> None:
        if not _number(self.alpha) or not 1 <= self.alpha <= 2:
            raise UserError(f"alpha must be a number from 1 to 2, got {self.alpha!r}")
        if self.geometry not in GEOMETRIES:
            raise UserError(f"geometry must be {' or '.join(GEOMETRIES)}, got {self.geometry!r}")
        if self.bandwidth != "median" and not (_number(self.bandwidth) and self.bandwidth > 0):  # type: ignore[operator]
            raise UserError(
                f"bandwidth must be a number above 0, or 'median', got {self.bandwidth!r}"
            )
        if not _number(self.density) or self.density < 0:
            raise UserError(f"density must be a number of at least 0, got {self.density!r}")

    @property
    def alpha_text(self) -> str:
        """Alpha in as few digits as tell it from all others: 1.2, and 2 for 2.0."""
        return repr(float(self.alpha)).removesuffix(".0")

    def check_head_dim(self, head_dim: int) -> None:
        """Raise `UserError` for vectors with too few dimensions for an angle."""
        if self.geometry == "geodesic" and head_dim < 2:
            raise UserError("geodesic distance needs a head_dim of at least 2, got 1")

    @property
    def depends_on_all_queries(self) -> bool:
        """Whether the weights of a query depend on other queries, even on later ones."""
        return self.density > 0 or self.bandwidth == "median"

    def distances(self, q: Tensor, k: Tensor) -> Tensor:
        """g of all pairs: ``[..., nq, n]`` of ``q [..., nq, head_dim]``, ``k [..., n, head_dim]``.

        Accurate for near and equal vectors too; its gradient is 0 where they are equal.
        """
        if self.geometry == "euclidean":
            return self._scaled(root(_squared_distances(q, k)), q.shape[-1])
        u, v = unit(q), unit(k)
        return _angle(_squared_distances(u, v), _squared_distances(u, -v))

    def paired_distances(self, q: Tensor, k: Tensor) -> Tensor:
        """g of vectors side by side: ``[...]`` of ``q, k [..., head_dim]``."""
        if self.geometry == "euclidean":
            return self._scaled(root((q - k).square().sum(-1)), q.shape[-1])
        u, v = unit(q), unit(k)
        return _angle((u - v).square().sum(-1), (u + v).square().sum(-1))

    def _scaled(self, distance: Tensor, head_dim: int) -> Tensor:
        # 2^(1/d) - 1, without the cancellation of the subtraction.
        rate = 1.0 if self.alpha == 2 else math.expm1(math.log(2) / head_dim)
        return distance * (rate / math.sqrt(head_dim))

    def log_weights(self, g: Tensor, head_dim: int, kappa: Tensor | float) -> Tensor:
        """Natural logarithms of the weights, by distance.

        Args:
            g: of `distances` or `paired_distances`.
            kappa: the bandwidth, broadcastable to g.
        """
        alpha = float(self.alpha)
        ratio = g / kappa ** (1 / alpha)
        if alpha == 2:
            return -ratio.square()
        space = head_dim if self.geometry == "euclidean" else head_dim - 1
        return -(space + alpha) * torch.log1p(ratio)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last dimension; zero stays zero, with gradient 0."""
    # Scaled first, so that the squares of tiny or huge entries neither vanish nor overflow.
    peak = x.detach().abs().amax(-1, keepdim=True)
    x = x / peak.where(peak > 0, 1)
    squared = x.square().sum(-1, keepdim=True)
    return x / squared.where(squared > 0, 1).sqrt()


def root(squared: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = squared > 0
    return squared.where(positive, 1).sqrt().where(positive, 0)


def _angle(apart: Tensor, together: Tensor) -> Tensor:
    """The angle of unit vectors from |u - v|^2 and |u + v|^2, accurate near 0 and pi too."""
    return 2 * torch.atan2(root(apart), root(together))


def _squared_distances(q: Tensor, k: Tensor) -> Tensor:
    """``|q - k|^2`` of all pairs, by a matrix product; from q - k where that is inaccurate."""
    shape = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    sizes = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
    squared = sizes - 2 * (q @ k.transpose(-1, -2))
    close = (squared < _CANCELLATION * sizes).nonzero(as_tuple=True)
    if not len(close[0]):
        return squared
    if len(close[0]) > _RECOMPUTED_SHARE * squared.numel():
        return torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square()
    rows, columns = close[:-1], (*close[:-2], close[-1])
    apart = q.expand(*shape, *q.shape[-2:])[rows] - k.expand(*shape, *k.shape[-2:])[columns]
    return squared.index_put(close, apart.square().sum(-1))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
