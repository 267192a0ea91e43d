"""The commands ``sa-patch generate``, ``calibrate`` and ``search``, which load one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from sa_patch.cli.help_texts import (
    CALIBRATE_EXAMPLES,
    GENERATE_EXAMPLES,
    SEARCH_EXAMPLES,
    with_examples,
)
from sa_patch.cli.sweep import know_gated_models


def add_generate(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, GENERATE_EXAMPLES)
    parser.add_argument("model", help="hub id, folder, or smollm2-135m")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        *("--pattern", "--method"),
        dest="method",
        default="sa",
        help="a name, or a text form such as sinks:4+swa:60+sa:64",
    )
    parser.add_argument("--window", type=int, help="keys in view (default: 128)")
    parser.add_argument("--seed", type=int, help="of a random pattern")
    parser.add_argument("--topk", type=int, help="blocks of moba")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument(
        "--layers", help="layers to patch, such as 4-35, or a schedule file (default: all)"
    )
    parser.add_argument("--decode", default="full", help="full or pattern, for the new tokens")
    parser.add_argument(
        "--verbose", action="store_true", help="say which backend served, and tokens a second"
    )
    _add_loading(parser)
    parser.set_defaults(run=_generate)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, CALIBRATE_EXAMPLES)
    parser.description = (
        "Measure which layers are harmed most when they go sparse, or (--full-heads) which heads "
        "retrieve, or (--share) which number in a pattern spends a share of full attention's cost."
    )
    parser.add_argument("model", help="hub id, folder, or smollm2-135m")
    parser.add_argument(
        *("--pattern", "--method"),
        dest="method",
        help="pattern of sparse layers (default: sinks:4+swa:60+sa:64) or heads (default: "
        "sinks:4+swa:252); with --share {} stands for the number that is sought",
    )
    parser.add_argument("--full-layers", type=int, help="how many stay full (default: 1 in 5)")
    parser.add_argument("--full-heads", type=int, help="how many KV heads of the model stay full")
    parser.add_argument("--share", help="of full attention's cost, such as 1/8")
    parser.add_argument(
        "--cost",
        default="flops",
        help="flops, choosing included, or visited: keys that a tile reads (default: %(default)s)",
    )
    parser.add_argument("--n", type=int, default=1024, help="tokens of a document (default: 1024)")
    parser.add_argument("--documents", type=int, default=4, help="of each kind (default: 4)")
    parser.add_argument("--text", type=Path, help="a file to take documents from")
    parser.add_argument("--seeds", help="of a random pattern, to average over, such as 0,1,2")
    parser.add_argument("--layers", help="those that may go sparse, such as 4-35 (default: all)")
    parser.add_argument(
        "--compare", action="store_true", help="measure rival schedules on held-out documents"
    )
    parser.add_argument("--out", type=Path, help="default: runs/schedule-MODEL.yaml and the like")
    _add_loading(parser)
    parser.set_defaults(run=_calibrate)


def add_search(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, SEARCH_EXAMPLES)
    parser.description = "Find the composition of patterns that keeps the most within a budget."
    parser.add_argument("model", help="hub id, folder, or smollm2-135m")
    parser.add_argument(
        "--share", default="1/8", help="of full attention's cost (default: %(default)s)"
    )
    parser.add_argument(
        "--cost",
        default="flops",
        help="flops, choosing included, or visited: keys that a tile reads (default: %(default)s)",
    )
    parser.add_argument("--n", type=int, default=4096, help="tokens of a text (default: 4096)")
    parser.add_argument(
        "--trials", type=int, default=30, help="candidates beside named methods (default: 30)"
    )
    parser.add_argument(
        "--layer-trials",
        type=int,
        default=0,
        help="then ways to share the budget out over the layers (default: 0)",
    )
    parser.add_argument("--documents", type=int, default=4, help="of each kind (default: 4)")
    parser.add_argument(
        "--held-out", type=int, default=8, help="of each kind, for the end (default: 8)"
    )
    parser.add_argument("--text", type=Path, help="a file to take language from")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    parser.add_argument("--out", type=Path, help="default: runs/search-MODEL-N-COST-SHARE")
    _add_loading(parser)
    parser.set_defaults(run=_search)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded and its attention computed."""
    parser.add_argument("--backend", default="auto", help="of attention; see sa-patch methods")
    parser.add_argument("--dtype", default="auto", help="auto: the weights' own; GGUF: float32")
    parser.add_argument("--device-map", help="for example auto, to spread a large model")
    parser.add_argument("--gguf-file", help="a GGUF file's name in that folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _generate(options: argparse.Namespace) -> int:
    from sa_patch.evaluation.generation import choose_pattern, generate_text

    know_gated_models()
    generate_text(
        options.model,
        options.prompt,
        choose_pattern(options.method, options.window, options.seed, options.topk),
        max_new_tokens=options.max_new_tokens,
        chat=options.chat,
        decode=options.decode,
        backend=options.backend,
        layers=options.layers,
        dtype=options.dtype,
        device_map=options.device_map,
        gguf_file=options.gguf_file,
        revision=options.revision,
        verbose=options.verbose,
    )
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from rich.console import Console

    from sa_patch.evaluation.calibration.options import Options
    from sa_patch.evaluation.calibration.run import run_calibration

    given = {field.name: getattr(options, field.name) for field in fields(Options)}
    for path in run_calibration(Options(**given), Console(), options.command_line):
        print(path)
    return 0


def _search(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from rich.console import Console

    from sa_patch.sweep.search.options import Options

    given = {field.name: getattr(options, field.name) for field in fields(Options)}
    asked = Options(**given)
    # Optuna is an extra: it is imported once the request, and that it is there, are checked.
    asked.check()
    from sa_patch.sweep.search.run import run_search

    for path in run_search(asked, Console(), options.command_line):
        print(path)
    return 0
