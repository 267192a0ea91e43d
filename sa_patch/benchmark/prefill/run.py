"""Runs a prefill benchmark: build, check, measure, judge and write, model by model."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import PreTrainedModel

from sa_patch.benchmark.clock import quiet_process
from sa_patch.benchmark.goals import goal_lines
from sa_patch.benchmark.prefill.correctness import settled, verify
from sa_patch.benchmark.prefill.goals import judge_goals
from sa_patch.benchmark.prefill.measure import PrefillMeasurer
from sa_patch.benchmark.prefill.models import PUBLISHED, make_model
from sa_patch.benchmark.prefill.options import PrefillOptions
from sa_patch.benchmark.prefill.record import PrefillBench
from sa_patch.benchmark.prefill.setups import gather
from sa_patch.benchmark.prefill.tables import cell_line, markdown, verdict_line
from sa_patch.benchmark.record import provenance, write_results
from sa_patch.benchmark.tables import Say, say_line
from sa_patch.benchmark.time_plan import length_share
from sa_patch.errors import UserError
from sa_patch.files.artifacts import check_folder
from sa_patch.files.provenance import now
from sa_patch.models.free_memory import free_memory
from sa_patch.patching import attention_layers


def run_prefill(
    options: PrefillOptions,
    say: Say = say_line,
    *,
    stem: str = "prefill",
    resumed: PrefillBench | None = None,
    building_counts: bool = False,
) -> PrefillBench:
    """Measure, print, and write ``prefill.json``, ``.md`` and, of several lengths, ``.png``.

    The files are rewritten after each length; an interrupt keeps what was measured.

    Args:
        stem: of the files' names.
        resumed: what an earlier run measured and this one need not measure again.
        building_counts: take the time to build the models from the budget too.

    Raises:
        UserError: if a model cannot be loaded, a prompt is longer than it was made for, or the
            folder cannot be written.
    """
    check_folder(options.out)
    bench = resumed or PrefillBench({}, {})
    bench.resume()
    bench.provenance, bench.options = provenance(sys.argv), options.described()
    left = options.budget
    with quiet_process(options.threads):
        try:
            for index, name in enumerate(options.models):
                say(f"{name}: building it")
                began = time.monotonic()
                model = make_model(
                    name, device=options.device, dtype=options.dtype, small=options.small
                )
                longest = _longest(name, model)
                if longest is not None and max(options.n) > longest:
                    raise UserError(
                        f"a prompt of {max(options.n)} tokens is longer than the {longest} that "
                        f"{name} was made for; give a smaller --n"
                    )
                if not building_counts:
                    began = time.monotonic()
                share = left / (len(options.models) - index)
                _measure_model(options, bench, stem, name, model, began + share, say)
                left -= time.monotonic() - began
                del model
                free_memory()
            bench.complete = True
        finally:
            bench.provenance["ended"] = now()
            _write(options, bench, stem)
    return bench


def _measure_model(
    options: PrefillOptions,
    bench: PrefillBench,
    stem: str,
    name: str,
    model: PreTrainedModel,
    deadline: float,
    say: Say,
) -> None:
    bench.models[name] = _facts(name, model)
    setups, bench.refused[name] = gather(
        model, options.parsed(), options.backends, rehearsal=options.small
    )
    if not bench.checked(name):
        # What an earlier call checked to the end stands; it may have lost the device at one setup.
        done = settled(bench.verdicts, name)
        bench.verdicts = [v for v in bench.verdicts if v.model != name or v.label in done]
        waiting = [setup for setup in setups if setup.key not in done]
        for verdict in verify(model, name, waiting, options.checked):
            bench.verdicts.append(verdict)
            say(verdict_line(verdict))
    # What computes something else has no time worth printing.
    wrong = {one.label for one in bench.verdicts if one.model == name and not one.passed}
    right = [setup for setup in setups if setup.key not in wrong]
    longest = _longest(name, model)
    measurer = PrefillMeasurer(
        model, name, right, deadline, decoded=options.decoded, longest=longest, say=say
    )
    for index, n in enumerate(options.n):
        measurer.measure(n, length_share(n, options.n[index:]), bench.cells)
        _write(options, bench, stem)
        say(f"{name}, n = {n}")
        for one in bench.where(model=name, n=n):
            say(cell_line(bench.where(model=name, n=n), one))
    if options.device == "cuda" and name in PUBLISHED and not options.small:
        goals = judge_goals(bench, name)
        bench.goals = [*(g for g in bench.goals if not g.name.startswith(f"{name}: ")), *goals]
        for line in goal_lines(goals):
            say(line)


def _facts(name: str, model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "layers": len(attention_layers(model)),
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": width,
        "stock_attention": config._attn_implementation,
        "random_weights": name in PUBLISHED,
    }


def _longest(name: str, model: PreTrainedModel) -> int | None:
    """Tokens that a model was made for; random weights know no positions."""
    return None if name in PUBLISHED else int(model.config.max_position_embeddings)


def _write(options: PrefillOptions, bench: PrefillBench, stem: str) -> None:
    def draw() -> bytes:
        from sa_patch.benchmark.prefill.figure import figure_bytes

        return figure_bytes(bench)

    # A line needs two points.
    several = len({one.n for one in bench.cells if one.median is not None}) > 1
    write_results(options.out / stem, bench.content(), markdown(bench), draw if several else None)
