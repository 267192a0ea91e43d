"""A training run on disk: what it is, its checkpoints, its log and its result.

run.json          settings, method, seed and text, written first
checkpoints/      the last two, each a folder that appears whole or not at all
log.jsonl         one line per entry; what lies beyond the checkpoint is cut off on resuming
model/            the trained model and tokenizer, for ``from_pretrained``
loss.png, .svg    the loss curves
result.json       written last: a run that has it is complete
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole
from sa_patch.training.finite_json import from_json, to_json

KEPT_CHECKPOINTS = 2
_IDENTITY_KEYS = {"identity", "sessions"}
# What is read again, by `headline` and by comparisons.
_RESULT_KEYS = {
    *("settings", "method", "seed", "text_fingerprint", "parameters", "tokens", "log", "gates"),
    *("validation_loss", "validation_perplexity", "recall"),
}


def run_name(method: str, seed: int) -> str:
    """A folder's name for the run of a method, such as ``swa-window=32-seed0``."""
    return f"{method.replace(':', '-').replace(',', '-')}-seed{seed}"


class RunFolder:
    """Paths and files of one run; nothing is read or written before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, self._checkpoints = path / "model", path / "checkpoints"
        self._log, self._identity = path / "log.jsonl", path / "run.json"
        self._result = path / "result.json"

    def check(self, identity: dict[str, Any]) -> None:
        """Raise `UserError` if the folder holds another run, or something that is no run."""
        if self._identity.is_file():
            found = self._read(self._identity, _IDENTITY_KEYS)["identity"]
            for key, value in identity.items():
                if found.get(key) != value:
                    raise UserError(
                        f"{self.path} holds another run, which differs in {_where(found, identity)}"
                        "; give this one a folder of its own"
                    )
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give a folder for the run")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; give another folder")

    def begin(self, identity: dict[str, Any], session: dict[str, Any]) -> None:
        """Write `identity`, and add a session of work on the run.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = (
                self._read(self._identity, _IDENTITY_KEYS)["sessions"]
                if self._identity.is_file()
                else []
            )
            _write(self._identity, {"identity": identity, "sessions": [*before, session]})
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, newest first."""
        found = [path for path in self._checkpoints.glob("step-*") if path.is_dir()]
        return sorted(found, key=step_of, reverse=True)

    def save_checkpoint(self, step: int, save: Callable[[Path], None], main: bool) -> None:
        """Let `save` fill a folder, on every process of the run, and make it the newest checkpoint.

        `save` returns once all processes have written.
        """
        temporary = self._checkpoints / f".step-{step}.tmp"
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
        save(temporary)
        if main:
            publish(temporary, self._checkpoints / f"step-{step}")
            for old in self.checkpoints()[KEPT_CHECKPOINTS:]:
                shutil.rmtree(old)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one entry, which has its "step"."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """The log; a last line that was torn by a kill is left out."""
        if not self._log.is_file():
            return []
        found = []
        for line in self._log.read_text(encoding="utf-8").splitlines():
            try:
                found.append(from_json(line))
            except ValueError:
                break
        return found

    def cut_log(self, step: int) -> None:
        """Drop entries of later steps, which training will write again."""
        kept = [to_json(entry) + "\n" for entry in self.entries() if entry["step"] <= step]
        write_whole(self._log, "".join(kept).encode())

    @property
    def complete(self) -> bool:
        return self._result.is_file()

    def write_result(self, result: dict[str, Any]) -> None:
        _write(self._result, result)

    def result(self) -> dict[str, Any]:
        """What `write_result` wrote; None where a number was not finite.

        Raises:
            UserError: if the run is not complete, or the file is damaged.
        """
        if not self.complete:
            raise UserError(f"the run in {self.path} is not complete")
        return self._read(self._result, _RESULT_KEYS)

    def headline(self) -> str:
        """What a complete run has come to, in a line."""
        result = self.result()
        perplexity = result["validation_perplexity"]
        found = "without a finite value (diverged)" if perplexity is None else f"{perplexity:.2f}"
        line = f"{self.path}: validation perplexity {found}"
        recall = result["recall"]
        return f"{line}, recall {recall['accuracy']:.1%}" if recall else line

    def _read(self, path: Path, keys: set[str]) -> dict[str, Any]:
        """The mapping in a file, with these keys at least."""
        try:
            found: dict[str, Any] = from_json(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and keys <= found.keys():
                return found
        except (OSError, ValueError):
            pass
        raise UserError(f"{path} is damaged; delete the run's folder to redo it")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step-"))


def publish(temporary: Path, final: Path) -> None:
    """Move a folder to its place once its content is on the disk; what was there is replaced."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (to_json(content, indent=1) + "\n").encode())


def _where(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The first key by which two nested mappings differ, with both values."""
    for key, value in wanted.items():
        other = found.get(key)
        if other == value:
            continue
        if isinstance(other, dict) and isinstance(value, dict):
            return _where(other, value, f"{prefix}{key}.")
        return f"{prefix}{key} ({other!r}, not {value!r})"
    return "its settings"
