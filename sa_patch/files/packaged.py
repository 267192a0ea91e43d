"""Where the sweep configurations and the lm-eval task files are, in a clone and in a wheel."""

from pathlib import Path

from sa_patch.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def _find(in_wheel: str, in_clone: str) -> Path:
    packaged = _PACKAGE / "_data" / in_wheel
    if packaged.is_dir():
        return packaged
    clone = _PACKAGE.parent
    # Without this file the parent is some site-packages, where a folder of that name is not ours.
    if (clone / "pyproject.toml").is_file() and (clone / in_clone).is_dir():
        return clone / in_clone
    raise UserError(
        f"this installation of sa_patch lacks its data folder {in_clone!r} (looked for {packaged} "
        f"and {clone / in_clone}); reinstall it from a wheel or a complete clone"
    )


def configs_dir() -> Path:
    """The folder of sweep configurations (``demo.yaml`` and its like).

    Raises ``UserError`` if the installation holds none.
    """
    return _find("configs", "configs")


def tasks_dir() -> Path:
    """The folder of our own lm-eval tasks, to be handed to lm-eval as an include path.

    Raises ``UserError`` if the installation holds none.
    """
    return _find("tasks", "eval/tasks")
