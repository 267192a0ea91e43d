"""Runs the stages one after the other; one that fails is told, and the next goes on."""

from __future__ import annotations

import json
import os
import sys
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
from sa_patch.files.artifacts import check_folder

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


def run_stages(
    names: Sequence[str],
    out: Path,
    *,
    device: str | None = None,
    small: bool = False,
    command: Sequence[str] = (),
    began: float | None = None,
    say: Say = say_line,
) -> int:
    """Run these stages in order, and print a short table.

    Args:
        out: folder; what its files hold is not measured again. ``stages.json`` tells how each
            stage ended.
        began: of `time.monotonic`, if the first stage's time has begun already.

    Returns:
        1 where something was wrong or a stage failed, else 0.

    Raises:
        UserError: for a stage that is unknown, a device that is not there, a folder that cannot be
            written or that holds a run of another device or size.
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
        raise UserError(f"{out} holds a run with {state['setting']}; give another --out")
    check_folder(out)
    state = state or {"kind": KIND, "schema": 1, "setting": setting, "stages": {}}
    state["provenance"] = provenance(command)
    for name in dict.fromkeys(names):
        start, began = began or time.monotonic(), None
        if state["stages"].get(name, {}).get("status") == COMPLETE:
            say(f"{name}: complete from an earlier call")
            continue
        say(f"{name}: {SECONDS[name]:.0f} s")
        visit = Visit(out, device, small, start + SECONDS[name], say)
        state["stages"][name] = _run(_stage(name), visit) | {
            "seconds": round(time.monotonic() - start, 1)
        }
        write_results(out / "stages", state)
        rest = [other for other in names[names.index(name) + 1 :] if other != name]
        if rest and not device_lives(torch.device(device)):
            # A kernel that reads where it must not takes the whole process's device with it.
            say(f"{name} lost the device; going on in a new process")
            again = [sys.executable, *command, "--stages", ",".join(rest)]
            os.execv(sys.executable, again)
    _tell(state["stages"], names, say)
    ended = [state["stages"][name] for name in names]
    return int(any(one["status"] == FAILED or one["wrong"] for one in ended))


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


def _tell(stages: dict[str, Any], names: Sequence[str], say: Say) -> None:
    for name in dict.fromkeys(names):
        one = stages[name]
        say(f"{name}: {one['status']} in {one['seconds']} s {one['reason']}".rstrip())
        width = max((len(what) for what, _ in one["rows"]), default=0)
        for what, value in one["rows"]:
            say(f"  {what:{width}}  {value}")
        for line in one["wrong"]:
            say(f"  {line}")
