"""The sweep: every cell that has no result yet is computed, and is safe as soon as it is there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sa_patch.files.packed import packed_path, torn_lines
from sa_patch.sweep.config import SweepConfig
from sa_patch.sweep.executor import Event, Executor, Finished, LocalExecutor, Message, Starts
from sa_patch.sweep.plan import Plan, PlannedCell
from sa_patch.sweep.progress import SweepProgress, outcome_text
from sa_patch.sweep.run_folder import RunFolder


@dataclass
class Outcome:
    """What a call of `run_sweep` did: cells found finished, computed, failed."""

    planned: int
    found: int = 0
    ran: int = 0
    failed: int = 0
    interrupted: bool = False

    @property
    def exit_status(self) -> int:
        if self.interrupted:
            return 130
        return 1 if self.failed else 0


def run_sweep(
    config: SweepConfig,
    plan: Plan,
    out: Path | str,
    *,
    command: Sequence[str] = (),
    run_code: bool = False,
    executor: Executor | None = None,
    reuse: bool = True,
) -> Outcome:
    """Compute every cell of `plan` that `out` does not hold yet.

    With `reuse`, prompts of which a pattern hides nothing are answered by full attention once, for
    all cells (``out/answers``).

    A cell that fails is recorded with its reason and the rest goes on. Ctrl-C ends the run with
    what is finished; running it again does the rest.

    Raises:
        UserError: if `out` cannot be written or is being written by another sweep, or if the
            model cannot be loaded or patched as asked, or if the executor cannot be reached.
    """
    folder = RunFolder(out)
    with folder.locked():
        # The manifest comes first: cells without it would have no provenance.
        planned = [cell.id for cell in plan.cells]
        if reuse:
            folder.answers.mkdir(exist_ok=True)
            plan = replace(plan, answers=folder.answers)
        warning = folder.begin(config.name, config.to_dict(), planned, command)
        waiting, untrusted = unfinished(folder, plan)
        outcome = Outcome(len(plan.cells), found=len(plan.cells) - len(waiting))
        with SweepProgress([cell.task_at_length for cell in waiting]) as progress:
            for sentence in [*([warning] if warning else []), *untrusted]:
                progress.say(sentence, "yellow")
            if outcome.found:
                progress.say(f"{outcome.found} of {outcome.planned} cells are done already")
            place = executor or LocalExecutor()
            try:
                with contextlib.closing(place.run(config, plan, waiting, run_code)) as events:
                    for event in events:
                        _handle(event, folder, progress, outcome)
            except KeyboardInterrupt:
                outcome.interrupted = True
                progress.say("interrupted; the same command goes on where this stopped", "yellow")
            finally:
                folder.end(ran=outcome.ran, failed=outcome.failed, interrupted=outcome.interrupted)
    return outcome


def unfinished(folder: RunFolder, plan: Plan) -> tuple[list[PlannedCell], list[str]]:
    """The cells without a trusted result, and a sentence for each file or line not trusted."""
    waiting, sentences = [], []
    for cell in plan.cells:
        found = folder.find(cell.id, cell.cell)
        if found.data is None:
            waiting.append(cell)
        if found.reason:
            sentences.append(f"cells/{cell.id}.json {found.reason}; the cell is done again")
    if waiting:
        # Else what torn lines held has been done again.
        sentences += [
            f"line {number} of {packed_path(folder.cells).name} is torn: not a complete JSON "
            "object; the cell that it held is done again, unless it has a file of its own"
            for number in torn_lines(folder.cells)
        ]
    return waiting, sentences


def _handle(event: Event, folder: RunFolder, progress: SweepProgress, outcome: Outcome) -> None:
    """Show what an executor tells, and keep the results it brings."""
    match event:
        case Starts(label, at_once):
            progress.starts(label, at_once)
        case Message(sentence):
            progress.say(sentence, "yellow")
        case Finished(cell, computed):
            content = computed.content
            folder.save(cell.id, content)
            if content["status"] == "done":
                outcome.ran += 1
                text, style = outcome_text(content["primary"]), ""
            else:
                outcome.failed += 1
                log = folder.save_log(cell.id, computed.log)
                text, style = f"FAILED: {content['error']} (more in {log})", "red"
            progress.finished(cell.task_at_length, cell.label, text, content["seconds"], style)


def describe_plan(plan: Plan, out: Path | str) -> list[str]:
    """The lines of ``--dry-run``: every cell and whether it is done."""
    folder = RunFolder(out)
    waiting, untrusted = unfinished(folder, plan)
    left = {cell.id for cell in waiting}
    lines = [
        f"{'to do' if cell.id in left else 'done '}  {cell.id}  {cell.cell['model_name']}  "
        f"{cell.label}" + (f"  limit={cell.task.limit}" if cell.task.limit else "")
        for cell in plan.cells
    ]
    done = len(plan.cells) - len(waiting)
    return [*lines, *untrusted, f"{len(plan.cells)} cells, {done} done, in {folder.path}"]
