"""What one cell is given of a cluster: the CPUs and GPUs of the worker that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.yaml_values import known_mapping
from sa_patch.patterns.base import whole_number


@dataclass(frozen=True)
class WorkerResources:
    """CPU cores and GPUs of one worker; no result depends on them.

    Args:
        gpus: a whole number, or a fraction below 1 where several workers share a GPU; None means
            one where the cluster has any, else none.
    """

    cpus: int = 1
    gpus: float | None = None


def read_resources(raw: Any, default: WorkerResources) -> WorkerResources:
    """The mapping ``{cpus: 8, gpus: 1}`` of a sweep file; what it leaves out is as in `default`.

    Raises:
        UserError: for anything unknown or not allowed.
    """
    if raw is None:
        return default
    given = known_mapping(raw, "'resources'", ["cpus", "gpus"])
    cpus = whole_number(given.get("cpus", default.cpus), "cpus of 'resources'", 1)
    gpus = given.get("gpus", default.gpus)
    return WorkerResources(cpus, None if gpus is None else _gpus(gpus))


def _gpus(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value > 1 and value != int(value)):
        raise UserError(
            f"gpus of 'resources' must be a whole number, or a fraction below 1, got {value!r}"
        )
    return float(value)
