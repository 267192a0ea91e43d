"""All losses that a calibration has measured, in a JSON file that it can go on from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.files.atomic_write import write_json

SCHEMA = 1


class LossStore:
    """Losses by schedule and document, in a JSON file that is whole at any time.

    A run that was interrupted, or is asked for another budget, finds what it knows already.

    Args:
        path: the file; one that exists must have been written for the same settings.
        settings: what a loss depends on beside schedule and document.

    Raises:
        UserError: if the file cannot be written, or is another's.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._content: dict[str, Any] = {"schema": SCHEMA, "settings": dict(settings), "nll": {}}
        if path.exists():
            self._read_known(settings)
        self.save()

    def __len__(self) -> int:
        """How many losses are known."""
        return sum(map(len, self._content["nll"].values()))

    def _read_known(self, settings: Mapping[str, Any]) -> None:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if not _is_store(known):
            raise UserError(
                f"{self.path} is torn, or no file of sa-patch calibrate; give another --out, or "
                "remove it"
            )
        for name, value in settings.items():
            if known["settings"].get(name) != value:
                raise UserError(
                    f"{self.path} was measured with another {name}; give another --out, or "
                    "remove it"
                )
        self._content["nll"] = known["nll"]

    def get(self, schedule: str, document: Document) -> float | None:
        """A loss that is known."""
        value = self._content["nll"].get(schedule, {}).get(digest(document))
        return None if value is None else float(value)

    def put(self, schedule: str, document: Document, nll: float) -> None:
        """Keep a loss, on disk too."""
        self._content["nll"].setdefault(schedule, {})[digest(document)] = nll
        self.save()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Add what follows from the losses."""
        self._content["result"] = dict(result)
        self.save()

    def save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._content)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); give another --out"
            ) from error


def _is_store(known: Any) -> bool:
    """Whether the content of a file has the form of a store, and only losses in it."""
    if not isinstance(known, dict) or known.get("schema") != SCHEMA:
        return False
    losses = known.get("nll")
    if not isinstance(known.get("settings"), dict) or not isinstance(losses, dict):
        return False
    return all(
        isinstance(of_schedule, dict)
        and all(isinstance(nll, float) and math.isfinite(nll) for nll in of_schedule.values())
        for of_schedule in losses.values()
    )


def digest(document: Document) -> str:
    """Sixteen hex digits that stand for a document's tokens and what counts of them."""
    content = json.dumps([document.tokens, document.counted])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
