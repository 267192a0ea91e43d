"""Reach a Ray cluster, or start one on this machine; a wrong address is one sentence, and soon."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from sa_patch.errors import UserError, one_line
from sa_patch.sweep.worker_resources import WorkerResources

ADDRESS = re.compile(r"(ray://)?(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
# Only cells' results, some KB each, pass through the object store.
OBJECT_STORE_BYTES = 80 * 2**20
PROBE_SECONDS = 40
# Ray's own patience with an address where nothing answers is minutes, and ends the process.
PROBE = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
"""


def check_reachable(address: str) -> None:
    """Look whether `ray` is installed and something listens at `address`; imports nothing of Ray.

    Args:
        address: "HOST:PORT", "auto", or "" for what `resolve_address` makes of it.

    Raises:
        UserError: if not.
    """
    try:
        importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--ray needs the package ray, which is not installed; run "
            "`pip install 'sa_patch[ray]'` on every machine of the cluster"
        ) from None
    address = resolve_address(address)
    if address in ("auto", "local"):
        return
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise UserError(
            f"--ray takes HOST:PORT of a cluster's head, auto, or nothing at all, got {address!r}"
        )
    host, port = found["host"].strip("[]"), int(found["port"])
    try:
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, getattr(error, "strerror", None) or str(error)) from error


def resolve_address(address: str) -> str:
    """The address that Ray is given: "local" starts a cluster of this machine alone."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Any]:
    """The module `ray`, connected; a connection that was there already is used and left open.

    Raises:
        UserError: if there is no such cluster, or it does not take us.
    """
    # Read by Ray when it is imported, here and in the processes that it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = resolve_address(address)
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        _probe(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:
        raise _unreachable(address, one_line(error)) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Connect in a process that can be ended when it takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, address],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _unreachable(address, f"no answer in {PROBE_SECONDS} seconds") from None
    if done.returncode:
        said = " ".join(done.stdout.split()) or f"exit status {done.returncode}"
        raise _unreachable(address, said[:300])


def _unreachable(address: str, reason: str) -> UserError:
    where = "on this machine" if address in ("auto", "local") else f"at {address}"
    return UserError(
        f"no Ray cluster can be used {where} ({reason}); start one with `ray start --head`, or "
        "give --ray no address to use this machine alone"
    )


class ClusterResources:
    """The CPUs and GPUs of a cluster's living nodes."""

    def __init__(self, ray: Any) -> None:
        living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._nodes = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in living]
        self.cpus = sum(cpus for cpus, _ in self._nodes)
        self.gpus = sum(gpus for _, gpus in self._nodes)

    def gpus_per_worker(self, needs: WorkerResources) -> float:
        """The GPUs of one worker."""
        return float(self.gpus > 0) if needs.gpus is None else needs.gpus

    def max_workers(self, needs: WorkerResources) -> int:
        """How many workers fit, if nobody else used the cluster."""
        each = self.gpus_per_worker(needs)
        return sum(
            int(min(cpus // needs.cpus, gpus // each if each else cpus))
            for cpus, gpus in self._nodes
        )
