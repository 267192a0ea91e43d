"""Training text classifiers: trials, each of them one JSON file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole
from sa_patch.files.packed import stored_text
from sa_patch.files.provenance import describe_session, now
from sa_patch.training.classification.data import (
    Columns,
    LabelledTexts,
    Numbered,
    learn_words,
    load_texts,
)
from sa_patch.training.classification.model import TextClassifier
from sa_patch.training.classification.settings import Trial
from sa_patch.training.finite_json import from_json, to_json
from sa_patch.training.pretraining.evaluate import evaluating

WARMUP = 50
_WEIGHT_DECAY, _CLIP, _TEST_BATCH = 0.01, 1.0, 64

# Shares of a text's tokens that are taken away from a finished classifier.
ABLATED = (0.1, 0.3, 0.5, 0.7, 0.9)

Measure = Callable[[TextClassifier, Numbered, torch.device], dict[str, Any]]
"""What else is to be found out about a finished classifier; a function that processes can share."""


def run_trial(trial: Trial, data: LabelledTexts, measure: Measure | None = None) -> dict[str, Any]:
    """Train one classifier and measure it; leaves torch's global generator moved.

    Args:
        measure: what else to find out about a classifier that is done, from the test texts.

    Returns:
        "accuracy" on the test texts, "ablated", the accuracies without shares of their tokens (a
        token that is taken away is no key and no query, and the mean leaves it out), and what
        `measure` found or, where weights are no finite numbers, "diverged"; or, where a part is
        held out, "held_out_accuracy" after every epoch; "training_loss" of every epoch in nats,
        "parameters" and "seconds" (of training and accuracy).
    """
    accelerator = Accelerator()
    started = time.perf_counter()
    settings = trial.classifier
    train, measured = data.train, data.test
    if trial.held_out:
        train, measured = data.split(trial.held_out, trial.seed)
    # Words are those of the texts that are trained on: held-out ones must be as new as a test's.
    tokenizer = learn_words(train.texts, settings.vocabulary)
    numbered = Numbered(train, tokenizer, settings.max_length)
    others = Numbered(measured, tokenizer, settings.max_length)
    torch.manual_seed(trial.seed)
    model = TextClassifier(settings, tokenizer.get_vocab_size(), data.classes)
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=trial.learning_rate, weight_decay=_WEIGHT_DECAY, fused=True
    )
    scheduler = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARMUP))
    losses, accuracies = [], []
    for epoch in range(trial.epochs):
        total = 0.0
        model.train()
        order = numbered.epoch(settings.batch, trial.seed, epoch)
        for words, real, labels in numbered.batches(settings.batch, order):
            with accelerator.autocast():
                logits = model(words.to(accelerator.device), real.to(accelerator.device))
                loss = cross_entropy(logits, labels.to(accelerator.device))
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += float(loss.detach()) * len(labels)
        losses.append(total / len(numbered))
        if trial.held_out:
            accuracies.append(accuracy(model, others, accelerator.device))
    result: dict[str, Any] = {
        "training_loss": losses,
        "train_texts": len(numbered),
        "measured_texts": len(others),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if trial.held_out:
        spent = time.perf_counter() - started
        return result | {"held_out_accuracy": accuracies, "seconds": spent}
    result["accuracy"] = accuracy(model, others, accelerator.device)
    result["seconds"] = time.perf_counter() - started
    result["ablated"] = {
        f"{share:g}": accuracy(model, others, accelerator.device, share, trial.seed)
        for share in ABLATED
    }
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        result["diverged"] = True
    elif measure is not None:
        with evaluating(model):
            result["measured"] = measure(model, others, accelerator.device)
    return result


def accuracy(
    model: TextClassifier,
    texts: Numbered,
    device: torch.device,
    ablated: float = 0.0,
    seed: int = 0,
) -> float:
    """Share of texts whose label has the largest logit.

    Args:
        ablated: share of each text's tokens that are hidden, at random by `seed`; one always stays.
    """
    right = 0
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for words, real, labels in texts.batches(_TEST_BATCH, texts.by_length()):
            if ablated:
                real = thinned(real, ablated, generator)
            logits = model(words.to(device), real.to(device))
            right += int((logits.argmax(-1).cpu() == labels).sum())
    return right / len(texts)


def thinned(real: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """``real`` (bool ``[batch, n]``) without a random `share` of each row's True entries, rounded
    so that at least one is left."""
    order = torch.rand(real.shape, generator=generator).masked_fill(~real, 2).argsort(-1)
    counts = real.sum(-1, keepdim=True)
    kept = (counts - (share * counts).floor().long()).clamp(min=1)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(real.shape[1]).expand_as(order)
    )
    return real & (ranks < kept)


def ensure_trial(
    trial: Trial, folder: Path, columns: Columns, measure: Measure | None = None
) -> Path:
    """The file of a trial, which is trained if it is not there; `measure`: see `run_trial`.

    A file that is damaged or of other settings is reported and made again.
    """
    path = folder / trial.file_name
    if read_trial(trial, folder) is None:
        data = load_texts(trial.source, columns)
        if data.fingerprint != trial.fingerprint:
            raise UserError(f"the data set {trial.source!r} has changed; start the run again")
        record = {"identity": trial.identity(), "source": trial.source}
        record["result"] = run_trial(trial, data, measure)
        record["session"] = describe_session(sys.argv)
        record["finished"] = now()
        write_whole(path, (to_json(record, indent=1) + "\n").encode())
    return path


def read_trial(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """The result of a trial, None in it where a number was not finite, or None if it is still to be
    trained."""
    path = folder / trial.file_name
    try:
        record = from_json(stored_text(path))
        if record["identity"] == json.loads(json.dumps(trial.identity())):
            found: dict[str, Any] = record["result"]
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"{path} is damaged or foreign; it is done again", file=sys.stderr)
    return None
