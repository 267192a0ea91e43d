"""The ``sa-patch`` command: parse, call, print.

Everything heavy is imported inside the functions that need it, so that ``--help`` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sa_patch.cli.analyze import add_analyze
from sa_patch.cli.help_texts import (
    BENCH_EXAMPLES,
    CALIBRATE_EXAMPLES,
    DESCRIPTION,
    EXAMPLES,
    GENERATE_EXAMPLES,
    with_examples,
)
from sa_patch.cli.sweep import add_recovery, add_report, add_sweep, know_gated_models
from sa_patch.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for a request that cannot be served)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["lm-eval"]:
            # argparse would take lm-eval's options, --help among them, for its own.
            return _lm_eval(arguments[1:])
        options = _parser().parse_args(arguments)
        options.command_line = ["sa-patch", *arguments]
        status: int = options.run(options)
        return status
    except UserError as error:
        print(f"sa-patch: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sa-patch: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = with_examples(
        argparse.ArgumentParser(prog="sa-patch", description=DESCRIPTION), EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_sweep(commands.add_parser("sweep", help="measure a grid of patterns and tasks"))
    add_report(commands.add_parser("report", help="page, tables and figures of finished sweeps"))
    add_recovery(commands.add_parser("recovery", help="what patterns keep of full attention"))
    commands.add_parser("lm-eval", help="lm-eval's own command, with the model 'sa-patch'")
    _add_generate(commands.add_parser("generate", help="continue a text with a patched model"))
    _add_calibrate(commands.add_parser("calibrate", help="find the layers to leave full"))
    add_analyze(commands.add_parser("analyze", help="why a pattern behaves as it does"))
    _add_methods(commands.add_parser("methods", help="list patterns and backends"))
    _add_bench(commands.add_parser("bench", help="time every pattern and backend, and rivals"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, GENERATE_EXAMPLES)
    parser.add_argument("model", help="hub id, folder, or smollm2-135m")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--method", default="sa", help="a name, or a text form such as sinks:4+swa:60+sa:64"
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
    _add_loading(parser)
    parser.set_defaults(run=_generate)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, CALIBRATE_EXAMPLES)
    parser.description = "Measure which layers are harmed most when they go sparse."
    parser.add_argument("model", help="hub id, folder, or smollm2-135m")
    parser.add_argument(
        "--method", default="sinks:4+swa:60+sa:64", help="pattern of sparse layers, in text form"
    )
    parser.add_argument("--full-layers", type=int, help="how many stay full (default: 1 in 5)")
    parser.add_argument("--n", type=int, default=1024, help="tokens of a document (default: 1024)")
    parser.add_argument("--documents", type=int, default=4, help="of each kind (default: 4)")
    parser.add_argument("--text", type=Path, help="a file to take documents from")
    parser.add_argument("--seeds", help="of a random pattern, to average over, such as 0,1,2")
    parser.add_argument("--layers", help="those that may go sparse, such as 4-35 (default: all)")
    parser.add_argument(
        "--compare", action="store_true", help="measure rival schedules on held-out documents"
    )
    parser.add_argument("--out", type=Path, help="default: runs/schedule-MODEL.yaml")
    _add_loading(parser)
    parser.set_defaults(run=_calibrate)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded and its attention computed."""
    parser.add_argument("--backend", default="auto", help="of attention; see sa-patch methods")
    parser.add_argument("--dtype", default="auto", help="auto: the weights' own; GGUF: float32")
    parser.add_argument("--device-map", help="for example auto, to spread a large model")
    parser.add_argument("--gguf-file", help="a GGUF file's name in that folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _add_methods(parser: argparse.ArgumentParser) -> None:
    parser.description = "Patterns and backends, which of them work on this machine, and why not."
    for name, value, meaning in (
        ("--n", 1024, "tokens"),
        ("--heads", 16, "query heads"),
        ("--kv-heads", 8, "KV heads"),
        ("--head-dim", 128, "width of a head"),
        ("--window", 128, "window"),
    ):
        parser.add_argument(name, type=int, default=value, help=f"{meaning} (default: {value})")
    parser.set_defaults(run=_methods)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from sa_patch.benchmark.attention.arguments import OPTIONS

    with_examples(parser, BENCH_EXAMPLES)
    parser.description = "Time attention over every pattern on every backend beside its rivals."
    for name, value, meaning in OPTIONS:
        parser.add_argument(f"--{name}", metavar=value, help=meaning)
    parser.set_defaults(run=_bench)


def _lm_eval(arguments: Sequence[str]) -> int:
    from sa_patch.evaluation.lm_eval_command import run_lm_eval

    know_gated_models()
    run_lm_eval(arguments)
    return 0


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


def _methods(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sa_patch.kernels.availability import Shape, print_methods

    shape = Shape(options.n, options.heads, options.kv_heads, options.head_dim, options.window)
    print_methods(shape, Console())
    return 0


def _bench(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sa_patch.benchmark.attention.arguments import OPTIONS
    from sa_patch.benchmark.attention.options import make_options
    from sa_patch.benchmark.attention.run import run_bench

    fields = [name.replace("-", "_") for name, _, _ in OPTIONS]
    given = {field: getattr(options, field) for field in fields}
    outcome = run_bench(make_options(**given), Console(), command=options.command_line)
    for path in outcome.files:
        print(path)
    return outcome.exit_status
