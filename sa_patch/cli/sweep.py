"""The commands ``sa-patch sweep``, ``report`` and ``recovery``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sa_patch.cli.help_texts import REPORT_EXAMPLES, SWEEP_EXAMPLES, with_examples
from sa_patch.errors import UserError


def add_sweep(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, SWEEP_EXAMPLES)
    parser.add_argument(
        "config", help="a YAML file, the name of a packaged one (demo), or - for standard input"
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--limit", type=int, help="first N items of each task, over the file's")
    parser.add_argument(
        "--metadata",
        metavar="JSON",
        help="for the tasks' own functions, over the file's: '{\"max_seq_lengths\": [1024, 4096]}'",
    )
    parser.add_argument(
        "--benchmarks", type=Path, help="folder of local data sets laid out like their hub copies"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the grid, load nothing")
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let tasks such as humaneval run code that the model writes",
    )
    parser.add_argument(
        "--no-reuse",
        action="store_true",
        help="run every prompt of each cell by itself; else those of which a pattern hides nothing "
        "are run once, by full attention, and a question is read once for all of its answers",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="compute cells on a Ray cluster: HOST:PORT of its head, auto, or nothing for Ray on "
        "this machine alone",
    )
    parser.set_defaults(run=_sweep)


def add_report(parser: argparse.ArgumentParser) -> None:
    with_examples(parser, REPORT_EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a sweep")
    parser.add_argument(
        "--x",
        default="window",
        metavar="AXIS",
        help="horizontal axis: window, mean_keys, flops, visited or seconds (default: window)",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: the run folder)")
    parser.set_defaults(run=_report)


def add_recovery(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "How much of full attention's quality each pattern keeps at equal cost, over "
        "language modelling, retrieval and benchmarks, with paired bootstrap intervals."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a sweep, or of several"
    )
    parser.add_argument(
        "--budgets",
        default="0.0625,0.125,0.25",
        help="shares of full attention's cost that points belong to (default: %(default)s)",
    )
    parser.add_argument(
        "--by",
        choices=("flops", "visited"),
        default="flops",
        help="cost: attention FLOPs, or keys that a tile of queries reads (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: the first folder)")
    parser.set_defaults(run=_recovery)


def know_gated_models() -> None:
    """Have transformers load the models that sa_patch trains."""
    import sa_patch.training  # noqa: F401


def _sweep(options: argparse.Namespace) -> int:
    from sa_patch.sweep.config import load_config
    from sa_patch.sweep.plan import make_plan
    from sa_patch.sweep.run import describe_plan, run_sweep

    executor = None
    if options.ray is not None and not options.dry_run:
        from sa_patch.sweep.ray.executor import RayExecutor

        executor = RayExecutor(options.ray, modules=["sa_patch.training"])
    config = load_config(options.config).with_limit(options.limit)
    config = config.with_metadata(options.metadata)
    know_gated_models()
    out = options.out or Path("runs") / config.name
    run_code = options.confirm_run_unsafe_code
    plan = make_plan(config, benchmarks=options.benchmarks, run_code=run_code or options.dry_run)
    if options.dry_run:
        print("\n".join(describe_plan(plan, out)))
        return 0
    outcome = run_sweep(
        config,
        plan,
        out,
        command=options.command_line,
        run_code=run_code,
        executor=executor,
        reuse=not options.no_reuse,
    )
    done = outcome.found + outcome.ran
    print(f"{done} of {outcome.planned} cells done, {outcome.failed} failed, in {out}")
    if done:
        print(f"table and figures: sa-patch report {out}")
    return outcome.exit_status


def _report(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sa_patch.report.build import write_report

    written = write_report(options.runs, options.out, options.x, console=Console())
    for path in (written.page, written.markdown, written.csv, *written.figures[::-1]):
        print(path)
    damaged = [aside for aside in written.report.set_aside if aside.damaged]
    if damaged:
        raise UserError(
            f"the report leaves out {len(damaged)} cell file(s) that cannot be trusted, "
            f"{damaged[0].path} first ({damaged[0].reason}); run the same sweep again to redo them"
        )
    return 0


def _recovery(options: argparse.Namespace) -> int:
    from sa_patch.report.recovery import parse_budgets, recover
    from sa_patch.report.recovery_items import load
    from sa_patch.report.recovery_report import write_recovery

    budgets = parse_budgets(options.budgets)
    runs = load(options.runs)
    points = recover(runs, budgets, by=options.by)
    out = options.out or options.runs[0]
    files = write_recovery(points, runs, out, options.command_line, options.by)
    print(files.markdown.read_text(encoding="utf-8"))
    for path in (files.json, files.markdown, files.figure, files.ranking):
        print(path)
    return 0
