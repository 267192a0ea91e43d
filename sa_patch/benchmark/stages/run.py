"""Runs the stages one after the other; one that fails is told, and the next goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.clock import device_lives
from sa_patch.benchmark.options import choose_device
from sa_patch.benchmark.record import provenance, write_results
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.benchmark.tables import Say, say_line
from sa_patch.errors import UserError, choice, one_line
from sa_patch.files.archive import write_archive
from sa_patch.files.artifacts import check_folder
from sa_patch.files.atomic_write import write_whole

# Seconds of each, with all that it imports and compiles.
SECONDS = {
    "check": 60.0,
    "attention": 150.0,
    "model": 180.0,
    "tune": 150.0,
    "moe": 200.0,
    "flash": 120.0,
}
KIND = "sa_patch GPU stages"
COMPLETE, PARTLY, FAILED = "complete", "partly", "failed"
INTERRUPTED = "interrupted"
ARCHIVE = "stages.tar.gz"
# What a reader opens first, the card's table of launch parameters included: with the archive seven
# files, where no more than eight come back from a machine that is lent.
READ_FIRST = ("stages.json", "goals.md", "attention.md", "model.md", "moe.md", "*-*.*.json")
SEND_SECONDS = 15.0


class DeviceLost(Exception):
    """A stage took the process's device with it.

    Args:
        rest: the stages that a new process may still run.
    """

    def __init__(self, rest: Sequence[str]) -> None:
        super().__init__(f"the device was lost before {', '.join(rest)}")
        self.rest = list(rest)


def run_stages(
    names: Sequence[str],
    out: Path,
    *,
    device: str | None = None,
    small: bool = False,
    command: Sequence[str] = (),
    began: float | None = None,
    sent: Path | None = None,
    say: Say = say_line,
) -> int:
    """Run these stages in order, and print a short table of all that `out` holds.

    Args:
        out: folder; what its files hold is not measured again. ``stages.json`` tells how each
            stage ended.
        began: of `time.monotonic`, if the first stage's time has begun already.
        sent: folder in which `ARCHIVE`, of all files, and those of `READ_FIRST` are kept up to
            date.

    Returns:
        1 where something was wrong or a stage failed, now or in an earlier call, else 0.

    Raises:
        UserError: for a stage that is unknown, a device that is not there, a folder that cannot be
            written or that holds a run of another device or size.
        DeviceLost: where a stage lost the device and others are left.
    """
    if not names:
        raise UserError(f"name at least one stage of {', '.join(SECONDS)}")
    for name in names:
        choice(name, "stage", SECONDS)
    device = choose_device(device)
    if device == "cpu" and not small:
        raise UserError("on a CPU the stages are only rehearsed; give --small too")
    # A torn file is as none.
    state = _state(out / "stages.json")
    setting = {"device": device, "small": small}
    if state and state["setting"] != setting:
        raise UserError(f"an earlier call ran with {state['setting']}; give another --out")
    for folder in (out, sent):
        if folder is not None:
            check_folder(folder)
    # What was gone on from is kept, even where nothing is left to do.
    _send(out, sent)
    state = state or {"kind": KIND, "schema": 1, "setting": setting, "stages": {}}
    state["provenance"] = provenance(command)
    for name in dict.fromkeys(names):
        start, began = began or time.monotonic(), None
        if state["stages"].get(name, {}).get("status") == COMPLETE:
            say(f"{name}: complete from an earlier call")
            continue
        say(f"{name}: {SECONDS[name]:.0f} s")
        visit = Visit(out, device, small, start + SECONDS[name], _sending(say, out, sent))
        ended: dict[str, Any] = {"status": PARTLY, "reason": INTERRUPTED, "rows": [], "wrong": []}
        try:
            ended = _run(_stage(name), visit)
        finally:
            state["stages"][name] = ended | {"seconds": round(time.monotonic() - start, 1)}
            write_results(out / "stages", state)
            _send(out, sent)
        rest = [other for other in names[names.index(name) + 1 :] if other != name]
        if rest and not device_lives(torch.device(device)):
            # A kernel that reads where it must not takes the whole process's device with it.
            say(f"{name} lost the device")
            raise DeviceLost(rest)
    _tell(state["stages"], say)
    return int(any(one["status"] == FAILED or one["wrong"] for one in state["stages"].values()))


def _send(out: Path, sent: Path | None) -> None:
    if sent is None:
        return
    write_archive(sent / ARCHIVE, out, ARCHIVE.partition(".")[0])
    try:
        for pattern in READ_FIRST:
            for path in out.glob(pattern):
                write_whole(sent / path.name, path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot write into {sent} ({one_line(error)})") from error


def _sending(say: Say, out: Path, sent: Path | None) -> Say:
    """`say`, which now and then sends too, between measurements: a stage may be killed."""
    last = time.monotonic()

    def say_and_send(line: str) -> None:
        nonlocal last
        say(line)
        if time.monotonic() - last > SEND_SECONDS:
            _send(out, sent)
            last = time.monotonic()

    return say_and_send


def _run(stage: Callable[[Visit], Found], visit: Visit) -> dict[str, Any]:
    try:
        found = stage(visit)
    except Exception as error:
        return {"status": FAILED, "reason": one_line(error), "rows": [], "wrong": []}
    reason = f"{found.missing} measurements found no time" if found.missing else ""
    status = PARTLY if found.missing else COMPLETE
    return {
        "status": status,
        "reason": reason,
        "rows": list(found.rows),
        "wrong": list(found.wrong),
    }


def _stage(name: str) -> Callable[[Visit], Found]:
    """The stage's function; what it needs is imported within its time."""
    from sa_patch.benchmark.stages import check, flash, speed, tune

    found: dict[str, Callable[[Visit], Found]] = {
        "check": check.check_kernels,
        "attention": speed.time_attention,
        "model": speed.time_model,
        "tune": tune.tune_kernels,
        "moe": speed.time_moe,
        "flash": flash.time_flash,
    }
    return found[name]


def _state(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        usable = (content["kind"], content["schema"]) == (KIND, 1) and content["stages"] is not None
        return content if usable and "setting" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tell(stages: dict[str, Any], say: Say) -> None:
    for name, one in stages.items():
        say(f"{name}: {one['status']} in {one['seconds']} s {one['reason']}".rstrip())
        width = max((len(what) for what, _ in one["rows"]), default=0)
        for what, value in one["rows"]:
            say(f"  {what:{width}}  {value}")
        for line in one["wrong"]:
            say(f"  {line}")
