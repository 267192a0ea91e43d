"""One call of ``sa-patch calibrate``: load, measure, print, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sa_patch.evaluation.calibration.documents import Document, file_documents, generated_documents
from sa_patch.evaluation.calibration.fit_run import (
    calibrate_heads,
    calibrate_share,
    fit_documents,
)
from sa_patch.evaluation.calibration.loss_store import LossStore
from sa_patch.evaluation.calibration.measurement import Calibration, Calibrator, Loss, check_budget
from sa_patch.evaluation.calibration.options import Options
from sa_patch.evaluation.calibration.schedule_file import write_schedule
from sa_patch.files.provenance import describe_session, now
from sa_patch.models.loading import load_causal_lm, load_tokenizer
from sa_patch.patching import Schedule, format_layers
from sa_patch.patching.layers import default_layers
from sa_patch.patterns import seed_of


def run_calibration(options: Options, console: Console, command: Sequence[str] = ()) -> list[Path]:
    """Measure, print the tables, and write the schedule and the measurements.

    Interrupted at any time, it keeps what it has measured; the same call goes on from there.

    Returns:
        The files written.

    Raises:
        UserError: for anything that is not allowed, before the model is loaded where possible.
    """
    source = options.check()
    session = describe_session(command)
    tokenizer = load_tokenizer(options.model, source)
    if options.share is not None or options.full_heads is not None:
        fit = calibrate_share if options.full_heads is None else calibrate_heads
        documents = fit_documents(options, tokenizer)
        model = load_causal_lm(options.model, source, options.dtype, options.device_map)
        return [fit(options, model, documents, session, console)]
    documents = _documents(options, tokenizer, held_out=False)
    held_out = _documents(options, tokenizer, held_out=True) if options.compare else []
    settings = {"model": source.identity, "dtype": options.dtype, "backend": options.backend}
    store = LossStore(options.schedule_file.with_suffix(".json"), settings)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    if len(store):
        progress.print(f"{len(store)} losses are known from {store.path}")
    model = load_causal_lm(options.model, source, options.dtype, options.device_map)
    candidates = options.candidates or sorted(default_layers(model))
    Schedule.read(candidates).assign(model, options.pattern)
    budget = check_budget(options.full_layers, candidates)

    def say(layer: int, rise: Loss) -> None:
        progress.print(f"layer {layer} alone sparse: {rise.mean:+.4f}")

    calibrator = Calibrator(model, options.patterns, candidates, store, options.backend, say)
    found = calibrator.calibrate(documents, held_out, budget)
    sparse = calibrator.others(found.schedules["calibrated"])
    session |= {"ended": now(), "dtype": str(model.dtype).removeprefix("torch.")}
    _write(options, candidates, sparse, found, store, session)
    console.print(_layer_table(found))
    if held_out:
        console.print(_rival_table(found))
    return [options.schedule_file, store.path]


def _documents(options: Options, tokenizer: Any, held_out: bool) -> list[Document]:
    if options.text is None:
        return generated_documents(tokenizer, options.n, options.documents, held_out)
    return file_documents(tokenizer, options.text, options.n, options.documents, held_out)


def _write(
    options: Options,
    candidates: Sequence[int],
    sparse: Sequence[int],
    found: Calibration,
    store: LossStore,
    provenance: dict[str, Any],
) -> None:
    """The schedule, and beside it all that was measured."""
    about = {
        "model": options.model,
        "pattern": str(options.pattern),
        "seeds": [seed_of(pattern) for pattern in options.patterns if seed_of(pattern) is not None],
        "text": "generated" if options.text is None else str(options.text),
        "tokens": options.n,
        "documents": options.documents,
        "dtype": provenance["dtype"],
        "candidates": format_layers(candidates),
        "full_layers": list(found.schedules["calibrated"]),
    }
    store.finish(about | found.to_plain() | {"provenance": provenance})
    rises = {layer: round(rise.mean, 5) for layer, rise in found.rises.items()}
    commit = (provenance.get("git") or {}).get("commit")
    write_schedule(
        options.schedule_file,
        {"layers": format_layers(sparse)}
        | about
        | {"rises": rises, "written": provenance["ended"], "commit": commit},
        [
            "layers: those that go sparse; the others stay full.",
            "rises: how much the loss (nats a token) rises when one layer alone goes sparse.",
            "Use it as --layers FILE on the command line, or as layers: FILE in a sweep.",
        ],
    )


def _layer_table(found: Calibration) -> Table:
    """Every candidate and how much the loss rises when it alone goes sparse, most first."""
    kinds = _kinds(found.full)
    table = Table(title="rise of the loss when one layer alone goes sparse, nats a token")
    for name in ("layer", "rise", *kinds):
        table.add_column(name, justify="right")
    table.add_column("schedule")
    for layer in sorted(found.rises, key=lambda layer: -found.rises[layer].mean):
        rise = found.rises[layer]
        kept = "full" if layer in found.schedules["calibrated"] else "sparse"
        each = [f"{rise.by_kind[kind]:+.4f}" for kind in kinds]
        table.add_row(str(layer), f"{rise.mean:+.4f}", *each, kept)
    return table


def _rival_table(found: Calibration) -> Table:
    """The losses of schedules with equally many full layers, on the held-out documents."""
    kinds = _kinds(found.full)
    table = Table(title="loss of schedules on held-out documents, nats a token")
    for name in ("schedule", "full layers"):
        table.add_column(name)
    for name in ("loss", *kinds):
        table.add_column(name, justify="right")
    for name, loss in found.held_out.items():
        kept = found.schedules.get(name)
        shown = "all" if name == "full" else format_layers(kept or ()) or "none"
        each = [f"{loss.by_kind[kind]:.4f}" for kind in kinds]
        table.add_row(name, shown, f"{loss.mean:.4f}", *each)
    return table


def _kinds(loss: Loss) -> list[str]:
    """The kinds of documents, where there are several to tell apart."""
    return list(loss.by_kind) if len(loss.by_kind) > 1 else []
