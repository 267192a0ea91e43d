"""``sa-patch calibrate`` with ``--share`` (the number in a pattern) or ``--full-heads``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sa_patch.evaluation.calibration.documents import (
    Document,
    file_documents,
    generated_documents,
    recall_documents,
)
from sa_patch.evaluation.calibration.heads import full_heads, layers_by_head, retrieval_scores
from sa_patch.evaluation.calibration.options import Options
from sa_patch.evaluation.calibration.schedule_file import write_schedule
from sa_patch.evaluation.calibration.thresholds import COSTS, Spent, fit_threshold
from sa_patch.files.provenance import now
from sa_patch.patching import Schedule
from sa_patch.patterns import Pattern


def fit_documents(options: Options, tokenizer: Any) -> list[Document]:
    """The texts of such a calibration: of every kind for a share, with questions for heads."""
    shape = tokenizer, options.n, options.documents
    if options.full_heads is not None:
        return recall_documents(*shape)
    if options.text is not None:
        return file_documents(tokenizer, options.text, *shape[1:], held_out=False)
    return generated_documents(*shape, held_out=False)


def calibrate_share(
    options: Options,
    model: Any,
    documents: Sequence[Document],
    session: Mapping[str, Any],
    console: Console,
) -> Path:
    """Find the number that spends most within the share, print it, and write the pattern.

    Raises:
        UserError: if no number will do.
    """
    tokens = [torch.tensor(document.tokens) for document in documents]
    progress = Console(stderr=True, highlight=False, soft_wrap=True)

    def report(tried: Pattern, found: Spent) -> None:
        cost = f"{found.of(options.cost):.4f} of full attention's {COSTS[options.cost]}"
        progress.print(f"{tried} spends {cost}")

    family, cost = str(options.method), options.cost
    pattern, spent = fit_threshold(
        model, family, options.budget, tokens, cost, options.backend, report
    )
    console.print(str(pattern), highlight=False, soft_wrap=True)
    console.print(
        f"attention FLOPs: {spent.share:.4f} of full attention's; keys that a tile of queries "
        f"reads: {spent.visited:.4f}; keys of a query: {spent.mean_keys:.1f}. A mean over "
        f"{len(tokens)} texts of {options.n} tokens; other texts may spend more or less.",
        highlight=False,
        soft_wrap=True,
    )
    measured = {
        "share": options.share,
        "cost": options.cost,
        "flops": round(spent.share, 5),
        "visited": round(spent.visited, 5),
        "mean_keys": round(spent.mean_keys, 2),
    }
    write_schedule(
        options.schedule_file,
        {"pattern": str(pattern)} | measured | _about(options, model, session),
        ["It goes wherever a pattern goes: --pattern FILE, or patterns: [FILE] in a sweep."],
    )
    return options.schedule_file


def calibrate_heads(
    options: Options,
    model: Any,
    documents: Sequence[Document],
    session: Mapping[str, Any],
    console: Console,
) -> Path:
    """Score the heads, print those that stay full, and write the layers' patterns.

    Raises:
        UserError: if the model has not so many heads.
    """
    scores = retrieval_scores(model, documents)
    full = full_heads(scores, int(options.full_heads or 0))
    layers = layers_by_head(scores, full, options.pattern)
    count = sum(map(len, scores.values()))
    table = Table(title=f"heads that retrieve: {len(full)} of {count} KV heads stay full")
    for name in ("layer", "KV head", "attention to the answer"):
        table.add_column(name, justify="right")
    for layer, head in full:
        table.add_row(str(layer), str(head), f"{float(scores[layer][head]):.3f}")
    console.print(table)
    found = {layer: [round(float(x), 4) for x in own] for layer, own in sorted(scores.items())}
    write_schedule(
        options.schedule_file,
        {"layers": Schedule.read(layers).to_plain(), "full_heads": len(full)}
        | _about(options, model, session)
        | {"scores": found},
        [
            "layers: KV heads that retrieve stay full, all others take the pattern.",
            "scores: how much attention a KV head pays to the answer that is asked for.",
            "Use it as --layers FILE on the command line, or as layers: FILE in a sweep.",
        ],
    )
    return options.schedule_file


def _about(options: Options, model: Any, session: Mapping[str, Any]) -> dict[str, Any]:
    """Where it comes from."""
    return {
        "model": options.model,
        "text": "generated" if options.text is None else str(options.text),
        "tokens": options.n,
        "documents": options.documents,
        "dtype": str(model.dtype).removeprefix("torch."),
        "written": now(),
        "commit": (session.get("git") or {}).get("commit"),
    }
