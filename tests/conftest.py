"""Settings that hold for the whole test suite: offline, and reproducible property tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for every core; threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Nor does torch's compiler need processes of its own beside them, each with torch in it.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Triton kernels run in its interpreter, on the CPU; it is asked for before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.stack_room import with_room

# What tests import stays until the end; looking for garbage in between is time lost.
gc.disable()

# No deadline: the first call of a shape pays for torch's warm-up.
_UNHURRIED = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# The default repeats the same examples on every machine: a red test is red for everybody.
settings.register_profile("repeatable", _UNHURRIED, max_examples=5, derandomize=True)
# HYPOTHESIS_PROFILE=thorough looks for new counterexamples, with fresh randomness each time.
settings.register_profile("thorough", _UNHURRIED, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# What `scripts/test --quick` leaves out: whatever trains, drives browsers, clusters or notebooks,
# runs Triton's interpreter or torch's compiler, or repeats a law over every pattern and backend.
SLOW = (
    *("laws/", "notebooks/", "scripts/", "training/", "report/browser/", "kernels/triton/"),
    *("kernels/flex/", "patching/", "benchmark/", "cli/", "evaluation/", "models/"),
    *("sweep/ray/", "sweep/test_sweep", "analysis/test_", "test_readme_pattern"),
)


# What waits longest comes first: at the end of a run workers share small tests.
FIRST = (
    *("sweep/ray/test_ray_sweep", "sweep/test_processes", "sweep/test_sweep_resume", "notebooks/"),
    *("training/test_several", "training/pretraining/test_resume", "test_readme_pattern"),
)


def pytest_collection(session: pytest.Session) -> None:
    # Here and not above: the process that only hands tests out to others needs neither torch nor
    # Triton.
    if not session.config.pluginmanager.hasplugin("dsession"):
        from tests.interpreter import prepare_once_per_launch

        prepare_once_per_launch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {item: item.path.relative_to(here).as_posix() for item in items}
    for item, place in places.items():
        if place.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not places[item].startswith(FIRST))


def pytest_collection_finish() -> None:
    # What was imported and collected stays: the garbage collector need not go through it each time.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    pyfuncitem.obj = with_room(pyfuncitem.obj)
    return (yield)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other in models this small, most of all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
