"""What one cell is given of a cluster: the CPUs and GPUs of the worker that computes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from sa_patch.files.settings import Positive, Settings


def _whole_or_shared(gpus: float) -> float:
    if gpus < 0 or (gpus > 1 and not gpus.is_integer()):
        raise PydanticCustomError("gpus", "a whole number, or a fraction below 1")
    return gpus


class WorkerResources(Settings):
    """CPU cores and GPUs of one worker, ``{cpus: 8, gpus: 1}``; no result depends on them.

    Args:
        gpus: a whole number, or a fraction below 1 where several workers share a GPU; None means
            one where the cluster has any, else none.
    """

    cpus: Positive = 1
    gpus: Annotated[float, AfterValidator(_whole_or_shared)] | None = None
