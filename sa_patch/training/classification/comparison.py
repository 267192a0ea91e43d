"""Classifiers compared: how each is trained is chosen, then trials are measured and tabulated."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sa_patch.errors import UserError
from sa_patch.files.artifacts import write_artifacts, write_figure
from sa_patch.files.atomic_write import write_whole
from sa_patch.training.classification.data import Columns
from sa_patch.training.classification.figures import draw_accuracy, draw_graphs
from sa_patch.training.classification.settings import Classifier, Plan, Trial, short_name
from sa_patch.training.classification.training import Measure, ensure_trial, read_trial
from sa_patch.training.cores import train_each
from sa_patch.training.spread import spread, spread_text


def run(
    plan: Plan,
    sources: Mapping[str, str],
    folder: Path,
    columns: Columns,
    cores: Sequence[int] | None,
    measure: Measure | None = None,
) -> list[dict[str, Any]]:
    """Train all that is missing in `folder`; the rows of the table.

    Args:
        sources: fingerprints of the data sets.
        measure: see `sa_patch.training.classification.training.run_trial`.
        cores: see `train_each`; None, under ``accelerate launch``, for one trial at once in each
            process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compared = [(*source, one) for source, one in product(sources.items(), plan.classifiers)]
    choosing = [plan.trials_of(*each) for each in compared]
    _train_missing(choosing, folder, columns, cores)
    chosen = [choose(trials, folder) for trials in choosing]
    counted = [plan.trials_of(*each, how) for each, how in zip(compared, chosen, strict=True)]
    _train_missing(counted, folder, columns, cores, measure)
    return [
        entry(source, classifier, how, [_result(trial, folder) for trial in trials])
        for (source, _, classifier), how, trials in zip(compared, chosen, counted, strict=True)
    ]


def _train_missing(
    trials: Iterable[Sequence[Trial]],
    folder: Path,
    columns: Columns,
    cores: Sequence[int] | None,
    measure: Measure | None = None,
) -> None:
    # By seed: whenever it is stopped, all classifiers are about equally far.
    mine = sorted(chain.from_iterable(trials), key=lambda trial: trial.seed)
    # It reads what `accelerate launch` says of CPUs, which `PartialState` alone does not.
    accelerator = Accelerator() if cores is None else None
    if accelerator is not None:
        # Of all trials: what is still missing changes while other processes work.
        mine = mine[accelerator.process_index :: accelerator.num_processes]
    missing = [trial for trial in mine if read_trial(trial, folder) is None]
    runs = [(trial, folder, columns, measure) for trial in missing]
    first = len(mine) - len(missing) + 1
    for done, path in enumerate(train_each(ensure_trial, runs, cores), first):
        print(f"{done} of {len(mine)}: {path.name}", flush=True)
    if accelerator is not None:
        # What follows needs the files of all processes.
        accelerator.wait_for_everyone()


def _result(trial: Trial, folder: Path) -> dict[str, Any]:
    result = read_trial(trial, folder)
    if result is None:
        raise UserError(f"{trial.file_name} is missing in {folder}; start the run again")
    return result


def choose(trials: Sequence[Trial], folder: Path) -> dict[str, Any]:
    """The learning rate and epochs of the best mean held-out accuracy; of equals the fewest epochs.

    Args:
        trials: complete ones of one classifier.
    """
    curves: dict[float, list[list[float]]] = {}
    for trial in trials:
        curve = _result(trial, folder)["held_out_accuracy"]
        curves.setdefault(trial.learning_rate, []).append(curve)
    means = {
        rate: [statistics.fmean(column) for column in zip(*runs, strict=True)]
        for rate, runs in curves.items()
    }
    accuracy, epochs, rate = max(
        (mean, -epoch, -rate) for rate, line in means.items() for epoch, mean in enumerate(line, 1)
    )
    return {
        "learning_rate": -rate,
        "epochs": -epochs,
        "held_out_accuracy": accuracy,
        "curves": [{"learning_rate": rate, "mean": line} for rate, line in means.items()],
    }


def entry(
    source: str,
    classifier: Classifier,
    chosen: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One row: a classifier on a data set.

    Args:
        chosen: of `choose`.
        results: of its trials, in the order of their seeds.
    """
    return {
        "source": short_name(source),
        "attention": classifier.attention,
        "classifier": classifier.model_dump(),
        "chosen": chosen,
        "parameters": results[0]["parameters"],
        "train_texts": results[0]["train_texts"],
        "test_texts": results[0]["measured_texts"],
        "seconds": statistics.fmean(result["seconds"] for result in results),
        "diverged": sum("diverged" in result for result in results),
        "accuracy": _spread([result["accuracy"] for result in results]),
        "ablated": {
            share: _spread([result["ablated"][share] for result in results])
            for share in results[0]["ablated"]
        },
        "graph": _graph([result["measured"] for result in results if "measured" in result]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = spread(known)
    return {"mean": found["mean"], "median": statistics.median(known), **found}


def _graph(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Over trials: gaps and paths by length; the drawn text of the first one.

    "without_path" trials, in a text of which weights join no two words, do not count in
    "median_path".
    """
    if not measured:
        return None
    lengths = [
        {
            "n": rows[0]["n"],
            "texts": rows[0]["texts"],
            "gap": _spread([row["gap"] for row in rows]),
            "median_path": _spread([row["median_path"] for row in rows]),
            "without_path": sum(row["median_path"] is None for row in rows),
        }
        for rows in zip(*(one["lengths"] for one in measured), strict=True)
    ]
    return {"lengths": lengths, "drawn": measured[0]["drawn"]}


def markdown(content: Mapping[str, Any]) -> str:
    """The table, with what was done in words."""
    lines = ["# Text classification by attention", "", " ".join(content["notes"]), ""]
    lines += [
        "| data set | layers x heads x head_dim | attention | test accuracy, % | held out, % | "
        "learning rate | epochs | s a trial |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in content["entries"]:
        one, chosen = row["classifier"], row["chosen"]
        accuracy = spread_text(row["accuracy"], 1, 100)
        if row.get("diverged"):
            accuracy += f" ({row['diverged']} diverged)"
        lines.append(
            f"| {row['source']} | {one['layers']} x {one['heads']} x {one['head_dim']} | "
            f"{row['attention']} | {accuracy} | "
            f"{100 * chosen['held_out_accuracy']:.1f} | {chosen['learning_rate']:g} | "
            f"{chosen['epochs']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def write_comparison(
    out: Path,
    entries: Sequence[dict[str, Any]],
    notes: Sequence[str],
    provenance: Mapping[str, Any],
) -> list[Path]:
    """Write ``classification.json``, ``.png``, ``.svg`` and ``.md`` into `out`, and where graphs
    were measured ``graphs`` and ``diffusion`` as pictures.

    Args:
        entries: of `entry`; layers and heads should not differ where head_dim does not.
        notes: sentences on how it was done.
    """
    content = {"notes": list(notes), "entries": list(entries)}
    table = out / "classification.md"
    write_whole(table, markdown(content).encode())
    files = write_artifacts(out, "classification", content, draw_accuracy(content), provenance)
    for name, figure in draw_graphs(content).items():
        files += write_figure(out / name, figure)
    return [*files, table]
