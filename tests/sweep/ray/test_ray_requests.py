"""What ``--ray`` asks of a cluster before there is one: address, resources, the package."""

from __future__ import annotations

import importlib.metadata
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.sweep.ray import executor as ray_executor
from sa_patch.sweep.ray.cluster import ClusterResources, check_reachable, cluster
from sa_patch.sweep.ray.executor import RayExecutor
from sa_patch.sweep.worker_resources import WorkerResources


class Nodes:
    """What `ClusterResources` asks of Ray."""

    def __init__(self, *resources: dict[str, float], dead: int = 0) -> None:
        self._resources, self._dead = resources, dead

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": index >= self._dead, "Resources": each}
            for index, each in enumerate(self._resources)
        ]


@pytest.mark.parametrize(
    ("needs", "workers"),
    [
        (WorkerResources(), 5),
        (WorkerResources(cpus=8), 3),
        (WorkerResources(gpus=0), 24),
        (WorkerResources(gpus=4), 1),
        (WorkerResources(gpus=0.5), 10),
        (WorkerResources(cpus=32), 0),
    ],
)
def test_workers_fit_into_single_machines(needs: WorkerResources, workers: int) -> None:
    nodes = Nodes({"CPU": 64, "GPU": 8}, {"CPU": 16, "GPU": 4}, {"CPU": 8, "GPU": 1}, dead=1)
    assert ClusterResources(nodes).max_workers(needs) == workers


def test_without_gpus_a_worker_is_given_none() -> None:
    assert ClusterResources(Nodes({"CPU": 3})).max_workers(WorkerResources()) == 3


@pytest.mark.parametrize("address", ["demo", "ray://", "10.0.0.1", "host:port", "a b:1"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(UserError, match="--ray takes HOST:PORT of a cluster's head"):
        check_reachable(address)


def test_an_address_where_nothing_listens_is_one_sentence_and_soon(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    out = ["--out", str(tmp_path / "run")]
    assert main(["sweep", "demo", *out, "--ray", "127.0.0.1:1"]) == 2
    assert time.monotonic() - start < 10
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert "no Ray cluster can be used at 127.0.0.1:1 (Connection refused)" in said
    assert not (tmp_path / "run").exists()


def test_what_listens_but_is_no_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("sa_patch.sweep.ray.cluster.PROBE_SECONDS", 4)
    # A process that has a connection already would use that.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_reachable(address)
        with pytest.raises(UserError, match="no answer in 4 seconds"), cluster(address):
            pass


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(UserError, match=r"pip install 'sa_patch\[ray\]'"):
        RayExecutor()


def test_the_number_of_tries_is_what_the_tests_count_on() -> None:
    assert ray_executor.RETRIES == 2
