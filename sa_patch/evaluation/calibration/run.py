"""One call of ``sa-patch calibrate``: load, measure, print, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sa_patch.evaluation.calibration.documents import Document, file_documents, generated_documents
from sa_patch.evaluation.calibration.files import Store, write_schedule
from sa_patch.evaluation.calibration.measurement import Calibration, Calibrator, Loss
from sa_patch.evaluation.calibration.options import Options
from sa_patch.evaluation.calibration.schedules import check_budget
from sa_patch.evaluation.calibration.tables import layer_table, rival_table
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
    documents = _documents(options, tokenizer, held_out=False)
    held_out = _documents(options, tokenizer, held_out=True) if options.compare else []
    settings = {"model": source.identity, "dtype": options.dtype, "backend": options.backend}
    store = Store(options.schedule_file.with_suffix(".json"), settings)
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
    console.print(layer_table(found))
    if held_out:
        console.print(rival_table(found))
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
    store: Store,
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
