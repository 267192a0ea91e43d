"""The sweep: one model load for all its cells, each cell's result safe as soon as it is there."""

from __future__ import annotations

import gc
import itertools
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.harness.cells import SCHEMA
from sa_patch.harness.config import ModelSpec, SweepConfig
from sa_patch.harness.embedded import resolve_model
from sa_patch.harness.layer_check import check_layers
from sa_patch.harness.plan import Plan, PlannedCell
from sa_patch.harness.progress import SweepProgress, outcome_text
from sa_patch.harness.provenance import now
from sa_patch.harness.quiet import Noise, silenced
from sa_patch.harness.reason import one_line
from sa_patch.harness.runfolder import RunFolder


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
) -> Outcome:
    """Compute every cell of `plan` that `out` does not hold yet.

    A cell that fails is recorded with its reason and the rest goes on. Ctrl-C ends the run with
    what is finished; running it again does the rest.

    Raises:
        UserError: if `out` cannot be written or is being written by another sweep, or if the
            model cannot be loaded or patched as asked.
    """
    folder = RunFolder(out)
    with folder.locked():
        # The manifest comes first: cells without it would have no provenance.
        planned = [cell.id for cell in plan.cells]
        warning = folder.begin(config.name, config.to_dict(), planned, command)
        waiting, untrusted = unfinished(folder, plan)
        outcome = Outcome(len(plan.cells), found=len(plan.cells) - len(waiting))
        with SweepProgress([cell.info.name for cell in waiting]) as progress:
            for sentence in [*([warning] if warning else []), *untrusted]:
                progress.say(sentence, "yellow")
            if outcome.found:
                progress.say(f"{outcome.found} of {outcome.planned} cells are done already")
            try:
                for model, cells in itertools.groupby(waiting, key=lambda cell: cell.model):
                    engine = _Engine(config, plan, folder, progress, outcome, run_code)
                    engine.run(model, list(cells))
            except KeyboardInterrupt:
                outcome.interrupted = True
                progress.say("interrupted; the same command goes on where this stopped", "yellow")
            finally:
                folder.end(ran=outcome.ran, failed=outcome.failed, interrupted=outcome.interrupted)
    return outcome


def unfinished(folder: RunFolder, plan: Plan) -> tuple[list[PlannedCell], list[str]]:
    """The cells without a trusted result, and a sentence for each file that is not trusted."""
    waiting, sentences = [], []
    for cell in plan.cells:
        found = folder.find(cell.id, cell.cell)
        if found.data is None:
            waiting.append(cell)
        if found.reason:
            sentences.append(f"cells/{cell.id}.json {found.reason}; the cell is done again")
    return waiting, sentences


class _Engine:
    """Runs cells of one model."""

    def __init__(
        self,
        config: SweepConfig,
        plan: Plan,
        folder: RunFolder,
        progress: SweepProgress,
        outcome: Outcome,
        run_code: bool,
    ) -> None:
        self.config, self.plan, self.folder = config, plan, folder
        self.progress, self.outcome, self.run_code = progress, outcome, run_code

    def run(self, model: ModelSpec, cells: list[PlannedCell]) -> None:
        source = resolve_model(model.pretrained, model.gguf_file, model.revision)
        for layers in {cell.layers: None for cell in cells}:
            check_layers(source, layers.named)
        self.progress.starts(f"loading {model.pretrained}")
        lm = load_model(model, self.config.batch_size)
        # What the model cannot take at all (layers, backend) is the user's to mend: no cell runs.
        for cell in {(cell.pattern, cell.layers): cell for cell in cells}.values():
            self._use(lm, cell)
        for _, same_task in itertools.groupby(cells, key=lambda cell: (cell.task, cell.info.name)):
            loaded: Mapping[str, Any] | None = None
            for cell in same_task:
                self.progress.starts(cell.label)
                with silenced() as noise:
                    result, loaded = self._attempt(lm, cell, loaded, noise)
                self._record(cell, result, noise)

    def _use(self, lm: Any, cell: PlannedCell) -> None:
        lm.use_pattern(
            cell.pattern,
            layers=cell.layers,
            decode=self.config.decode,
            backend=self.config.backend,
        )

    def _attempt(
        self, lm: Any, cell: PlannedCell, loaded: Mapping[str, Any] | None, noise: Noise
    ) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
        """A cell's file content, done or failed, and its task's data for the next cell."""
        from sa_patch.harness import scoring

        content: dict[str, Any] = {
            "schema": SCHEMA,
            "id": cell.id,
            "cell": dict(cell.cell),
            "status": "failed",
            "error": None,
            "scores": None,
            "primary": None,
            "samples": None,
            "items": None,
            "measured": None,
            "started": now(),
        }
        start = time.perf_counter()
        try:
            if loaded is None:
                fresh = self.plan.catalogue.load(cell.info.name, self.plan.benchmarks)
                scoring.prepare(fresh, cell.task.num_fewshot, cell.task.gen_kwargs)
                loaded = fresh
            self._use(lm, cell)
            lm.meter.reset()
            results = scoring.score(lm, loaded, cell.task.limit, self.run_code)
            scores = scoring.plain_scores(results, cell.info.name)
            content["primary"] = scoring.primary_score(results, cell.info, scores)
            content["scores"] = scores
            content["samples"] = scoring.sample_count(results, cell.info.name)
            content["items"] = scoring.item_scores(results, content["primary"]["metric"])
            content["measured"] = lm.meter.summary()
            content["status"] = "done"
        except Exception as error:
            content.update(scores=None, primary=None, samples=None, items=None, measured=None)
            content["error"] = one_line(error)
            noise.write(f"\n{traceback.format_exc()}")
        content["seconds"] = round(time.perf_counter() - start, 3)
        return content, loaded

    def _record(self, cell: PlannedCell, content: dict[str, Any], noise: Noise) -> None:
        self.folder.save(cell.id, content)
        if content["status"] == "done":
            self.outcome.ran += 1
            text, style = outcome_text(content["primary"]), ""
        else:
            self.outcome.failed += 1
            log = self.folder.save_log(cell.id, noise.text())
            text, style = f"FAILED: {content['error']} (more in {log})", "red"
            _free_memory()
        self.progress.finished(cell.info.name, cell.label, text, content["seconds"], style)


def load_model(spec: ModelSpec, batch_size: int) -> Any:
    """Load a model once, as an `SAPatchLM` that attends in full until told otherwise.

    Raises:
        UserError: if it cannot be loaded, with the loader's own reason.
    """
    from sa_patch.harness.lm_eval_model import SAPatchLM

    options: dict[str, Any] = {
        "gguf_file": spec.gguf_file,
        "revision": spec.revision,
        "device_map": spec.device_map,
    }
    with silenced() as noise:
        try:
            return SAPatchLM(
                pretrained=spec.pretrained,
                method="full",
                dtype=spec.dtype,
                batch_size=batch_size,
                # lm-eval's own default is "cuda", None takes what there is.
                device=spec.device,
                **{key: value for key, value in options.items() if value is not None},
            )
        except UserError:
            raise
        except Exception as error:
            noise.write(f"\n{traceback.format_exc()}")
            raise UserError(
                f"the model {spec.pretrained!r} could not be loaded: {one_line(error)}"
            ) from error


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
