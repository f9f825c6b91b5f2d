"""`farm render`, typed again whenever it ended, and held to the exit codes that it promises."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.chaos.processes import ChaosError, below, end, started

FARM = Path(sys.executable).parent / "farm"
STORE_AWAY = 3
FARM_AWAY = 6
SAID_LINES = 60


class Command:
    """One person at one terminal. `allowed`: how the command may end, beside well and by our own SIGKILL."""

    def __init__(
        self,
        name: str,
        manifest: Path,
        env: dict[str, str],
        *,
        renderers: int,
        folder: Path,
        allowed: frozenset[int],
        prefix: Sequence[str] = (),
    ):
        self.name = name
        self.exits: list[int] = []
        self._arguments = [*prefix, str(FARM), "render", str(manifest), "--renderers", str(renderers)]
        self._env = env
        self._folder = folder
        self._allowed = allowed
        self._killed = False
        self.start()

    def start(self) -> None:
        self._killed = False
        self._log = self._folder / f"{self.name}-{len(self.exits) + 1}.log"
        with self._log.open("w") as log:
            self._process = started(
                psutil.Popen(self._arguments, env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    @property
    def process(self) -> psutil.Process:
        return self._process

    def family(self) -> list[psutil.Process]:
        """What descends from the command that runs now."""
        return below(self._process)

    @property
    def done(self) -> bool:
        return bool(self.exits) and self.exits[-1] == 0

    def step(self) -> bool:
        """Type it again if it ended; True when it ended well. Raises ChaosError where it ended as it should not."""
        if self.done:
            return True
        code = self._process.poll()
        if code is None:
            return False
        self.exits.append(int(code))
        if code == 0:
            return True
        if not (code == -signal.SIGKILL and self._killed) and code not in self._allowed:
            said = "\n".join(self._log.read_text(errors="replace").splitlines()[-SAID_LINES:])
            raise ChaosError(f"{self.name} ended with {code}, which nothing that was done to it explains:\n{said}")
        self.start()
        return False

    def kill(self) -> None:
        self._killed = True
        end(self._process.pid)
        self._process.wait()
