"""One loaded model that computes its cells, in whichever process that is."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sa_patch.errors import UserError, one_line
from sa_patch.evaluation.full_answers import FullAnswers
from sa_patch.evaluation.tasks.catalogue import Catalogue
from sa_patch.files.provenance import hardware, now, versions
from sa_patch.models.embedded import resolve_model
from sa_patch.models.free_memory import free_memory
from sa_patch.models.layer_check import check_layers
from sa_patch.models.quiet_output import CapturedOutput, silenced
from sa_patch.sweep.cells import SCHEMA
from sa_patch.sweep.config import ModelSpec, SweepConfig
from sa_patch.sweep.plan import PlannedCell

# Tasks whose data are kept for further cells.
TASKS_HELD = 8


@dataclass(frozen=True)
class Computed:
    """A cell's file content, done or failed, and what was printed and logged meanwhile."""

    content: dict[str, Any]
    log: str


class CellRunner:
    """Loads a model once and computes cells of it; shows nothing.

    Args:
        benchmarks: folder of local data sets, or None for the hub's.
        answers: folder in which cells leave what full attention answered for others to reuse (in
            memory alone where it does not exist); None to compute everything.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(
        self,
        config: SweepConfig,
        model: ModelSpec,
        catalogue: Catalogue,
        benchmarks: Path | None,
        run_code: bool,
        answers: Path | None = None,
    ) -> None:
        self._config, self._run_code = config, run_code
        self._catalogue, self._benchmarks = catalogue, benchmarks
        self._lm = load_model(model, config.batch_size, config.batch_tokens)
        self._hardware = hardware()
        self._lm.share_contexts = answers is not None
        if answers is not None:
            self._lm.full_answers = FullAnswers(self._identity(model), answers)
        self._loaded: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._tokenizer: TemporaryDirectory[str] | None = None

    def _identity(self, model: ModelSpec) -> dict[str, Any]:
        """What determines full attention's answers beside the tokens."""
        source = resolve_model(model.pretrained, model.gguf_file, model.revision)
        return {
            "model": source.identity,
            "dtype": str(self._lm.model.dtype),
            "max_length": self._lm.max_length,
            "backend": self._config.backend,
            "hardware": [self._lm.device.type, *self._hardware["gpus"]],
            "versions": {
                name: versions().get(name) for name in ("sa_patch", "torch", "transformers")
            },
        }

    def try_patterns(self, cells: Iterable[PlannedCell]) -> None:
        """Patch the model as each of the cells asks, computing nothing.

        Raises:
            UserError: for what the model cannot take at all (layers, a backend).
        """
        for cell in one_of_each_pattern(cells):
            self._use(cell)

    def compute(self, cell: PlannedCell) -> Computed:
        """Evaluate a cell; an exception makes it a failed one, with its reason."""
        with silenced() as output:
            content = self._attempt(cell, output)
        if content["status"] == "failed":
            free_memory()
        return Computed(content, output.text())

    def _attempt(self, cell: PlannedCell, output: CapturedOutput) -> dict[str, Any]:
        from sa_patch.evaluation import scoring
        from sa_patch.kernels.counting import counting_backends
        from sa_patch.kernels.self_check import failures

        content = failed_content(cell, None) | {"hardware": self._hardware}
        start = time.perf_counter()
        try:
            loaded = self._data(cell)
            self._use(cell)
            self._lm.cut_prompts(cell.task.truncation, cell.task.max_prompt_tokens)
            self._lm.meter.reset()
            if self._lm.full_answers is not None:
                self._lm.full_answers.refresh()
            with counting_backends() as calls:
                results = scoring.score(
                    self._lm,
                    loaded,
                    cell.task.limit,
                    self._run_code,
                    apply_chat_template=cell.task.apply_chat_template,
                    system_instruction=cell.task.system_instruction,
                    fewshot_as_multiturn=cell.task.fewshot_as_multiturn,
                )
            scores = scoring.plain_scores(results, cell.info.name)
            content["primary"] = scoring.primary_score(results, cell.info, scores)
            content["scores"] = scores
            content["samples"] = scoring.sample_count(results, cell.info.name)
            content["items"] = scoring.item_scores(results, content["primary"]["metric"])
            content["measured"] = self._lm.meter.summary() | {
                "backends": dict(sorted(calls.items()))
            }
            if left_out := failures():
                content["measured"]["left_out"] = left_out
            if self._lm.full_answers is not None:
                self._lm.full_answers.save(cell.id)
            content["status"] = "done"
        except Exception as error:
            content.update(scores=None, primary=None, samples=None, items=None, measured=None)
            content["error"] = one_line(error)
            output.write(f"\n{traceback.format_exc()}")
        content["seconds"] = round(time.perf_counter() - start, 3)
        return content

    def _data(self, cell: PlannedCell) -> Mapping[str, Any]:
        from sa_patch.evaluation import scoring

        wanted = (repr(cell.task), cell.info.name)
        found = self._loaded.pop(wanted, None)
        if found is None:
            metadata = dict(cell.task.metadata)
            if cell.info.needs_tokenizer:
                metadata = {"tokenizer": self._tokenizer_folder(), **metadata}
            found = self._catalogue.load(cell.info, self._benchmarks, metadata)
            scoring.prepare(found, cell.task.num_fewshot, cell.task.gen_kwargs)
        # The last used comes last.
        self._loaded[wanted] = found
        if len(self._loaded) > TASKS_HELD:
            del self._loaded[next(iter(self._loaded))]
        return found

    def _tokenizer_folder(self) -> str:
        """The model's own tokenizer as a folder, which is all that tasks can be told of it."""
        if self._tokenizer is None:
            self._tokenizer = TemporaryDirectory(prefix="sa_patch_tokenizer_")
            self._lm.tokenizer.save_pretrained(self._tokenizer.name)
        return self._tokenizer.name

    def _use(self, cell: PlannedCell) -> None:
        self._lm.use_pattern(
            cell.pattern,
            layers=cell.layers,
            decode=self._config.decode,
            backend=self._config.backend,
        )


def failed_content(cell: PlannedCell, error: str | None) -> dict[str, Any]:
    """The file content of a cell that has no result (yet)."""
    return {
        "schema": SCHEMA,
        "id": cell.id,
        "cell": dict(cell.cell),
        "status": "failed",
        "error": error,
        "scores": None,
        "primary": None,
        "samples": None,
        "items": None,
        "measured": None,
        "hardware": None,
        "started": now(),
        "seconds": 0.0,
    }


def one_of_each_pattern(cells: Iterable[PlannedCell]) -> list[PlannedCell]:
    """A cell for every pattern and choice of layers among `cells`."""
    return list({(cell.pattern, cell.layers): cell for cell in cells}.values())


def check_model(model: ModelSpec, cells: Iterable[PlannedCell]) -> None:
    """Find a model's files and whether it has the layers that its cells name; loads nothing.

    Raises:
        UserError: if not.
    """
    source = resolve_model(model.pretrained, model.gguf_file, model.revision)
    for layers in {cell.layers: None for cell in cells}:
        check_layers(source, layers.named)


def load_model(spec: ModelSpec, batch_size: int, batch_tokens: int | None = None) -> Any:
    """Load a model once, as an `SAPatchLM` that attends in full until told otherwise.

    Raises:
        UserError: if it cannot be loaded, with the loader's own reason.
    """
    from sa_patch.evaluation.lm_eval_model import SAPatchLM

    options: dict[str, Any] = {
        "gguf_file": spec.gguf_file,
        "revision": spec.revision,
        "device_map": spec.device_map,
    }
    with silenced() as output:
        try:
            return SAPatchLM(
                pretrained=spec.pretrained,
                method="full",
                dtype=spec.dtype,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                # lm-eval's own default is "cuda", None takes what there is.
                device=spec.device,
                **{key: value for key, value in options.items() if value is not None},
            )
        except UserError:
            raise
        except Exception as error:
            output.write(f"\n{traceback.format_exc()}")
            raise UserError(
                f"the model {spec.pretrained!r} could not be loaded: {one_line(error)}"
            ) from error
