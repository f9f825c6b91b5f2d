"""The folder that a benchmark of a model leaves: pictures as they are drawn, then report, plots, sheet and record."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from farm.bench.acceleration import Way
from farm.bench.figures import Measured, Part
from farm.bench.plots import plot_memory, plot_seconds
from farm.bench.report import Setup, record_of, report
from farm.engine import Picture
from farm.errors import InputError
from farm.grid import GridRow, draw_grid
from farm.plan import card_identity
from farm.provenance import Provenance, encode_picture, pixels_sha256

RECORD = "bench.json"
MOST_ROWS = 12


@dataclass(frozen=True, slots=True)
class _Kept:
    prompt: str
    seed: int
    steps: int
    seconds: float
    pixels: np.ndarray


@dataclass(slots=True)
class BenchFolder:
    """A folder of its own for one benchmark."""

    path: Path
    _made: list[Path] = field(default_factory=list)
    _kept: dict[Part, list[_Kept]] = field(default_factory=dict)
    _pictures: list[tuple[str, Picture]] = field(default_factory=list)

    def claim(self) -> None:
        """Make the folder. Raises InputError where it holds something already, or cannot be made."""
        try:
            for folder in reversed([one for one in (self.path, *self.path.parents) if not one.exists()]):
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
            taken = next(self.path.iterdir(), None)
        except OSError as exc:
            self.release()
            raise InputError(
                f"--out {str(self.path)[:100]}: cannot be made: {exc.strerror}; name another folder"
            ) from exc
        if taken is not None:
            raise InputError(f"--out {self.path}: holds {taken.name} already; name an empty or a new folder")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Claim the folder for a block; where that raises, nothing empty is left behind."""
        self.claim()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Take away again what `claim` made, as far as it holds nothing."""
        with suppress(OSError):
            while self._made:
                self._made.pop().rmdir()

    def keep(self, part: Part, picture: Picture) -> None:
        """Keep a picture of the last round, or of the sweep over steps."""
        spec = picture.spec
        steps = spec.params.num_inference_steps
        name = f"{spec.index + 1:03d}" if part == "round" else f"steps-{steps:03d}-{spec.index + 1:03d}"
        self._kept.setdefault(part, []).append(_Kept(spec.prompt, spec.seed, steps, picture.seconds, picture.pixels))
        self._pictures.append((name, picture))

    def write(self, setup: Setup, measured: Measured, ways: Sequence[Way] = ()) -> None:
        """Write everything, over what was written before. Raises InputError where the disk does not take it."""
        try:
            (self.path / "pictures").mkdir(exist_ok=True)
            for name, picture in self._pictures:
                (self.path / "pictures" / f"{name}.png").write_bytes(_file(setup, picture))
            (self.path / "sheet.png").write_bytes(self._sheet(setup))
            if drawn := [way for way in ways if way.pixels]:
                (self.path / "acceleration.png").write_bytes(self._beside(setup, drawn))
            plot_memory(self.path / "memory.svg", measured, held=setup.held)
            plot_seconds(self.path / "seconds.svg", measured)
            (self.path / "report.md").write_text(report(setup, measured, ways), encoding="utf-8")
            text = json.dumps(record_of(setup, measured, ways), indent=1, ensure_ascii=False, allow_nan=False)
            (self.path / RECORD).write_text(f"{text}\n", encoding="utf-8")
        except OSError as exc:
            raise InputError(f"--out {self.path}: cannot be written: {exc.strerror}; name another folder") from exc

    def _sheet(self, setup: Setup) -> bytes:
        kept = self._kept.get("steps") or self._kept["round"]
        steps = sorted({one.steps for one in kept})
        rows = []
        for prompt, seed in list(dict.fromkeys((one.prompt, one.seed) for one in kept))[:MOST_ROWS]:
            mine = {one.steps: one for one in kept if (one.prompt, one.seed) == (prompt, seed)}
            cells = [mine.get(number) for number in steps]
            rows.append(
                GridRow(
                    f"seed {seed}",
                    prompt,
                    tuple(None if one is None else one.pixels for one in cells),
                    tuple("" if one is None else f"{one.seconds:.3g} s" for one in cells),
                )
            )
        columns = [f"{number} steps" for number in steps]
        return draw_grid(setup.card.name, self._on(setup), columns=columns, rows=rows)

    def _beside(self, setup: Setup, ways: Sequence[Way]) -> bytes:
        """The last round's pictures as the card draws them, and beside each what every acceleration makes of it."""
        rows = [
            GridRow(
                f"seed {one.seed}",
                one.prompt,
                (one.pixels, *(way.pixels[place] for way in ways)),
                ("", *("equal" if (db := way.psnr_db[place]) is None else f"{db:.1f} dB" for way in ways)),
            )
            for place, one in enumerate(self._kept["round"][:MOST_ROWS])
        ]
        columns = ["as it is", *(way.name for way in ways)]
        return draw_grid(setup.card.name, self._on(setup), columns=columns, rows=rows)

    def _on(self, setup: Setup) -> str:
        guidance_scale = self._pictures[0][1].spec.params.guidance_scale
        return f"{setup.device}, {setup.numerics.dtype}, guidance {guidance_scale:g}, {setup.measured_at[:10]}"


def _file(setup: Setup, picture: Picture) -> bytes:
    spec = picture.spec
    provenance = Provenance(
        index=spec.index,
        key=None,
        prompt=spec.prompt,
        seed=spec.seed,
        params=spec.params,
        model=card_identity(setup.card, setup.numerics.device),
        numerics=setup.numerics.model_copy(update={"batch": 1}),
        plan="",
        format="png",
        quality=None,
        pixels_sha256=pixels_sha256(picture.pixels),
    )
    return encode_picture(picture.pixels, provenance)
