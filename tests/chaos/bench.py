"""What rounds share: how much is done, the S3 server, and the same jobs rendered undisturbed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from farm.lease import LEASE_S
from tests.chaos.audit import render_undisturbed, write_manifest
from tests.chaos.cluster import environment
from tests.chaos.gateway import Gateway
from tests.chaos.processes import orphans_stay_ours


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done. `renderers` also decides how the job is cut, so undisturbed runs are kept for each.

    `longest_s`: how long what ends again may last; where that is less than a lease, nothing outlasts one.
    """

    events: int
    images: int
    renderers: int
    steps: int
    longest_s: float = 45.0

    @property
    def lengths(self) -> tuple[tuple[float, float], ...]:
        short = (1.0, min(12.0, self.longest_s))
        return (short, (LEASE_S + 2.0, self.longest_s)) if self.longest_s > LEASE_S + 2.0 else (short,)


@dataclass(slots=True)
class Bench:
    """What rounds share: a folder, the S3 server, and undisturbed runs by the size of their job."""

    folder: Path
    gateway: Gateway
    undisturbed: dict[tuple[int, int, int], tuple[Path, Path]] = field(default_factory=dict)
    keep: bool = False

    def job(self, size: Size) -> tuple[Path, Path]:
        """The manifest, and the folder that it was rendered into undisturbed."""
        key = (size.images, size.renderers, size.steps)
        if key not in self.undisturbed:
            folder = self.folder / "-".join(map(str, key))
            folder.mkdir()
            manifest = write_manifest(folder, images=size.images, steps=size.steps)
            env = environment(self.folder) | {"FARM_RUNTIME_DIR": str(folder / "runtime")}
            render_undisturbed(manifest, folder / "store", env, renderers=size.renderers)
            self.undisturbed[key] = manifest, folder / "store"
        return self.undisturbed[key]


@contextmanager
def bench(gateway: Path | None = None) -> Iterator[Bench]:
    """Make what rounds need; `gateway`: a folder of Ceph's that runs already. The folder stays where `keep` was set."""
    folder = Path(tempfile.mkdtemp(prefix="ch-", dir="/tmp"))  # short: Ray's sockets lie below it
    ceph = Gateway(gateway or folder / "s3")
    made = Bench(folder, ceph)
    try:
        with orphans_stay_ours():
            ceph.start()
            yield made
    finally:
        ceph.stop()  # by the process ids in its folder, which goes last
        if made.keep:
            print(f"chaos: what was left is in {folder}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
