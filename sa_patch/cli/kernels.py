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
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead, find this GPU's launch parameters and keep them for backend='auto'",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="instead, tell what FlashAttention-4 would visit for each pattern; no GPU is needed",
    )
    parser.set_defaults(run=_bench)


def _methods(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sa_patch.benchmark.options import at_least_one, check_heads
    from sa_patch.kernels.availability import Shape, print_methods

    at_least_one(options.n, "n")
    check_heads(options.heads, options.kv_heads, options.head_dim)
    shape = Shape(options.n, options.heads, options.kv_heads, options.head_dim, options.window)
    print_methods(shape, Console())
    return 0


def _bench(options: argparse.Namespace) -> int:
    from sa_patch.benchmark.arguments import ATTENTION_OPTIONS
    from sa_patch.benchmark.attention.options import make_options
    from sa_patch.benchmark.attention.run import run_bench

    if options.tune:
        return _tune(options)
    if options.plan:
        return _plan(options)
    fields = [name.replace("-", "_") for name, _, _ in ATTENTION_OPTIONS]
    given = {field: getattr(options, field) for field in fields}
    outcome = run_bench(make_options(**given), command=options.command_line)
    for path in outcome.files:
        print(path)
    return outcome.exit_status


def _tune(options: argparse.Namespace) -> int:
    from sa_patch.benchmark.attention.options import make_options
    from sa_patch.benchmark.stages.tune import tune_for_user
    from sa_patch.benchmark.tables import say_line

    chosen = make_options(device=options.device, budget=options.budget)
    print(tune_for_user(chosen.device, chosen.budget, say_line))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from sa_patch.benchmark.arguments import read_size, read_sizes, split_names
    from sa_patch.benchmark.plan_fit import (
        LENGTHS,
        PATTERNS,
        Model,
        chosen_patterns,
        plan_fit,
        plan_table,
    )

    asked = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": options.head_dim}
    given = {name: read_size(text, name) for name, text in asked.items() if text}
    methods = split_names(options.methods or PATTERNS)
    lengths = read_sizes(options.n or LENGTHS, "n")
    model = Model(**given)
    patterns = chosen_patterns(methods, read_size(options.window or "256", "window"))
    print(plan_table([plan_fit(pattern, n, model) for n in lengths for pattern in patterns]))
    return 0
