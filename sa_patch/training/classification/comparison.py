"""Many trials: those that choose how each classifier is trained, then those that are measured."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sa_patch.training.classification.settings import Classifier, Trial
from sa_patch.training.classification.table import entry
from sa_patch.training.classification.training import (
    Columns,
    Measure,
    choose,
    choosing_trials,
    ensure_trial,
    read_trial,
)


@dataclass(frozen=True)
class Plan:
    """What is compared, and how.

    Args:
        sources: each with its fingerprint.
        classifiers: those that are compared on each.
        trials: of each, with the seeds ``0 .. trials - 1``.
        learning_rates, epochs, choosing, held_out: the rates that are tried, the most epochs, how
            many times, and the share of the training texts that is held out for it.
    """

    sources: tuple[tuple[str, str], ...]
    classifiers: tuple[Classifier, ...]
    trials: int
    learning_rates: tuple[float, ...]
    epochs: int
    choosing: int
    held_out: float

    @property
    def choosers(self) -> dict[tuple[str, Classifier], list[Trial]]:
        """The trials by which each classifier's learning rate and epochs are chosen."""
        # Other seeds than those of the trials that count.
        seeds = range(1000, 1000 + self.choosing)
        return {
            (source, classifier): choosing_trials(
                source,
                fingerprint,
                classifier,
                learning_rates=self.learning_rates,
                epochs=self.epochs,
                seeds=seeds,
                held_out=self.held_out,
            )
            for source, fingerprint in self.sources
            for classifier in self.classifiers
        }

    def notes(self) -> list[str]:
        """How it is done, in sentences."""
        one = self.classifiers[0]
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        several = self.choosing > 1
        by = f"mean accuracy of {self.choosing} seeds" if several else "accuracy of one seed"
        return [
            f"Mean ± standard deviation over {self.trials} trials (seeds of weights and order).",
            f"Texts are cut to {one.max_length} words, batches hold {one.batch} texts.",
            f"Learning rate ({rates}) and epochs (1 to {self.epochs}) are chosen for each "
            f"classifier alike, by the {by} on "
            f"{self.held_out:.0%} of the training texts; test texts are read once, at the end.",
        ]


def run(
    plan: Plan,
    folder: Path,
    columns: Columns,
    cores: Sequence[int] | None,
    measure: Measure | None = None,
) -> list[Any]:
    """Train all that is missing in `folder`; the rows of the table.

    Args:
        measure: see `sa_patch.training.classification.training.run_trial`.
        cores: that many trials at once, each bound to one; None for one after another, or, under
            ``accelerate launch``, one in each process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # By seed: whenever it is stopped, all classifiers are about equally far.
    choosing = [t for _, several in _by_seed(plan.choosers) for t in several]
    _ensure(choosing, folder, columns, cores, None)
    chosen = {key: choose(trials, folder) for key, trials in plan.choosers.items()}
    prints = dict(plan.sources)
    trials = {
        (source, classifier): [
            Trial(source, prints[source], classifier, seed, how["learning_rate"], how["epochs"])
            for seed in range(plan.trials)
        ]
        for (source, classifier), how in chosen.items()
    }
    counted = [t for _, several in _by_seed(trials) for t in several]
    _ensure(counted, folder, columns, cores, measure)
    rows = []
    for key, several in trials.items():
        results = [read_trial(trial, folder) for trial in several]
        rows.append(entry(*key, chosen[key], [r for r in results if r is not None]))
    return rows


def _by_seed(trials: dict[Any, list[Trial]]) -> list[tuple[int, list[Trial]]]:
    found: dict[int, list[Trial]] = {}
    for several in trials.values():
        for trial in several:
            found.setdefault(trial.seed, []).append(trial)
    return sorted(found.items())


def _ensure(
    trials: list[Trial],
    folder: Path,
    columns: Columns,
    cores: Sequence[int] | None,
    measure: Measure | None,
) -> None:
    if cores is None:
        # It reads what `accelerate launch` says of CPUs, which `PartialState` alone does not.
        accelerator = Accelerator()
        # Of all trials: what is still missing changes while other processes work.
        for trial in trials[accelerator.process_index :: accelerator.num_processes]:
            if read_trial(trial, folder) is None:
                print(ensure_trial(trial, folder, columns, measure).name, flush=True)
        # The choice needs the files of all processes.
        accelerator.wait_for_everyone()
        return
    missing = [trial for trial in trials if read_trial(trial, folder) is None]
    done = len(trials) - len(missing)
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), context, initializer=_bind, initargs=(free,)) as pool:
        futures = [pool.submit(ensure_trial, trial, folder, columns, measure) for trial in missing]
        try:
            for future in as_completed(futures):
                done += 1
                print(f"{done} of {len(trials)}: {future.result().name}", flush=True)
        except BaseException:
            # What is not begun is left out; a trial that has begun ends and is kept.
            pool.shutdown(cancel_futures=True)
            raise


def _bind(free: Any) -> None:
    """A worker takes a core of its own from a queue of them, and computes on one thread."""
    os.sched_setaffinity(0, {free.get()})
    torch.set_num_threads(1)
