"""The commands ``sa-patch methods`` and ``bench``, which need no model."""

from __future__ import annotations

import argparse

from sa_patch.cli.help_texts import BENCH_EXAMPLES, with_examples


def add_methods(parser: argparse.ArgumentParser) -> None:
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


def add_bench(parser: argparse.ArgumentParser) -> None:
    from sa_patch.benchmark.arguments import ATTENTION_OPTIONS

    with_examples(parser, BENCH_EXAMPLES)
    parser.description = "Time attention over every pattern on every backend beside its rivals."
    for name, value, meaning in ATTENTION_OPTIONS:
        parser.add_argument(f"--{name}", metavar=value, help=meaning)
    parser.set_defaults(run=_bench)


def _methods(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sa_patch.kernels.availability import Shape, print_methods

    shape = Shape(options.n, options.heads, options.kv_heads, options.head_dim, options.window)
    print_methods(shape, Console())
    return 0


def _bench(options: argparse.Namespace) -> int:
    from sa_patch.benchmark.arguments import ATTENTION_OPTIONS
    from sa_patch.benchmark.attention.options import make_options
    from sa_patch.benchmark.attention.run import run_bench

    fields = [name.replace("-", "_") for name, _, _ in ATTENTION_OPTIONS]
    given = {field: getattr(options, field) for field in fields}
    outcome = run_bench(make_options(**given), command=options.command_line)
    for path in outcome.files:
        print(path)
    return outcome.exit_status
