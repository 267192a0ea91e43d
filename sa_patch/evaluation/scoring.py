"""One cell's evaluation: lm-eval's scores of a loaded task, and the one that stands for it."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.evaluator import evaluate

from sa_patch.evaluation.tasks.catalogue import TaskInfo

# lm-eval's own defaults, so that a sweep's scores are those of its command.
RANDOM_SEED, OTHER_SEED = 0, 1234
# Only perplexities have no closed form of their standard error and are resampled.
BOOTSTRAP_ITERS = 1000


def prepare(
    loaded: Mapping[str, Any], num_fewshot: int | None, gen_kwargs: Mapping[str, Any]
) -> None:
    """Fix the settings of loaded task objects once; they can then serve every cell of the task.

    As in lm-eval's command, a task that fixes 0 examples keeps them, and None means the task's own.
    """
    for task in loaded["tasks"].values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)


def score(
    lm: Any, loaded: Mapping[str, Any], limit: int | None, run_code: bool, **prompts: Any
) -> Mapping[str, Any]:
    """lm-eval's result mapping for the tasks in `loaded`, from a fixed random state.

    Args:
        prompts: lm-eval's settings of chat templates.

    `lm_eval.evaluator.evaluate` and not `simple_evaluate`: the latter asks the shell about the
    machine after every call, seconds per cell.
    """
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=OTHER_SEED)
    with _one_process(), _compiling_templates_once():
        results = evaluate(
            lm,
            dict(loaded),
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
            confirm_run_unsafe_code=run_code,
            **prompts,
        )
    if results is None:
        raise RuntimeError("this process is not the first of a distributed run")
    return results


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval's bootstrap from forking a process that holds a model, for each cell."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _compiling_templates_once() -> Iterator[None]:
    """Remember lm-eval's compiled prompt templates.

    It compiles a task's templates anew for every item: 15 seconds for the benchmarks' 12,000 items,
    where a GPU takes 4 to answer them.
    """
    compiled = utils.env.from_string
    utils.env.from_string = lru_cache(maxsize=4096)(compiled)
    try:
        yield
    finally:
        utils.env.from_string = compiled


def plain_scores(results: Mapping[str, Any], task: str) -> dict[str, float | None]:
    """A task's metrics as JSON numbers; None where lm-eval has no finite value ("N/A")."""
    own = results["results"][task]
    return {key: _finite(own[key]) for key in sorted(own) if "," in key}


def sample_count(results: Mapping[str, Any], task: str) -> int:
    """How many items were scored, summed over a group's tasks."""
    return int(results["results"][task]["sample_len"])


def item_scores(results: Mapping[str, Any], metric: str) -> dict[str, list[float]] | None:
    """The primary metric of every item, in the task's order, for paired comparisons.

    Args:
        metric: as in `primary_score`, with its filter.

    Returns:
        Scores by task (a group has several); for perplexities log-likelihoods. None where an item
        has no plain number.
    """
    name, _, filtered = metric.partition(",")
    items: dict[str, list[float]] = {}
    for task, samples in (results.get("samples") or {}).items():
        own = [sample for sample in samples if sample.get("filter", filtered) == filtered]
        values = [
            _finite(sample.get(name)) for sample in sorted(own, key=lambda one: one["doc_id"])
        ]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or not known:
            return None
        items[task] = known
    return items or None


def primary_score(
    results: Mapping[str, Any], info: TaskInfo, scores: Mapping[str, float | None]
) -> dict[str, Any]:
    """The score that stands for the task.

    Raises:
        ValueError: if there is none, or it is not finite.
    """
    metrics = [key for key in scores if "_stderr," not in key]
    wanted = [key for key in metrics if key.split(",")[0] == info.primary_metric]
    if not wanted:
        raise ValueError(
            f"{info.name} has no metric {info.primary_metric!r}, only {', '.join(metrics)}"
        )
    key = wanted[0]
    name, _, filtered = key.partition(",")
    if scores[key] is None:
        raise ValueError(f"the score {key} is not a finite number")
    better = results.get("higher_is_better", {}).get(info.name, {})
    return {
        "metric": key,
        "value": scores[key],
        "stderr": scores.get(f"{name}_stderr,{filtered}"),
        "higher_is_better": _higher_is_better(better, name),
        "chance": info.chance,
    }


def _higher_is_better(said: Mapping[str, Any], metric: str) -> bool:
    # lm-eval names pass_at_k's direction by its function and its scores by k.
    value = said.get(metric, next(iter(said.values()), True) if len(said) == 1 else True)
    return bool(value) if value is not None else True


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
