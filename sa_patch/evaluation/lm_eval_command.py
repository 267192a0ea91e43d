"""``sa-patch lm-eval``: lm-eval's own command, with our model, tasks and offline HumanEval."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sa_patch.evaluation.code_grading import offline_code_eval
from sa_patch.files.packaged import tasks_dir

TAKES_TASKS = ("run", "ls", "validate")


def with_our_tasks(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments with our folder of tasks added, unless the user names one."""
    full = list(arguments)
    if not full or any(word.split("=")[0] == "--include_path" for word in full):
        return full
    # Without a subcommand lm-eval means "run".
    runs = full[0].startswith("-") and not {"-h", "--help"} & set(full[:1])
    if full[0] in TAKES_TASKS[1:] or ((full[0] == "run" or runs) and len(full) > 1):
        full += ["--include_path", str(tasks_dir())]
    return full


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Hand `arguments` to lm-eval's command; it may end the process with its own status.

    ``--verbose`` is ours: which backends served, and how many tokens of prompts a second. lm-eval
    finds outside models only once they are imported, and reads ``sys.argv``.
    """
    from lm_eval.__main__ import cli_evaluate

    from sa_patch.evaluation.lm_eval_model import SAPatchLM

    before = sys.argv
    SAPatchLM.verbose = "--verbose" in arguments
    passed_on = [word for word in arguments if word != "--verbose"]
    sys.argv = ["sa-patch lm-eval", *with_our_tasks(passed_on)]
    try:
        with offline_code_eval():
            cli_evaluate()
    finally:
        sys.argv = before
        SAPatchLM.verbose = False
