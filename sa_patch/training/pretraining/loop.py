"""The training loop, on accelerate: one process or several, on CPUs or GPUs, killed and resumed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sa_patch.errors import UserError
from sa_patch.files.artifacts import write_figure
from sa_patch.files.provenance import describe_session, now
from sa_patch.models.quiet_output import silenced
from sa_patch.patching import unpatch_model
from sa_patch.training.pretraining.batches import Batches
from sa_patch.training.pretraining.corpus import Corpus, prepare
from sa_patch.training.pretraining.evaluate import (
    gate_statistics,
    perplexity,
    recall_hits,
    recall_summary,
    validation_loss,
)
from sa_patch.training.pretraining.figures import draw_loss
from sa_patch.training.pretraining.methods import Method, build_model, set_attention
from sa_patch.training.pretraining.run_folder import RunFolder, publish, step_of
from sa_patch.training.pretraining.settings import PretrainingSettings

_PROGRESS_SECONDS = 30  # between two lines of progress


def pretrain(
    settings: PretrainingSettings,
    method: Method,
    seed: int,
    out: Path,
    corpus_folder: Path,
    command: Sequence[str],
) -> RunFolder:
    """Train a model from scratch into `out`, or resume the run there from its last checkpoint.

    A complete run is left as it is.

    Args:
        seed: of the weights, the order of the text, the recall documents and the permutations.
        corpus_folder: of the tokenized text, which is made if it is missing.
        command: the command line, for the record.

    Raises:
        UserError: for a folder that holds something else, or a text that cannot be read, before
            training starts.
    """
    run = RunFolder(out)
    identity = {"settings": settings.to_dict(), "method": str(method), "seed": seed}
    run.check(identity)
    if run.complete:
        return run
    accelerator = Accelerator(mixed_precision=settings.precision)
    if settings.batch % accelerator.num_processes:
        raise UserError(
            f"batch {settings.batch} must be a multiple of the number of processes, "
            f"{accelerator.num_processes}"
        )
    with accelerator.main_process_first():
        corpus = prepare(corpus_folder, settings.text)
    identity["text_fingerprint"] = corpus.fingerprint
    run.check(identity)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.begin(identity, describe_session(command))
    trainer = _Trainer(settings, method, seed, run, corpus, accelerator)
    trainer.resume()
    trainer.train()
    trainer.finish(identity)
    # The main process writes the result, which the others may be about to read.
    accelerator.wait_for_everyone()
    return run


@dataclass
class _Trainer:
    """What one process does in a run."""

    settings: PretrainingSettings
    method: Method
    seed: int
    run: RunFolder
    corpus: Corpus
    accelerator: Accelerator
    step: int = 0
    seconds: float = 0.0
    _last_progress: float = -math.inf

    def __post_init__(self) -> None:
        settings, seed = self.settings, self.seed
        self.batches = Batches(self.corpus, settings, seed)
        model = build_model(self.method, settings, len(self.corpus.tokenizer), seed)
        groups = parameter_groups(model, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
        # Patched before it is wrapped; later steps only change the patterns that its layers hold.
        set_attention(model, self.method, settings, seed, step=0)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _model_at(self, step: int | None) -> Any:
        """The model itself, with the attention of a step, or of evaluation for None."""
        model = self.accelerator.unwrap_model(self.model)
        set_attention(model, self.method, self.settings, self.seed, step)
        return model

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        found = self.run.checkpoints()
        if found:
            self.accelerator.load_state(str(found[0]))
            self.step = step_of(found[0])
        self.accelerator.wait_for_everyone()
        if self._is_main:
            self.run.cut_log(self.step)

    def train(self) -> None:
        """Do all remaining steps."""
        settings = self.settings
        self.model.train()
        started, first = time.perf_counter(), self.step
        while self.step < settings.steps:
            loss, norm = self._one_step(self.step)
            self.step += 1
            if self._due(settings.log_every):
                self._log({"loss": float(loss), "gradient_norm": float(norm)})
                spent = (time.perf_counter() - started) / (self.step - first)
                self._report_progress(float(loss), spent)
            if self._due(settings.validate_every):
                self._log({"validation_loss": self._validate()})
            if self._due(settings.checkpoint_every):
                self.run.save_checkpoint(self.step, self._save_state, self._is_main)
                self.accelerator.wait_for_everyone()
        if self.step > first:
            # Validation counts too: an upper bound of what training alone takes.
            self.seconds = (time.perf_counter() - started) / (self.step - first)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _save_state(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        # Its warning of tied weights does not apply: the model is built, and tied, before loading.
        with silenced():
            self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()

    def _one_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: its loss (weighted mean over tokens) and gradient norm."""
        accelerator, settings = self.accelerator, self.settings
        processes = accelerator.num_processes
        self._model_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        tokens, weights = (
            part.to(accelerator.device)
            for part in self.batches.step(step, accelerator.process_index, processes)
        )
        total_weight = accelerator.reduce(weights[:, 1:].sum(), "sum")
        size = settings.micro_batch
        parts = list(zip(tokens.split(size), weights.split(size), strict=True))
        total = torch.zeros((), device=accelerator.device)
        for index, (part, part_weights) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                logits = self.model(input_ids=part, use_cache=False).logits
                loss = weighted_loss(logits, part, part_weights) / total_weight
                # Gradients are averaged over processes, but `total_weight` is that of all of them.
                accelerator.backward(loss * processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return accelerator.reduce(total, "sum"), norm

    def _log(self, entry: dict[str, Any]) -> None:
        if self._is_main:
            tokens = self.step * self.settings.batch * self.settings.sequence
            self.run.log({"step": self.step, "tokens": tokens, **entry})

    def _report_progress(self, loss: float, seconds: float) -> None:
        """A line on standard error, every `_PROGRESS_SECONDS`; `seconds` are those of a step."""
        steps = self.settings.steps
        due = time.perf_counter() - self._last_progress >= _PROGRESS_SECONDS or self.step == steps
        if self._is_main and due:
            self._last_progress = time.perf_counter()
            left = (steps - self.step) * seconds / 60
            print(f"step {self.step:,} of {steps:,}: loss {loss:.3f}; {seconds:.2g} s a step, "
                  f"about {left:.0f} minutes left", file=sys.stderr, flush=True)  # fmt: skip

    def _own_share(self, rows: Tensor) -> Tensor:
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    def _sum(self, counts: Tensor) -> Tensor:
        # MPS and some backends of torch.distributed have no float64.
        whole: Tensor = self.accelerator.reduce(counts.float().to(self.accelerator.device), "sum")
        return whole.double().cpu()

    def _validate(self) -> float:
        """Held-out loss in nats per token."""
        rows = self._own_share(self.batches.validation())
        model = self._model_at(None)
        counts = validation_loss(model, rows, self.settings.micro_batch, self.accelerator.device)
        nats, tokens = self._sum(counts).tolist()
        return nats / tokens

    def finish(self, identity: dict[str, Any]) -> None:
        """Measure and save the trained model, and write the result."""
        settings, loss = self.settings, self._validate()
        model = self._model_at(None)
        recall = None
        if settings.recall.documents:
            tokens, distance = map(self._own_share, self.batches.recall())
            device = self.accelerator.device
            hits = recall_hits(
                model, tokens, distance, settings.window, settings.micro_batch, device
            )
            recall = recall_summary(self._sum(hits), settings.window)
        if not self._is_main:
            return
        gates = gate_statistics(
            model, self.batches.validation(), settings.micro_batch, self.accelerator.device
        )
        unpatch_model(model)
        temporary = self.run.path / ".model.tmp"
        with silenced():
            model.save_pretrained(temporary)
        self.corpus.tokenizer.save_pretrained(temporary)
        publish(temporary, self.run.model)
        figure = draw_loss(settings.name, str(self.method), self.seed, self.run.entries())
        write_figure(self.run.path / "loss", figure)
        per_step = settings.batch * settings.sequence
        self.run.write_result(
            {
                **identity,
                "finished": now(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": settings.steps * per_step,
                "tokens_per_second": per_step / self.seconds if self.seconds else None,
                "processes": self.accelerator.num_processes,
                "validation_loss": loss,
                "validation_perplexity": perplexity(loss),
                "recall": recall,
                "gates": gates,
                "log": self.run.entries(),
            }
        )


def learning_rate(settings: PretrainingSettings, step: int) -> float:
    """Of a step, counted from 0: a linear rise, then a cosine down to `final_share` of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    left = max(settings.steps - 1 - settings.warmup, 1)
    cosine = (1 + math.cos(math.pi * (step - settings.warmup) / left)) / 2
    share = settings.final_share + (1 - settings.final_share) * cosine
    return settings.learning_rate * share


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weighted negative log-likelihoods in nats; the first tokens are not scored.

    Args:
        logits: ``[batch, n, vocabulary]``; those at t predict token t + 1.
        tokens, weights: ``[batch, n]``.
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    losses = cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For the optimizer: matrices, which decay, and vectors (norms and biases), which do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
