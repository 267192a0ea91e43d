"""A prefill benchmark as text: Markdown, and lines for the terminal."""

from __future__ import annotations

import statistics
from typing import Any

from sa_patch.benchmark.goals import goals_markdown
from sa_patch.benchmark.prefill.parts import PARTS
from sa_patch.benchmark.prefill.record import Prefill, PrefillBench, Verdict
from sa_patch.benchmark.record import fastest, machine, packages
from sa_patch.benchmark.tables import bullets, number, ordered, spread, table

REHEARSAL = "a rehearsal with shrunken models: no result"
COLUMNS = (
    "what | backend | >s | >range | >rounds | >tokens/s | >x best full | >GiB | "
    f"{' | '.join(f'>{part}' for part in PARTS)} | >decode ms"
)
NOTES = """\
- **s**: median seconds of one prefill: from token ids to the last token's logits and a filled
  cache, one prompt of random tokens. Permutations and plans are made anew each time. The rows of a
  length take turns, in a new random order each round.
- **x best full**: time of the fastest full attention at this length over the row's.
- **GiB**: peak of memory beside the weights, in one pass.
- **attention** (scores, softmax, values, and all that choosing keys takes), **projections** (the
  rest of the attention modules, rotary embeddings and cache too), **mlp**, **rest** (embedding,
  norms, masks, logits): share of one more pass.
- **decode ms**: median of the tokens written after the prompt, which see all keys
  (`decode="full"`)."""


def markdown(bench: PrefillBench) -> str:
    """The whole run as Markdown."""
    parts = ["# Prefill benchmark", machine_line(bench)]
    if bench.options["small"]:
        parts.append(f"**This is {REHEARSAL}.**")
    if not bench.complete:
        parts.append("**Not finished: what was measured until it stopped.**")
    if bench.goals:
        parts += ["## Goals", goals_markdown(bench.goals)]
    for name, facts in bench.models.items():
        parts += [f"## {name}", _facts(facts)]
        verdicts = [one for one in bench.verdicts if one.model == name]
        parts.append(_verdicts(verdicts))
        for n in bench.lengths(model=name):
            parts += [f"### {name}, n = {n:,}", _table(bench.where(model=name, n=n))]
        if refused := bench.refused.get(name):
            lines = (f"{key}: {reason}" for key, reason in refused.items())
            parts += ["Could not take part:", bullets(lines)]
    if bad := bench.wrong():
        parts += ["## Wrong or failed", bullets(bad)]
    return "\n\n".join([*parts, "## How to read it", NOTES]) + "\n"


def machine_line(bench: PrefillBench) -> str:
    """Machine and versions in one line."""
    options, session = bench.options, bench.provenance
    where = machine(session, options["device"], options["threads"])
    return f"{where}; {options['dtype']}; {packages(session, 'transformers')}."


def cell_line(cells: list[Prefill], one: Prefill) -> str:
    """One finished cell in one line."""
    longest = max(len(cell.label) for cell in cells)
    name = f"  {one.label:{longest}s} {one.backend:9s}"
    if one.median is None:
        return f"{name} {one.status}: {one.reason}"
    between = f"({spread(min(one.seconds), max(one.seconds))}, {len(one.seconds)} times)"
    return f"{name} {number(one.median):>8s} s {between:32s} {_ratio(cells, one)}x best full"


def verdict_line(one: Verdict) -> str:
    """One check in one line."""
    word = "ok" if one.passed else "WRONG"
    return f"  {word:5s} {one.check}, {one.label}: {one.error:.2g} (allowed {one.allowed:.2g})"


def _facts(facts: dict[str, Any]) -> str:
    weights = "random weights" if facts["random_weights"] else "its own weights"
    heads = f"{facts['heads']} query and {facts['kv_heads']} KV heads of {facts['head_dim']}"
    return f"{facts['parameters']:,} parameters ({weights}), {facts['layers']} layers, {heads}."


def _verdicts(verdicts: list[Verdict]) -> str:
    rows = (
        (
            one.check,
            one.label.replace("|", "on"),
            f"{one.error:.2g}",
            f"{one.allowed:.2g}",
            f"{'ok' if one.passed else '**wrong**'} {one.detail}".rstrip(),
        )
        for one in verdicts
    )
    return table("check | what | >error | >allowed | ", rows) if verdicts else "Not checked."


def _table(cells: list[Prefill]) -> str:
    return table(COLUMNS, (_row(cells, one) for one in ordered(cells)))


def _row(cells: list[Prefill], one: Prefill) -> list[str]:
    if one.median is None:
        return [one.label, one.backend, f"{one.status}: {one.reason}"]
    whole = sum(one.parts.values()) or 1.0
    # What "auto" took is worth more than its name.
    backend = f"auto: {', '.join(one.calls)}" if one.backend == "auto" else one.backend
    decode = statistics.median(one.decode_seconds) if one.decode_seconds else None
    return [
        *(one.label, backend, number(one.median), spread(min(one.seconds), max(one.seconds))),
        *(str(len(one.seconds)), number(one.n / one.median), _ratio(cells, one)),
        "-" if one.extra_bytes is None else number(one.extra_bytes / 2**30),
        *(f"{100 * one.parts.get(part, 0.0) / whole:.0f}%" for part in PARTS),
        "" if decode is None else number(1e3 * decode),
    ]


def _ratio(cells: list[Prefill], one: Prefill) -> str:
    best = fastest(one for one in cells if one.full)
    if best is None or best.median is None or one.median is None:
        return "-"
    return number(best.median / one.median)
