"""Methods trained at equal steps on equal data: their runs, and the table of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.artifacts import write_artifacts
from sa_patch.files.atomic_write import write_whole
from sa_patch.training.cores import train_each
from sa_patch.training.pretraining.corpus import prepare
from sa_patch.training.pretraining.figures import diverged, draw_comparison
from sa_patch.training.pretraining.loop import pretrain
from sa_patch.training.pretraining.methods import Method
from sa_patch.training.pretraining.recall import VALUES
from sa_patch.training.pretraining.run_folder import RunFolder, run_name
from sa_patch.training.pretraining.settings import PretrainingSettings
from sa_patch.training.spread import spread, spread_text


@dataclass(frozen=True)
class Run:
    """A method's training at a seed, in a folder of its own within `runs`."""

    settings: PretrainingSettings
    method: Method
    seed: int
    runs: Path

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs / run_name(str(self.method), self.seed))

    @property
    def corpus(self) -> Path:
        return self.runs / "corpus"

    def check(self) -> None:
        """Raise `UserError` if its folder holds another run."""
        plain = {"settings": self.settings.to_dict(), "method": str(self.method)}
        self.folder.check(plain | {"seed": self.seed})

    def train(self, command: Sequence[str]) -> str | UserError:
        """Its headline once it is complete, or the mistake that it met.

        Progress goes to ``NAME.txt`` beside its folder.
        """
        out = self.folder.path
        with out.with_name(f"{out.name}.txt").open("w") as log, redirect_stderr(log):
            try:
                return pretrain(
                    self.settings, self.method, self.seed, out, self.corpus, command
                ).headline()
            except UserError as error:
                return error


def train_missing(runs: Sequence[Run], cores: Sequence[int] | None, command: Sequence[str]) -> None:
    """Train the runs that are not complete, and print what each has come to.

    Args:
        cores: see `train_each`.
        command: the command line, for the record.

    Raises:
        UserError: once all others are done, if one failed.
    """
    runs[0].runs.mkdir(parents=True, exist_ok=True)
    prepare(runs[0].corpus, runs[0].settings.text)
    missing = [run for run in runs if not run.folder.complete]
    failed = []
    for found in train_each(Run.train, [(run, command) for run in missing], cores):
        if isinstance(found, UserError):
            failed.append(found)
        else:
            print(found, flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} runs failed: {failed[0]}")


def load_results(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The results of complete runs by method, in the order of the folders.

    Raises:
        UserError: if one is not complete, two are the same, or they were not trained alike.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    first: dict[str, Any] | None = None
    for folder in folders:
        result = RunFolder(folder).result()
        first = first or result
        for key in ("settings", "text_fingerprint"):
            if result[key] != first[key]:
                raise UserError(f"{folder} cannot be compared with {folders[0]}: another {key}")
        runs = found.setdefault(result["method"], [])
        if any(run["seed"] == result["seed"] for run in runs):
            raise UserError(f"{folder} has the same method and seed as another run")
        runs.append(result)
    if not found:
        raise UserError("there is no run to compare")
    return found


def summarize(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Means and deviations over seeds, one entry per method, and what all runs share.

    Runs that diverged, to a held-out perplexity that is no finite number, are named and left out.
    """
    first = next(iter(results.values()))[0]
    return {
        "settings": first["settings"],
        "text_fingerprint": first["text_fingerprint"],
        "tokens": first["tokens"],
        "methods": {method: _method(runs) for method, runs in results.items()},
    }


def _method(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sound = [run for run in runs if run["validation_perplexity"] is not None]
    recalls = [run["recall"] for run in sound if run["recall"]]
    gates = [run["gates"] for run in sound if run["gates"]]
    shown: list[dict[str, Any]] = next(
        (run["recall"]["by_distance"] for run in runs if run["recall"]), []
    )
    return {
        "seeds": [run["seed"] for run in runs],
        "diverged": [run["seed"] for run in runs if run["validation_perplexity"] is None],
        "parameters": runs[0]["parameters"],
        "validation_perplexity": _spread([run["validation_perplexity"] for run in sound]),
        "validation_loss": _spread([run["validation_loss"] for run in sound]),
        "recall": _spread([each["accuracy"] for each in recalls]),
        "recall_by_distance": [
            {
                "from": bucket["from"],
                "below": bucket["below"],
                "questions": bucket["questions"],
                "accuracy": _spread([each["by_distance"][i]["accuracy"] for each in recalls]),
            }
            for i, bucket in enumerate(shown)
        ],
        "gates": [
            {branch: _spread([run[layer][branch]["mean"] for run in gates])
             for branch in ("sa", "swa")}
            for layer in range(len(gates[0]) if gates else 0)
        ],
        "curves": [
            {key: [[e["tokens"], e[key]] for e in run["log"] if key in e]
             for key in ("loss", "validation_loss")}
            for run in runs
        ],
    }  # fmt: skip


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Over the runs that measured it; None where no run did."""
    known = [value for value in values if value is not None]
    return spread(known) if known else None


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of a summary, with what was compared."""
    settings = summary["settings"]
    methods = summary["methods"]
    size = settings["model"]
    seeds = sorted({seed for entry in methods.values() for seed in entry["seeds"]})
    lines = [
        f"# Pre-training `{settings['name']}`: methods at equal steps and data",
        "",
        f"{size['layers']} layers, width {size['hidden']}, {size['heads']} heads; sequences of "
        f"{settings['sequence']} tokens, {summary['tokens']:,} tokens in {settings['steps']:,} "
        f"steps, of which {settings['recall']['share']:.0%} of the sequences are generated recall "
        f"documents; seeds {', '.join(map(str, seeds))}. Mean ± standard deviation over seeds. "
        "Perplexity is that of held-out text. Recall is the share of questions answered by the "
        f"right value, in % (a guess among the {VALUES} values: {100 / VALUES:.1f}), also by the "
        "distance in tokens between question and answer.",
        "",
    ]
    buckets = next(iter(methods.values()))["recall_by_distance"]
    head = ["method", "parameters", "perplexity", "recall", *map(_bucket, buckets)]
    lines += [
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
    ]
    for name, entry in methods.items():
        cells = [
            f"`{name}`",
            f"{entry['parameters']:,}",
            spread_text(entry["validation_perplexity"], 2),
            spread_text(entry["recall"], 1, 100.0),
        ]
        cells += [spread_text(each["accuracy"], 1, 100.0) for each in entry["recall_by_distance"]]
        lines.append("| " + " | ".join(cells) + " |")
    if said := diverged(methods):
        lines += ["", said]
    for name, entry in methods.items():
        if entry["gates"]:
            lines += ["", f"Gates of `{name}`, mean over held-out tokens and heads:", ""]
            lines += ["| layer | SA | SWA |", "| ---: | ---: | ---: |"]
            lines += [
                f"| {layer} | {spread_text(each['sa'], 3)} | {spread_text(each['swa'], 3)} |"
                for layer, each in enumerate(entry["gates"])
            ]
    return "\n".join(lines) + "\n"


def _bucket(bucket: Mapping[str, Any]) -> str:
    if bucket["below"] is None:
        return f"from {bucket['from']} on"
    return f"{bucket['from']} to {bucket['below'] - 1}"


def write_comparison(
    folders: Sequence[Path], out: Path, provenance: Mapping[str, Any]
) -> list[Path]:
    """Write ``comparison.json``, ``.png``, ``.svg`` and ``.md`` into the folder `out`.

    Raises:
        UserError: see `load_results`.
    """
    summary = summarize(load_results(folders))
    table = out / "comparison.md"
    write_whole(table, markdown(summary).encode())
    return [
        *write_artifacts(out, "comparison", summary, draw_comparison(summary), provenance),
        table,
    ]
