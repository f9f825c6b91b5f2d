"""The S3 server of a round, Ceph's: killed, stopped, and started again on the same data."""

import subprocess
from pathlib import Path

import psutil

from tests.chaos.processes import end, go_on, stop

CEPH = Path(__file__).parents[2] / "infra" / "s3" / "ceph.sh"


class Gateway:
    """Ceph in a folder; one that runs there already is used, and left running by `stop`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._ours = not (folder / "ready").exists()
        self.env: dict[str, str] = {}

    def start(self) -> None:
        done = subprocess.run([CEPH, "start", self._folder], check=True, capture_output=True, text=True)
        pairs = (line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        self.env = {name: value.strip("'\"") for name, value in pairs} | {"AWS_EC2_METADATA_DISABLED": "true"}

    @property
    def endpoint(self) -> str:
        return self.env["FARM_S3_ENDPOINT"]

    def kill(self) -> None:
        """End the part that answers requests; `start` brings it back."""
        end(self._pid())

    def pause(self) -> None:
        stop(self._pid())

    def go_on(self) -> None:
        go_on(self._pid())

    def stop(self) -> None:
        if self._ours:
            subprocess.run([CEPH, "stop", self._folder], check=True, capture_output=True)

    def owns(self, process: psutil.Process) -> bool:
        """Whether a process is part of the server."""
        try:
            return any(str(self._folder) in word for word in process.cmdline() if word.endswith("ceph.conf"))
        except psutil.Error:
            return False

    def _pid(self) -> int:
        return int((self._folder / "rgw.pid").read_text())
