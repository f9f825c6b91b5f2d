from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from farm.bench.acceleration import HOW, Kept, Way, accelerated, measure_ways
from farm.bench.figures import Measured
from farm.bench.model import measure
from farm.bench.report import record_of, report
from farm.cardparts import PLAIN, Acceleration
from farm.engine import EmbeddingCache, Engine
from farm.errors import InputError, ModelCardError
from farm.modelcard import ModelCard
from farm.models.family import Decoded
from farm.plan import ImageSpec, Numerics
from tests.drawing import FakeFamily, card, numerics
from tests.unit.test_bench_model import setup, wish

COMPILED = card(acceleration={"cpu": Acceleration(compile=True)})


class Timed(FakeFamily):
    """Takes so many seconds an image by a clock of its own, and draws other pixels where it is told to."""

    at_s = 0.0

    def __init__(self, seconds: float, *, changed: bool = False):
        super().__init__()
        self._seconds, self._changed = seconds, changed

    def denoise(self, specs: Sequence[ImageSpec], noise: Any, **given: Any) -> Any:
        Timed.at_s += self._seconds * len(specs)
        return super().denoise(specs, noise, **given)

    def decode(self, latents: Any, spec: ImageSpec) -> Decoded:
        decoded = super().decode(latents, spec)
        return replace(decoded, pixels=tuple(one ^ 1 for one in decoded.pixels)) if self._changed else decoded


def test_ways_to_accelerate_are_read_as_a_card_has_them() -> None:
    plain = card()
    found = accelerated(plain, "compile,attention=_native_cudnn", device="cpu")
    assert found.accelerated_on("cpu") == Acceleration(compile=True, attention="_native_cudnn")
    assert found.accelerated_on("cuda") == PLAIN
    assert accelerated(COMPILED, "none", device="cpu").accelerated_on("cpu") == PLAIN
    qwen = card(family="qwen-image", batch={"cpu": 4})
    found = accelerated(qwen, "first_block_cache = 0.2", device="cpu")
    assert (found.accelerated_on("cpu").first_block_cache, found.batch) == (0.2, {"cpu": 1})


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        ("z-image", "comple", "'comple' is no way to accelerate; did you mean compile?"),
        ("z-image", "", f"'' is no way to accelerate; write {HOW}"),
        ("z-image", "attention=quick", "attention: Input should be 'native', "),
        ("newbie", "attention=flash", "attention: the family newbie has no such thing; leave it out"),
        ("qwen-image", "first_block_cache=-1", "first_block_cache: Input should be greater than 0"),
        ("newbie", "compile,first_block_cache=0.1", "first_block_cache: the family newbie has no such thing"),
    ],
)
def test_what_no_card_of_the_family_can_have_is_refused(family: str, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        accelerated(card(family=family), text, device="cpu")
    assert caught.value.message.startswith(f"--accelerate {text!r}: {said}")


def ways_of(families: dict[str, list[FakeFamily]], **wanted: Any) -> tuple[Measured, list[Way]]:
    """A benchmark of the card as it is, of it compiled, and of it once more; families by acceleration, as they are opened."""

    def open_engine(described: ModelCard, given: Numerics) -> Engine:
        family = families[str(described.accelerated_on("cpu"))].pop(0)
        return Engine(described, given, "cpu", 16.0, family=family, cache=EmbeddingCache(0))

    own = Kept()
    base = measure(open_engine(card(), numerics()), wish(), start_s=0.0, keep=own.keep)
    ways = measure_ways(
        [(COMPILED, numerics())],
        wish(**wanted),
        as_it_is=(card(), numerics()),
        base=base,
        own=own.pixels,
        open_engine=open_engine,
        say=lambda text: None,
    )
    return base, ways


def test_gains_are_against_the_card_as_it_is_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.engine.time.perf_counter", lambda: Timed.at_s)
    families = {"none": [Timed(4.0), Timed(2.0)], "compile": [Timed(2.0, changed=True)]}  # it has less to do by the end
    base, (compiled, again) = ways_of(families, steps=(2, 4))
    assert (compiled.picture_gain, compiled.job_gain) == pytest.approx((1.5, 1.5))
    assert (again.picture_gain, again.equal, again.median_db) == (pytest.approx(1.5), 2, None)
    assert (compiled.equal, compiled.median_db) == (0, pytest.approx(48.13, abs=0.01))  # a level in each channel
    assert compiled.measured is not None
    assert compiled.measured.by_steps() == {}
    page = report(setup(), base, [compiled, again])
    assert "| compile | " in page
    assert page.count("1.50×") == 4
    assert "| 0 | 48.1 |\n" in page
    record = record_of(setup(), base, [compiled, again])["accelerated"]
    assert [one["acceleration"] for one in record] == [{"compile": True}, {}]
    assert record[0]["psnr_db"] == pytest.approx([48.13, 48.13], abs=0.01)


def test_what_cannot_be_had_here_is_a_row_that_says_why() -> None:
    class Refused(FakeFamily):
        def load(self) -> None:
            raise ModelCardError("model tiny: attention flash cannot be used here")

    base, (compiled, again) = ways_of({"none": [FakeFamily(), FakeFamily()], "compile": [Refused()]})
    assert (compiled.measured, compiled.failed) == (None, "model tiny: attention flash cannot be used here")
    assert again.measured is not None
    assert "| compile | cannot be had here: model tiny: attention flash" in report(setup(), base, [compiled, again])
