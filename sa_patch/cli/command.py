"""The ``sa-patch`` command: parse, call, print.

Everything heavy is imported inside the functions that need it, so that ``--help`` is immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sa_patch.cli.analyze import add_analyze
from sa_patch.cli.help_texts import DESCRIPTION, EXAMPLES, with_examples
from sa_patch.cli.kernels import add_bench, add_methods
from sa_patch.cli.model import add_calibrate, add_generate, add_search
from sa_patch.cli.sweep import add_recovery, add_report, add_sweep, know_gated_models
from sa_patch.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for a request that cannot be served)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if os.environ.get("SA_PATCH_IMPLEMENTATIONS"):
            from sa_patch.patching import register_from_environment

            register_from_environment()
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
    add_generate(commands.add_parser("generate", help="continue a text with a patched model"))
    add_calibrate(commands.add_parser("calibrate", help="find the layers to leave full"))
    add_search(commands.add_parser("search", help="find the pattern that keeps most in a budget"))
    add_analyze(commands.add_parser("analyze", help="why a pattern behaves as it does"))
    add_methods(commands.add_parser("methods", help="list patterns and backends"))
    add_bench(commands.add_parser("bench", help="time every pattern and backend, and rivals"))
    return parser


def _lm_eval(arguments: Sequence[str]) -> int:
    from sa_patch.evaluation.lm_eval_command import run_lm_eval

    know_gated_models()
    run_lm_eval(arguments)
    return 0
