"""Numbers with their provenance and a figure, as files of one name: JSON, PNG and SVG."""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_patch.errors import UserError, one_line
from sa_patch.files.atomic_write import write_whole
from sa_patch.files.png import png
from sa_patch.files.provenance import describe_session, now

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What analyses depend on beside what every result does.
PACKAGES = ("scipy", "matplotlib")


def check_folder(folder: Path) -> None:
    """Make a folder and see that it can be written, before anything slow.

    Raises:
        UserError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", b"")
        # Another process may ask the same at the same moment.
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be written ({one_line(error)}); give another one by --out"
        ) from error


def start_provenance(command: Sequence[str]) -> dict[str, Any]:
    """Versions, commit, machine, command and time, at the start of an analysis."""
    provenance = describe_session(command)
    for name in PACKAGES:
        provenance["versions"][name] = importlib.metadata.version(name)
    return provenance


def write_artifacts(
    folder: Path,
    name: str,
    content: Mapping[str, Any],
    figure: Figure,
    provenance: Mapping[str, Any],
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.png`` and ``NAME.svg``.

    Args:
        content: what was asked and what was measured; numbers of JSON, without NaN.
        provenance: of `start_provenance`; the time it ended is added.

    Returns:
        The three files.
    """
    record = {**content, "provenance": {**provenance, "ended": now()}}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / f"{name}.json"
    write_whole(path, text.encode())
    return [path, *write_figure(folder / name, figure)]


def write_figure(stem: Path, figure: Figure) -> list[Path]:
    """Write ``STEM.png`` and ``STEM.svg``, the same bytes for the same figure."""
    import matplotlib

    svg = io.BytesIO()
    # A fixed salt makes the SVG's ids, and so the file, a function of its content alone.
    with matplotlib.rc_context({"svg.hashsalt": "sa_patch"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    paths = []
    for kind, content in (("png", png(figure, dpi=150)), ("svg", svg.getvalue())):
        path = stem.with_name(f"{stem.name}.{kind}")
        write_whole(path, content)
        paths.append(path)
    return paths
