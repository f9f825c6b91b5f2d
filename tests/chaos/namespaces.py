"""Machines that are network namespaces: each with a cable to the farm's switch and one to the storage's.

Needs root. The host has an address at both switches. A pulled cable looks to a machine as it does in a rack: its link is
down, its address stays, connections break only when somebody gives up.
"""

import os
import random
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from typing import Literal

import psutil

Cable = Literal["farm", "storage"]

CABLES: tuple[Cable, ...] = ("farm", "storage")
NETWORKS = {"farm": "198.18", "storage": "198.19"}
"""The range for benchmarks of RFC 2544, routed nowhere."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace. `name` is short; `address` is the farm's, `storage_address` what the S3 server sees."""

    name: str
    namespace: str
    address: str
    storage_address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("nsenter", f"--net=/run/netns/{self.namespace}")


def unavailable() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter") if not shutil.which(name)]
    if missing:
        return f"{' and '.join(missing)} not installed (iproute2, util-linux)"
    name = f"chaos-{uuid.uuid4().hex[:6]}"
    tried = [("link", "add", name[:15], "type", "bridge"), ("netns", "add", name)]
    try:
        for arguments in tried:
            done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                return f"ip {' '.join(arguments)}: {done.stderr.strip()}"
        return None
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", name[:15]], capture_output=True, check=False)


def own_processes() -> tuple[str, ...]:
    """What to put before a command so that its processes see only each other, as on a machine of its own, and end with it.

    Nothing where that is not to be had.
    """
    prefix = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if not shutil.which(prefix[0]) or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        return ()
    return prefix


class Network:
    """Two switches and the machines at them, gone when closed."""

    def __init__(self) -> None:
        taken = {str(one.address) for every in psutil.net_if_addrs().values() for one in every}
        self._tag = uuid.uuid4().hex[:5]
        free = [n for n in range(1, 255) if not any(f"{net}.{n}.1" in taken for net in NETWORKS.values())]
        self._third = random.SystemRandom().choice(free)
        self._machines: list[Machine] = []
        for cable in CABLES:
            switch = self._switch(cable)
            _ip("link", "add", switch, "type", "bridge")
            _ip("address", "add", f"{self._address(cable, 1)}/24", "dev", switch)
            _ip("link", "set", switch, "up")

    @property
    def storage_address(self) -> str:
        """The host's address at the storage's switch."""
        return self._address("storage", 1)

    def add(self, name: str) -> Machine:
        """A machine, with both cables in."""
        number = len(self._machines) + 2
        machine = Machine(
            name, f"chaos-{self._tag}-{name}", self._address("farm", number), self._address("storage", number)
        )
        _ip("netns", "add", machine.namespace)
        self._machines.append(machine)
        _ip("-n", machine.namespace, "link", "set", "lo", "up")
        for cable, address in zip(CABLES, (machine.address, machine.storage_address), strict=True):
            near, far = self._plug(machine, cable), f"{cable}0"
            _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", machine.namespace)
            _ip("-n", machine.namespace, "address", "add", f"{address}/24", "dev", far)
            _ip("-n", machine.namespace, "link", "set", far, "up")
            _ip("link", "set", near, "master", self._switch(cable), "up")
        return machine

    def cut(self, machine: Machine, cable: Cable) -> None:
        _ip("link", "set", self._plug(machine, cable), "down")

    def heal(self, machine: Machine, cable: Cable) -> None:
        _ip("link", "set", self._plug(machine, cable), "up")

    def close(self) -> None:
        """Take everything down again. What still runs in a namespace keeps it until it ends."""
        for machine in self._machines:
            for cable in CABLES:
                _ip("link", "del", self._plug(machine, cable), check=False)
            _ip("netns", "del", machine.namespace, check=False)
        for cable in CABLES:
            _ip("link", "del", self._switch(cable), check=False)

    def _switch(self, cable: Cable) -> str:
        return f"cs{self._tag}{cable[0]}"

    def _plug(self, machine: Machine, cable: Cable) -> str:
        return f"cp{self._tag}{cable[0]}{self._machines.index(machine)}"

    def _address(self, cable: Cable, number: int) -> str:
        return f"{NETWORKS[cable]}.{self._third}.{number}"


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=check)
