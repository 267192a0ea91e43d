"""Fractional neural attention a second time: float64, plain loops, straight from the definition.

Nothing here comes from `sa_patch`; both normalisations by density are carried out, although one of
them cancels.
"""

import math
import statistics
from collections.abc import Callable

import numpy as np


def distance(q: np.ndarray, k: np.ndarray, alpha: float, geometry: str) -> float:
    d = len(q)
    if geometry == "euclidean":
        apart = math.sqrt(sum((a - b) ** 2 for a, b in zip(q, k, strict=True)))
        return apart / (math.sqrt(d) if alpha == 2 else math.sqrt(d) / (2 ** (1 / d) - 1))
    u, v = q / np.sqrt((q * q).sum()), k / np.sqrt((k * k).sum())
    return math.acos(min(1.0, max(-1.0, float((u * v).sum()))))


def weight(g: float, kappa: float, alpha: float, space: int) -> float:
    ratio = g / kappa ** (1 / alpha)
    if alpha == 2:
        return math.exp(-(ratio ** (alpha / (alpha - 1))))
    return float((1 + ratio) ** -(space + alpha))


def one_head(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    alpha: float,
    sees: Callable[[int, int], bool],
    *,
    geometry: str = "euclidean",
    bandwidth: float | str = 1.0,
    density: float = 0.0,
    start: int = 0,
) -> np.ndarray:
    """One sequence: q ``[nq, d]`` at positions from `start`, k ``[n, d]``, v ``[n, dv]``."""
    space = q.shape[1] - (geometry == "geodesic")
    pairs = [(i, j) for i in range(len(q)) for j in range(len(k)) if sees(i + start, j)]
    g = {pair: distance(q[pair[0]], k[pair[1]], alpha, geometry) for pair in pairs}
    kappa = bandwidth
    if isinstance(kappa, str):
        kappa = (statistics.median_low(g.values()) if g else 0.0) or 1.0
    w = {pair: weight(g[pair], kappa, alpha, space) for pair in pairs}
    if density:
        rows, columns = [0.0] * len(q), [0.0] * len(k)
        for (i, j), value in w.items():
            rows[i] += value
            columns[j] += value
        w = {(i, j): x / (rows[i] ** density * columns[j] ** density) for (i, j), x in w.items()}
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        total = sum(x for (row, _), x in w.items() if row == i)
        for j in range(len(k)):
            if (i, j) in w:
                out[i] += w[i, j] / total * v[j]
    return out
