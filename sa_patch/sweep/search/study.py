"""The trials of a search: asked of Optuna, refused over budget, pruned early, kept in a journal."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole
from sa_patch.sweep.search.quality import Patterns

JOURNAL = "study.journal"
# Asked for at most this many times the trials, where most of them do not fit the budget.
_MOST_ASKED = 20
_STARTUP_TRIALS = 10

Suggest = Callable[[Trial], Patterns]
"""The patterns of a trial, within the budget; raises `UserError` where that cannot be.

It says in the trial's attribute ``patterns`` what they are, as JSON can hold it.
"""


class BetterHalf(optuna.pruners.BasePruner):
    """Stops a trial whose value at a rung lies below the median of those that are over.

    Optuna's own successive halving counts what a kill cut short as well, so that going on would
    not give what one go gives; its median takes values of short texts for those of long ones.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        rung = trial.last_step
        if rung is None:
            return False
        others = [
            one.intermediate_values[rung]
            for one in finished(study)
            if rung in one.intermediate_values and "repeats" not in one.user_attrs
        ]
        return bool(others) and trial.intermediate_values[rung] < statistics.median(others)


def open_study(folder: Path, name: str, settings: Mapping[str, Any]) -> optuna.Study:
    """The study of this name in the folder's journal, new or as far as it came.

    Raises:
        UserError: if it cannot be read or written, or was begun with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / JOURNAL
    try:
        _drop_torn_line(path)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=BetterHalf(),
        )
        known = study.user_attrs.get("settings")
        if known is None:
            study.set_user_attr("settings", dict(settings))
    except OSError as error:
        raise UserError(f"{path} cannot be used ({error.strerror}); give another --out") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no journal of sa-patch search ({error}); give another --out"
        ) from error
    known = known or settings
    other = [key for key, value in settings.items() if known.get(key) != value]
    if other:
        raise UserError(
            f"{folder} was begun with another {other[0]} ({known.get(other[0])!r}, not "
            f"{settings[other[0]]!r}); give another --out, or remove it"
        )
    return study


def run_trials(
    study: optuna.Study,
    trials: int,
    named: Mapping[str, Mapping[str, Any]],
    suggest: Suggest,
    rungs: Sequence[Callable[[Patterns], float]],
    seed: int,
    say: Callable[[FrozenTrial], None] = lambda trial: None,
) -> None:
    """Go on until all named points, and as many others as asked for, are done.

    The sampler is seeded anew for every trial by what is done, so that a search that was stopped
    goes on to what it would have found in one go.

    Args:
        named: points that are measured first and to the end, by name.
        rungs: what to measure, the cheapest first; the last one is the trial's value.
        seed: of the search.
        say: told each trial when it is over.
    """
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)
    while True:
        done = finished(study)
        own = [trial for trial in done if "named" not in trial.user_attrs]
        measured = [one for one in own if not {"refused", "repeats"} & set(one.user_attrs)]
        if len(measured) >= trials or len(own) >= _MOST_ASKED * trials:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(
                seed=seed + len(done),
                n_startup_trials=_STARTUP_TRIALS,
                multivariate=True,
                group=True,
            )
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if len(done) < len(named) and not waiting:
            name = list(named)[len(done)]
            study.enqueue_trial(dict(named[name]), user_attrs={"named": name})
        say(_run_trial(study, suggest, rungs))


def _drop_torn_line(path: Path) -> None:
    """Cut off what a kill left of a line: the next one would be written behind it."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_whole(path, whole)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to an end, whichever, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of the largest value, the first of equals."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def _run_trial(
    study: optuna.Study, suggest: Suggest, rungs: Sequence[Callable[[Patterns], float]]
) -> FrozenTrial:
    trial = study.ask()
    try:
        patterns = suggest(trial)
    except UserError as error:
        trial.set_user_attr("refused", str(error))
        return study.tell(trial, state=TrialState.PRUNED)
    same = trial.user_attrs["patterns"]
    known = next((one for one in finished(study) if one.user_attrs.get("patterns") == same), None)
    if known is not None:
        trial.set_user_attr("repeats", known.number)
        for step, value in known.intermediate_values.items():
            trial.report(value, step)
        return study.tell(
            trial, known.value if known.state == TrialState.COMPLETE else None, state=known.state
        )
    for rung, measure in enumerate(rungs):
        value = measure(patterns)
        trial.report(value, rung)
        stop = trial.should_prune() and "named" not in trial.user_attrs
        if stop and rung + 1 < len(rungs):
            return study.tell(trial, state=TrialState.PRUNED)
    return study.tell(trial, value)
