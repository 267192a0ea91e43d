"""A dense tail on any backend: the backend computes the rest, and the last queries over again.

What a pattern shows beside its tail is computed for all queries as if there were none, and then the
last ones attend in full; so no kernel has to know of it. The last queries are computed twice, which
costs their share of the rest. Memory beside that: one row group's result at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans
from sa_patch.kernels.tiling import needs_gradients
from sa_patch.patterns import Full, Pattern, split_tail


def with_tail(backend: Backend, fallback: Backend) -> Backend:
    """The backend, able to serve patterns with a dense tail.

    Args:
        fallback: computes the tail where the backend itself has no full attention for the last
            queries of a sequence.
    """

    def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
        return backend.supports(split_tail(pattern)[0], q, k)

    def attend(
        pattern: Pattern,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        spans: Spans,
        scale: float,
        softmax: Softmax = PLAIN,
    ) -> Tensor:
        rest, size = split_tail(pattern)
        same: dict[str, Any] = {"layer": layer, "scale": scale, "softmax": softmax}
        out = backend.attend(rest, q, k, v, spans=spans, **same)
        if not size or rest.saturated(max(spans.lengths)):
            return out
        for (length, start), members in spans.groups().items():
            # Queries of this group that are real, and those among them that are the last.
            real = min(q.shape[2], length - start)
            count = min(size, real)
            if count <= 0:
                continue
            # Rows of one length are served in place: their list would wait for the device.
            together = len(members) == len(q)
            rows = slice(None) if together else torch.tensor(members, device=q.device)
            last = q[rows, :, real - count : real]
            keys, values = k[rows, :, :length], v[rows, :, :length]
            able, _ = backend.supports(Full(), last, keys)
            dense = (backend if able else fallback).attend(
                Full(),
                last,
                keys,
                values,
                spans=Spans((length,) * len(members), (length - count,) * len(members)),
                **same,
            )
            if needs_gradients(q, k, v):
                own = out[rows]
                parts = [own[:, :, : real - count], dense, own[:, :, real:]]
                joined = torch.cat(parts, dim=2)
                out = joined if isinstance(rows, slice) else out.index_copy(0, rows, joined)
            else:
                out[rows, :, real - count : real] = dense
        return out

    def packs(pattern: Pattern) -> bool:
        return not split_tail(pattern)[1] and backend.packs(pattern)

    return dataclasses.replace(backend, supports=supports, attend=attend, packs=packs)
