"""One call of ``sa-patch search``: load, search, compare on held-out texts, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial
from rich.console import Console

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import (
    Document,
    file_documents,
    generated_documents,
)
from sa_patch.files.provenance import describe_session, now
from sa_patch.models.embedded import ModelSource
from sa_patch.models.loading import load_causal_lm, load_tokenizer
from sa_patch.patching.layers import default_layers
from sa_patch.patterns import parse_pattern
from sa_patch.sweep.run_folder import hold_folder
from sa_patch.sweep.search.costs import Costs
from sa_patch.sweep.search.layers import EVEN, suggest_layers
from sa_patch.sweep.search.options import Options
from sa_patch.sweep.search.quality import Patterns, Quality
from sa_patch.sweep.search.result import Finalist, layers_of, write_result
from sa_patch.sweep.search.space import NAMED, propose
from sa_patch.sweep.search.study import best_of, finished, open_study, run_trials


def run_search(options: Options, console: Console, command: Sequence[str] = ()) -> list[Path]:
    """Search, print the table, and write what was found.

    Interrupted at any time, the same call goes on and finds what it would have found in one go.

    Returns:
        The files written.

    Raises:
        UserError: for anything that is not allowed, before the model is loaded where possible.
    """
    source = options.check()
    with hold_folder(options.folder, "search"):
        return _search(options, source, console, command)


def _search(
    options: Options, source: ModelSource, console: Console, command: Sequence[str]
) -> list[Path]:
    settings = options.settings(source)
    study = open_study(options.folder, "compositions", settings)
    session = describe_session(command)
    tokenizer = load_tokenizer(options.model, source)
    rungs = _rungs(options, tokenizer)
    held_out = _documents(options, tokenizer, options.n, options.held_out, held_out=True)
    model = load_causal_lm(options.model, source, options.dtype, options.device_map)
    search = _Search(options, model, rungs, Console(stderr=True, highlight=False, soft_wrap=True))
    best, named = search.compositions(study)
    finalists = [search.finalist("found", best), search.finalist(_name(named), named)]
    studies = {"compositions": study}
    if options.layer_trials:
        family = best.user_attrs["family"]
        studies["layers"] = open_study(
            options.folder, f"layers of {family}", settings | {"family": family}
        )
        best = search.layers(studies["layers"], family)
        if "named" not in best.user_attrs:
            finalists.insert(0, search.finalist("by layers", best))
    if finalists[-1].patterns == finalists[-2].patterns:
        # Nothing that was tried beats it.
        finalists.pop(-2)
    finalists = [
        dataclasses.replace(one, held_out=search.quality.kept(one.patterns, held_out))
        for one in finalists
    ]
    session["versions"]["optuna"] = optuna.__version__
    session["ended"] = now()
    return write_result(options, settings, studies, finalists, session, console)


class _Search:
    """The two stages, on one loaded model."""

    def __init__(
        self, options: Options, model: Any, rungs: Sequence[list[Document]], progress: Console
    ) -> None:
        self._options = options
        self.quality = Quality(model, options.backend)
        self._sparse = sorted(default_layers(model))
        self._costs = Costs(model, rungs[-1][-1], self._sparse)
        self._progress, self._texts = progress, len(rungs[-1])
        self._rungs: list[Callable[[Patterns], float]] = [
            lambda patterns, own=own: self.quality.recovery(patterns, own)  # type: ignore[misc]
            for own in rungs
        ]

    def compositions(self, study: optuna.Study) -> tuple[FrozenTrial, FrozenTrial]:
        """One pattern for all layers: the best of all trials, and of the named methods.

        Raises:
            UserError: if no named method fits the budget.
        """

        keys = self._options.budget * (self._options.n + 1) / 2

        def suggest(trial: Trial) -> Patterns:
            family = propose(trial, keys)
            trial.set_user_attr("family", family)
            pattern = self._costs.fit(family, self._options.budget, self._options.cost)
            return self._record(trial, dict.fromkeys(self._sparse, pattern))

        self._run(study, self._options.trials, NAMED, suggest)
        done = finished(study)
        best, named = best_of(done), best_of([one for one in done if "named" in one.user_attrs])
        if best is None or named is None:
            raise UserError("no named method fits the budget; give a larger --share or --n")
        return best, named

    def layers(self, study: optuna.Study, family: str) -> FrozenTrial:
        """One family, larger in some parts of the stack: the best of all trials."""

        def suggest(trial: Trial) -> Patterns:
            trial.set_user_attr("family", family)

            def fit(share: float) -> Any:
                return self._costs.fit(family, share, self._options.cost)

            found = suggest_layers(trial, self._sparse, self._options.budget, fit)
            return self._record(trial, found)

        self._run(study, self._options.layer_trials, {"even": EVEN}, suggest)
        best = best_of(finished(study))
        if best is None:
            raise UserError(f"{family} fits the budget in no part of the layers")
        return best

    def finalist(self, name: str, trial: FrozenTrial) -> Finalist:
        patterns = {
            layer: parse_pattern(text)
            for text, own in trial.user_attrs["patterns"].items()
            for layer in own
        }
        assert trial.value is not None
        spent = trial.user_attrs
        return Finalist(name, patterns, trial.value, spent["flops"], spent["visited"])

    def _record(self, trial: Trial, patterns: Patterns) -> Patterns:
        """The patterns, once the trial says what they are and spend."""
        trial.set_user_attr("patterns", layers_of(patterns))
        trial.set_user_attr("flops", self._costs.flops(patterns))
        trial.set_user_attr("visited", self._costs.visited(patterns))
        return patterns

    def _run(self, study: optuna.Study, trials: int, named: Any, suggest: Any) -> None:
        known = len(finished(study))
        self._progress.print(
            f"{len(named)} named and {trials} other candidates, each on up to {self._texts} texts "
            f"of {self._options.n} tokens"
        )
        if known:
            self._progress.print(f"{known} trials are known from {self._options.folder}")
        run_trials(study, trials, named, suggest, self._rungs, self._options.seed, self._say)

    def _say(self, trial: FrozenTrial) -> None:
        attrs = trial.user_attrs
        if "refused" in attrs:
            self._progress.print(f"trial {trial.number}: {attrs.get('family')} does not fit")
            return
        if "repeats" in attrs:
            self._progress.print(f"trial {trial.number}: that of trial {attrs['repeats']} again")
            return
        value = list(trial.intermediate_values.values())[-1]
        shown = " / ".join(attrs["patterns"])
        state = "" if trial.value is not None and trial.state.name == "COMPLETE" else ", stopped"
        self._progress.print(
            f"trial {trial.number}: {shown} keeps {value:.4f} at {attrs['flops']:.4f} of FLOPs, "
            f"{attrs['visited']:.3f} of visited keys{state}"
        )


def _name(trial: FrozenTrial) -> str:
    return f"best named: {trial.user_attrs['named']}"


def _rungs(options: Options, tokenizer: Any) -> list[list[Document]]:
    """Texts of a trial's rungs: one short one of each kind, one, and so on to all of them."""
    everything = _documents(options, tokenizer, options.n, options.documents, held_out=False)
    kinds: dict[str, list[Document]] = {}
    for document in everything:
        kinds.setdefault(document.kind, []).append(document)
    counts = [1]
    while counts[-1] < options.documents:
        counts.append(min(2 * counts[-1], options.documents))
    rungs = [[one for own in kinds.values() for one in own[:count]] for count in counts]
    # Half as long: too short for the questions, a text says so.
    with suppress(UserError):
        rungs.insert(0, _documents(options, tokenizer, options.n // 2, 1, held_out=False))
    return rungs


def _documents(
    options: Options, tokenizer: Any, tokens: int, count: int, held_out: bool
) -> list[Document]:
    found = generated_documents(tokenizer, tokens, count, held_out, one_question=True)
    if options.text is None:
        return found
    recall = [document for document in found if document.kind == "recall"]
    return recall + file_documents(tokenizer, options.text, tokens, count, held_out)
