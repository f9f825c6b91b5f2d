"""A real Ray cluster on this machine: a head and some nodes, each with a raylet and an address of its own.

Nodes lie on the loopback network or in network namespaces. What ended is started again after a while, as a supervisor
would: a node, and the head, whose control store keeps its tables on disk and is found by the nodes again.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.events import say
from tests.chaos.processes import ChaosError, below, end, started, title

RAY = Path(sys.executable).parent / "ray"
OBJECT_STORE_BYTES = 80 * 1024**2
FARMS = ("ray::Renderer", "ray::Dispatcher", "ray::IDLE", "radosgw")
START_S = 90.0
AGAIN_S = (2.0, 8.0)
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
"""A dead node is seen after some 3 s instead of 15."""


@dataclass(slots=True)
class Node:
    """One `ray start`. `prefix` makes a command run where the node lies."""

    name: str
    address: str
    prefix: tuple[str, ...] = ()
    head: bool = False
    start_at: float = 0.0
    starting: psutil.Popen | None = None


class Cluster:
    """The head has no CPU to give away: renderers live on the nodes, one each."""

    def __init__(self, nodes: list[Node], env: dict[str, str], folder: Path, *, pause: Callable[[], float]):
        self.nodes = nodes
        self._folder = folder
        self._pause = pause
        self._head = next(node for node in nodes if node.head)
        self._env = env | HEALTH | {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
        (folder / "gcs").mkdir()
        self._before = set(below())
        self._port = _free_port(self._head.address if not self._head.prefix else "127.0.0.1")

    @property
    def address(self) -> str:
        """What FARM_ADDRESS is to be."""
        return f"{self._head.address}:{self._port}"

    def start(self) -> None:
        """Start the head, then all nodes at once."""
        for some in ([self._head], self.workers):
            for node in some:
                self._start(node)
            for node in some:
                self._await(node)

    @property
    def workers(self) -> list[Node]:
        return [node for node in self.nodes if not node.head]

    def look(self) -> None:
        """Start again what has ended; called again and again."""
        for node in self.nodes:
            if node.starting is not None:
                if node.starting.poll() is None:
                    continue
                failed, node.starting = node.starting.returncode, None
                if failed:
                    say(f"{node.name} did not start (exit {failed}); once more")
                    node.start_at = time.monotonic() + AGAIN_S[0]
                    continue
                say(f"{node.name} is up")
            if self.alive(node):
                node.start_at = 0.0
            elif not node.start_at:
                node.start_at = time.monotonic() + self._pause()
            elif time.monotonic() >= node.start_at:
                self.end(node)
                self._start(node)

    def alive(self, node: Node) -> bool:
        """Whether its raylet runs, and its control store if it is the head."""
        return self.raylet(node) is not None and (not node.head or self.control_store() is not None)

    def raylet(self, node: Node) -> psutil.Process | None:
        return _having("raylet", f"--node_ip_address={node.address}")

    def control_store(self) -> psutil.Process | None:
        return _having("gcs_server", f"--node-ip-address={self._head.address}")

    def family(self, node: Node) -> list[psutil.Process]:
        """The node's raylet and all below it, and the control store on the head."""
        raylet = self.raylet(node)
        found = [raylet, *below(raylet)] if raylet else []
        store = self.control_store() if node.head else None
        return [*found, *([store] if store else [])]

    def end(self, node: Node) -> None:
        """SIGKILL to everything on a node: the machine is switched off."""
        for process in self.family(node):
            end(process.pid)

    def stop(self) -> None:
        """End Ray's own processes. The farm's, which have lost their raylet, are left to end by themselves."""
        for node in self.nodes:
            if node.starting is not None:
                node.starting.wait()
        for process in below():
            if process not in self._before and not title(process).startswith(FARMS):
                end(process.pid)

    def _start(self, node: Node) -> None:
        node.start_at = 0.0
        # The note would say that a cluster runs here already: the nodes that wait for its head are taken for it.
        (self._folder / node.name / "ray_current_cluster").unlink(missing_ok=True)
        ports = {
            name: _free_port("127.0.0.1")
            for name in (
                "node-manager-port",
                "object-manager-port",
                "dashboard-agent-listen-port",
                "dashboard-agent-grpc-port",
                "runtime-env-agent-port",
                "metrics-export-port",
            )
        }
        where = ["--head", f"--port={self._port}", "--include-dashboard=false"]
        arguments = [
            *node.prefix,
            str(RAY),
            "start",
            *(where if node.head else [f"--address={self.address}"]),
            f"--node-ip-address={node.address}",
            f"--temp-dir={self._folder / node.name}",
            f"--num-cpus={0 if node.head else 1}",
            "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--disable-usage-stats",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]
        with (self._folder / f"{node.name}.log").open("a") as log:
            node.starting = started(
                psutil.Popen(arguments, env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    def _await(self, node: Node) -> None:
        assert node.starting is not None
        if node.starting.wait(START_S):
            raise ChaosError(f"{node.name} did not start:\n{(self._folder / f'{node.name}.log').read_text()[-3000:]}")
        node.starting = None


def _having(name: str, word: str) -> psutil.Process | None:
    for process in below():
        if title(process) == name:
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if word in words and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def environment(folder: Path) -> dict[str, str]:
    """What every process of a round has: this tree's code, Ray's files in the round's folder, no usage statistics."""
    return dict(os.environ) | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(folder)}
