"""``sa-patch lm-eval``: lm-eval's own command, with our model, tasks and offline HumanEval."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from sa_patch.errors import UserError, one_line
from sa_patch.evaluation.code_grading import offline_code_eval
from sa_patch.evaluation.tasks.catalogue import Catalogue
from sa_patch.evaluation.tasks.ruler import check_length
from sa_patch.files.packaged import tasks_dir
from sa_patch.files.settings import as_tuple
from sa_patch.models.embedded import DEFAULT_MODEL, resolve_model
from sa_patch.models.loading import load_tokenizer

# Folders of lm-eval's tasks whose functions ask for a tokenizer.
MADE_FOR_A_LENGTH = ("ruler", "babilong")
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

    ``--verbose`` is ours: which backends served, how many tokens of prompts a second, and where
    lm-eval failed if it does. lm-eval finds outside models only once they are imported, and reads
    ``sys.argv``.

    Raises:
        UserError: for whatever lm-eval raises, in one sentence.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from sa_patch.evaluation.lm_eval_model import SAPatchLM

    before = sys.argv
    verbose = SAPatchLM.verbose = "--verbose" in arguments
    passed_on = [word for word in arguments if word != "--verbose"]
    sys.argv = ["sa-patch lm-eval", *with_our_tasks(passed_on)]
    setup_logging()
    command = HarnessCLI()
    named: list[str] = []
    try:
        with offline_code_eval(), TemporaryDirectory(prefix="sa_patch_tokenizer_") as folder:
            options = command.parse_args()
            named = _task_names(options)
            _prepare_documents(options, named, folder)
            command.execute(options)
    except UserError:
        raise
    except Exception as error:
        if verbose:
            traceback.print_exc()
        raise UserError(_sentence(error, named)) from error
    finally:
        sys.argv = before
        SAPatchLM.verbose = False


def _task_names(options: argparse.Namespace) -> list[str]:
    tasks = getattr(options, "tasks", None) or []
    listed = [tasks] if isinstance(tasks, str) else tasks
    return [name for words in listed for name in str(words).split(",")]


def _prepare_documents(options: argparse.Namespace, tasks: Sequence[str], folder: str) -> None:
    """Check tasks that make their documents for a length, and give them the model's tokenizer.

    lm-eval takes a model's name for its tokenizer's, which a GGUF file does not have.

    Raises:
        UserError: if something is missing, before a model is loaded.
    """
    made = [name for name in _tasks_made_for_a_length() if any(fnmatch(name, t) for t in tasks)]
    if not made or getattr(options, "command", "") != "run":
        return
    catalogue = Catalogue(made)
    given = {**(getattr(options, "model_args", None) or {}), **(options.metadata or {})}
    for name in made:
        for length in as_tuple(given.get("max_seq_lengths")) if catalogue.is_ruler(name) else ():
            check_length(length)
        for member in catalogue.members(name):
            catalogue.check_inputs(catalogue.info(member), None)
    if getattr(options, "model", None) != "sa-patch" or "tokenizer" in given:
        return
    model = str(given.get("pretrained", DEFAULT_MODEL))
    source = resolve_model(model, given.get("gguf_file"), given.get("revision"))
    load_tokenizer(model, source).save_pretrained(folder)
    options.metadata = {**(options.metadata or {}), "tokenizer": folder}


def _tasks_made_for_a_length() -> list[str]:
    """Names of lm-eval's tasks and groups that ask for a tokenizer; read without its index."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    files = [file for room in MADE_FOR_A_LENGTH for file in sorted((root / room).glob("*.yaml"))]
    named = [re.search(r"^(?:task|group): *(\S+)", file.read_text("utf-8"), re.M) for file in files]
    return [found[1] for found in named if found]


def _sentence(error: Exception, tasks: Sequence[str]) -> str:
    text = str(error)
    if text.startswith("Tasks not found"):
        try:
            Catalogue([name for name in tasks if not set("*?[") & set(name)])
        except UserError as unknown:
            return str(unknown)
        return f"{text}; `sa-patch lm-eval ls tasks` lists all of them"
    reason = one_line(error)
    if isinstance(error, ImportError):
        return (
            f"a task needs a package that is not installed ({reason}); the extras of sa_patch are "
            "'sa_patch[ruler]' and 'sa_patch[longbench]'"
        )
    if isinstance(error, ConnectionError | TimeoutError) or "Hub" in text:
        return (
            f"a data set or model cannot be fetched ({reason}); without a network, sweeps read "
            "local copies (`sa-patch sweep --benchmarks DIR`), and models may be folders"
        )
    return f"lm-eval stopped: {reason}; --verbose shows where"
