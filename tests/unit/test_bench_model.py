import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.bench.figures import (
    GIB,
    ColdStart,
    Drawn,
    Measured,
    Point,
    Sample,
    Span,
    peak_between,
    peaks,
    percentile,
    spread_of,
    thinned,
    wilson,
)
from farm.bench.folder import BenchFolder
from farm.bench.model import MemoryWatch, Wish, joined, measure
from farm.bench.report import Setup, profile_of, record_of, report
from farm.bench.subjects import prompts_for
from farm.engine import EmbeddingCache, Engine
from farm.errors import InputError, OutOfMemoryError, RenderError
from farm.modelcard import RenderParams
from farm.models.family import Embedding, Tokens
from farm.needs import measured_of
from farm.plan import ImageSpec
from farm.provenance import read_picture
from tests.drawing import FakeFamily, card, engine, numerics, spec

PARAMS = card().defaults
ENVIRONMENT: dict[str, str | int] = {"date": "2026-11-22", "processor": "a processor", "cores": 2, "python": "3.11"}


def ticking() -> Any:
    """A clock that goes on by a second at each look."""
    return itertools.count().__next__


def wish(**changes: Any) -> Wish:
    fields: dict[str, Any] = {
        "prompts": ("a red circle", "a blue square"),
        "params": PARAMS,
        "batch": 2,
        "images": 2,
        "rounds": 2,
    }
    return Wish(**fields | changes)


def setup(**changes: Any) -> Setup:
    fields: dict[str, Any] = {
        "card": card(),
        "numerics": numerics(),
        "device": "CPU, 2 cores",
        "vram_gib": 16.0,
        "prompts": ("a red circle", "a blue square"),
        "negative_prompt": "",
        "seed": 0,
        "images": 2,
        "rounds": 2,
        "interval_s": 0.02,
        "held": "resident memory of the process",
        "measured_at": "2026-11-22T10:00:00+00:00",
        "environment": ENVIRONMENT,
        "command": "farm bench sketch",
    }
    return Setup(**fields | changes)


def measured(family: FakeFamily | None = None, **changes: Any) -> Measured:
    """What a benchmark of a family that draws at once comes to."""
    drawing = Engine(card(), numerics(), "cpu", 16.0, family=family or FakeFamily(), cache=EmbeddingCache(0))
    return measure(drawing, wish(**changes), start_s=1.5)


def drawn(part: Any = "round", number: int = 1, *, steps: int = 4, images: int = 1, **seconds: float) -> Drawn:
    fields = {"began_s": 0.0, "encode_s": 1.0, "denoise_s": 4.0, "decode_s": 0.5} | seconds
    return Drawn(part, number, 64, 64, steps, 2.0, images, 2, **fields)


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert percentile([7.0], 0.95) == 7.0
    spread = spread_of([3.0, 1.0, 2.0])
    assert (spread.count, spread.median, spread.least, spread.most) == (3, 2.0, 1.0, 3.0)


def test_an_interval_of_a_share_is_wilsons_and_stays_within_0_and_1() -> None:
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson(0, 10)
    assert (low, high) == (pytest.approx(0.0), pytest.approx(0.2775, abs=1e-4))
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_peak_of_a_phase_counts_the_samples_around_a_short_one() -> None:
    samples = [Sample(0.0, GIB), Sample(1.0, 3 * GIB), Sample(2.0, 2 * GIB), Sample(3.0, GIB)]
    assert peak_between(samples, 0.2, 0.4) == 3 * GIB
    assert peak_between(samples, 2.5, 9.0) == GIB
    assert peak_between(samples, 8.0, 9.0) == GIB
    assert peak_between([], 0.0, 1.0) == 0
    spans = [Span("load", 0.0, 0.5), Span("decode", 1.5, 2.0), Span("decode", 2.5, 3.0)]
    assert peaks(samples, spans) == {"load": 3.0, "decode": 2.0}


def test_thinned_samples_keep_the_peaks() -> None:
    samples = [Sample(float(at), 1000 if at == 37 else at) for at in range(100)]
    found = thinned(samples, 10)
    assert len(found) == 10
    assert max(one.held_bytes for one in found) == 1000
    assert thinned(samples, 100) == samples


def test_a_drawn_batch_knows_its_steps_share_and_its_phases() -> None:
    one = drawn(images=2, began_s=10.0)
    assert (one.seconds, one.step_s) == (5.5, 0.5)
    assert one.spans() == [Span("encode", 10.0, 11.0), Span("denoise", 11.0, 15.0), Span("decode", 15.0, 15.5)]


def test_a_memory_watch_looks_at_the_begin_the_end_and_when_asked() -> None:
    held = iter((10, 30, 20))
    with MemoryWatch(held.__next__, ticking(), interval_s=3600.0) as watch:
        watch.look()
    assert [sample.held_bytes for sample in watch.taken()] == [10, 30, 20]


def test_a_benchmark_draws_a_cold_picture_rounds_and_batches_as_a_job() -> None:
    family = FakeFamily()
    found = measured(family)
    assert family.denoised == [(0,), (0,), (1,), (0,), (1,), (0, 1), (2, 3), (4, 5)]
    assert [one.number for one in found.of("round")] == [1, 1, 2, 2]
    assert found.warm() == found.of("round")[3:]
    assert found.cold.start_s == 1.5
    assert found.cold.seconds > 1.5
    assert (found.job.batch, found.job.batches, found.job.failed) == (2, 2, None)
    assert found.job.seconds_per_image > 0
    assert set(found.peak_gib) == {"load", "encode", "denoise", "decode"}
    assert found.before_gib > 0
    assert found.guided_above == 0.0


def test_guidance_that_begins_above_1_is_found() -> None:
    family = FakeFamily()
    family.guided = lambda params: params.guidance_scale > 1  # type: ignore[method-assign]
    assert measured(family).guided_above == 1.0
    family.guided = lambda params: False  # type: ignore[method-assign]
    assert measured(family).guided_above is None


def test_one_round_is_not_dropped_nor_is_its_one_picture() -> None:
    one = measured(rounds=1)
    assert one.warm() == one.of("round")[1:]
    assert len(measured(rounds=1, images=1).warm()) == 1
    three = measured(rounds=3, images=3)
    assert three.warm() == [*three.of("round")[4:6], *three.of("round")[7:9]]


def test_sweeps_draw_the_same_seeds_with_other_steps_sizes_and_batches() -> None:
    seen: list[tuple[int, int, int, int]] = []

    def look(specs: Sequence[ImageSpec]) -> None:
        first = specs[0]
        seen.append((len(specs), first.params.num_inference_steps, first.params.width, first.seed))

    found = measured(FakeFamily(look), seed=7, steps=(2, 5), sizes=((128, 64),), batches=(1, 3))
    assert [(one[1], one[3]) for one in seen[8:12]] == [(2, 7), (2, 8), (5, 7), (5, 8)]
    assert [one[:3] for one in seen[12:]] == [(2, 3, 128)] * 3 + [(1, 3, 64)] * 3 + [(3, 3, 64)] * 3
    assert [(point.part, point.width, point.batch) for point in found.points] == [
        ("size", 128, 2),
        ("batch", 64, 1),
        ("batch", 64, 3),
    ]
    assert sorted(found.by_steps()) == [2, 5]
    assert max(span.ended_s for span in found.spans) < found.of("size")[0].began_s


def test_a_batch_without_room_stays_without_figures_and_the_others_follow() -> None:
    def full(specs: Sequence[ImageSpec]) -> None:
        if len(specs) > 3:
            raise OutOfMemoryError("no memory left on cuda:0")

    family = FakeFamily(full)
    found = measured(family, batches=(4, 3))
    assert [point.failed for point in found.points] == ["no memory left on cuda:0", None]
    assert family.recovered == 1


def test_a_process_without_memory_counts_as_no_room() -> None:
    def full(specs: Sequence[ImageSpec]) -> None:
        if len(specs) > 3:
            raise MemoryError

    found = measured(FakeFamily(full), batches=(4, 3))
    assert [point.failed for point in found.points] == ["no memory left in this process", None]


def test_a_batch_whose_specs_have_no_room_stays_without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine.batches

    def batches(self: Engine, specs: Sequence[ImageSpec], *, most: int | None = None) -> list[Any]:
        if len(specs) > 9:
            raise MemoryError
        return whole(self, specs, most=most)

    monkeypatch.setattr(Engine, "batches", batches)
    found = measured(batches=(4, 3))
    assert [point.failed for point in found.points] == ["no memory left in this process", None]


def test_a_process_without_memory_for_one_picture_ends_the_benchmark_as_out_of_memory() -> None:
    def full(specs: Sequence[ImageSpec]) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match="no memory left in this process; ask for fewer or smaller pictures"):
        measured(FakeFamily(full))


def test_seeds_go_on_from_0_after_the_last_one() -> None:
    seen: list[int] = []
    measured(FakeFamily(lambda specs: seen.append(specs[0].seed)), seed=2**32 - 1, rounds=1)
    assert seen[1:3] == [2**32 - 1, 0]


def test_a_job_without_room_ends_the_benchmark() -> None:
    def full(specs: Sequence[ImageSpec]) -> None:
        if len(specs) > 1:
            raise OutOfMemoryError("no memory left on cuda:0")

    with pytest.raises(OutOfMemoryError, match="in batches of 2, as the card says: no memory left on cuda:0"):
        measured(FakeFamily(full))


def test_prompts_of_a_job_are_encoded_ahead_where_the_encoder_leaves_the_device() -> None:
    family = FakeFamily()
    family.encodes_ahead = True
    result = measured(family)
    before = 2 * (1 + 2 * 2)  # positive and negative, of the cold picture and two rounds of two
    assert len(family.encoded) == before + 2 + 4  # three prompts and their negative one, as the encoder is timed
    assert [one.encode_s for one in result.of("job")] == pytest.approx([0.0] * 3, abs=0.05)


class Coming(FakeFamily):
    """Parts that come and go take their time by a clock that somebody else reads."""

    encodes_ahead = True
    at_s = 0.0
    encoder_is_in = False

    def encode(self, tokens: Tokens) -> Embedding:
        self.at_s += 0.25 if self.encoder_is_in else 2.25
        self.encoder_is_in = True
        return super().encode(tokens)

    def denoise(self, specs: Sequence[ImageSpec], noise: Any, **given: Any) -> Any:
        self.at_s += len(specs) + (1.5 if self.encoder_is_in else 0.0)
        self.encoder_is_in = False
        return super().denoise(specs, noise, **given)


@pytest.mark.parametrize(
    "prompts", [("a red circle", "a blue square", "a dot"), ("a red circle",), ("a red circle", "a red circle")]
)
def test_how_long_parts_take_to_come_is_told_apart_from_their_work(
    monkeypatch: pytest.MonkeyPatch, prompts: tuple[str, ...]
) -> None:
    family = Coming()
    monkeypatch.setattr("farm.engine.time.perf_counter", lambda: family.at_s)
    drawing = Engine(card(), numerics(), "cpu", 16.0, family=family, cache=EmbeddingCache(0))
    result = measure(drawing, wish(prompts=prompts), start_s=0.0, clock=lambda: family.at_s)
    job = result.job
    assert (job.encode_s, job.encoder_in_s, job.denoiser_in_s) == pytest.approx((0.25, 2.0, 1.5))
    assert job.step_s * job.num_inference_steps == pytest.approx(1.0)
    stages = profile_of(setup(), result).stages
    assert stages is not None
    assert (stages.encode_s, stages.encoder_in_s, stages.denoiser_in_s) == pytest.approx((0.25, 2.0, 1.5))
    said = "it takes 2.00 s until the encoder is on the device, and after them 1.50 s until the denoiser is back."
    assert said in report(setup(), result)


def test_nothing_comes_or_goes_where_all_parts_stay() -> None:
    result = measured()
    assert (result.job.encoder_in_s, result.job.denoiser_in_s) == (None, None)
    assert "until the encoder is on the device" not in report(setup(), result)


def test_pictures_of_no_finite_numbers_end_the_benchmark() -> None:
    with pytest.raises(RenderError, match="no finite numbers in float32; see farm doctor"):
        measured(prompts=("nan",))


def test_batches_are_joined_beyond_the_plans_own() -> None:
    single = engine(FakeFamily(), batch=1)
    batches = single.batches([spec(0), spec(1), spec(2)])
    assert [batch.indexes for batch in batches] == [(0,), (1,), (2,)]
    whole = joined(batches)
    assert whole.indexes == (0, 1, 2)
    assert (len(whole.positive), len(whole.negative)) == (3, 3)


def point(part: Any, width: int, *, step_s: float = 0.5, **changes: Any) -> Point:
    fields: dict[str, Any] = {
        "batch": 2,
        "batches": 2,
        "encode_s": 0.1,
        "step_s": step_s,
        "decode_s": 0.2,
        "seconds_per_image": 4.3,
    }
    return Point(part, width, width, 8, 2.0, **fields | changes)


def found(points: Sequence[Point] = ()) -> Measured:
    """Made-up figures."""
    rounds = tuple(drawn("round", number) for number in (1, 2, 2))
    samples = (Sample(0.0, GIB), Sample(5.0, 2 * GIB))
    return Measured(
        cold=ColdStart(1.0, 2.0, 0.5, 0.75, 1.25, 0.5),
        drawn=(drawn("cold", 0), *rounds, drawn("job", 0, images=2), drawn("steps", 0), drawn("steps", 0, steps=8)),
        job=point("job", 512),
        points=tuple(points),
        spans=(Span("load", 0.0, 1.0), *drawn("cold").spans()),
        samples=samples,
        before_gib=0.5,
        peak_gib={"load": 1.0, "denoise": 2.0},
        guided_above=0.0,
    )


def test_the_profile_has_the_jobs_shape_and_those_of_the_sweep_that_worked() -> None:
    points = [point("size", 1024, step_s=2.5), point("size", 2048, failed="no memory left"), point("batch", 512)]
    profile = profile_of(setup(), found(points))
    assert (profile.model, profile.device, profile.batch, profile.images) == ("sketch", "CPU, 2 cores", 2, 4)
    assert profile.stages is not None
    assert [(shape.width, shape.step_s) for shape in profile.stages.shapes] == [(512, 0.5), (1024, 2.5)]
    assert (profile.stages.guided_above, profile.stages.load_s, profile.stages.dtype) == (0.0, 2.0, "float32")
    assert profile.stages.peak_gib == {"load": 1.0, "denoise": 2.0}
    asked = RenderParams(width=512, height=512, num_inference_steps=8, guidance_scale=2.0)
    assert profile.seconds_of(asked) == pytest.approx(4.3)
    assert profile.stages.seconds_of(asked) == pytest.approx(0.1 + 8 * 0.5 + 0.2)


def test_the_profile_has_what_each_phase_took_for_the_pixels_that_were_on_the_device_together() -> None:
    assert profile_of(setup(), found()).stages.working is None  # type: ignore[union-attr]
    taken = {"encode": 0.25, "denoise": 0.5, "decode": 0.75}
    points = [point("size", 1024, working_gib=taken), point("batch", 512, failed="no memory left")]
    profile = profile_of(setup(), replace(found(points), job=point("job", 512, working_gib={**taken, "encode": 0.1})))
    assert profile.stages is not None
    working = profile.stages.working
    assert working is not None
    # Two pictures of 512x512, with guidance: a megapixel denoised, half a megapixel decoded.
    assert (working.step_gib, working.decode_gib, working.encode_gib) == (0.5, 1.5, 0.25)
    assert measured_of(profile, setup().card, setup().numerics) == working
    page = report(setup(), replace(found(), job=point("job", 512, working_gib=taken)))
    assert "Beside the weights, in batches of 2: encode 0.25 GiB, denoise 0.50 GiB, decode 0.75 GiB." in page


def test_what_each_phase_takes_is_measured_for_each_shape_by_itself() -> None:
    family = FakeFamily()
    family.takes = {"denoise": GIB, "decode": 2 * GIB}
    job = measured(family).job
    assert job.working_gib == {"denoise": 1.0, "decode": 2.0}


def test_the_report_has_every_table() -> None:
    points = [point("size", 1024), point("batch", 512, failed="no memory left")]
    text = report(setup(negative_prompt="blurry"), found(points))
    assert text.startswith("# Tiny on CPU, 2 cores\n\n2026-11-22. `farm bench sketch`\n")
    assert "| **until the first picture** | 6.00 |" in text
    assert "| whole picture | 5.50 | 5.50 | 5.50 | 5.50 |" in text
    assert "| load | 1.00 |\n| denoise | 2.00 |" in text
    assert "| 4 | 1 | 5.50 | 1.00 | 1.00× |\n| 8 | 1 | 5.50 | 0.500 | 1.00× |" in text
    assert "| 1024×1024 | 2 | 4.30 | 0.500 | 0.200 | 0.00 |" in text
    assert "| 512×512 | 2 | no memory left | | | |" in text
    assert (
        "Median and spread over 1 of the pictures, batch 1: 2 rounds of 2, without the first round and the first picture of each"
        in text
    )
    assert "Negative prompt: `blurry`" in text


def test_the_record_is_json_and_says_what_the_memory_is_of() -> None:
    record = record_of(setup(), found())
    assert record["memory"]["of"] == "resident memory of the process"
    assert record["warm"]["denoise"]["median"] == 4.0
    assert record["cold"]["seconds"] == 6.0


def test_a_folder_gets_pictures_sheet_plots_report_and_record(tmp_path: Path) -> None:
    folder = BenchFolder(tmp_path / "out")
    folder.claim()
    result = measure(engine(FakeFamily()), wish(steps=(2,)), start_s=0.0, keep=folder.keep)
    folder.write(setup(), result)
    names = sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file())
    assert names == [
        "bench.json",
        "memory.svg",
        "pictures/001.png",
        "pictures/002.png",
        "pictures/steps-002-001.png",
        "pictures/steps-002-002.png",
        "report.md",
        "seconds.svg",
        "sheet.png",
    ]
    provenance = read_picture(folder.path / "pictures" / "steps-002-002.png").provenance
    assert (provenance.prompt, provenance.seed, provenance.params.num_inference_steps) == ("a blue square", 1, 2)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex already; name an empty or a new folder"):
        BenchFolder(tmp_path).claim()


def test_a_claimed_folder_is_gone_again_where_nothing_came_of_it(tmp_path: Path) -> None:
    folder = BenchFolder(tmp_path / "runs" / "out")
    with folder.claimed():
        assert folder.path.is_dir()
    folder.release()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RenderError, match="no"), folder.claimed():
        raise RenderError("no")
    assert not list(tmp_path.iterdir())
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(RenderError, match="no"), BenchFolder(mine).claimed():
        raise RenderError("no")
    assert mine.is_dir()


def test_default_prompts_follow_the_family() -> None:
    assert prompts_for(card())[0] == "a red circle on a white background"
    assert "portrait" in prompts_for(card("/somewhere", family="qwen-image"))[0]
    assert "1girl" in prompts_for(card("/somewhere", family="newbie"))[0]
    assert "golden retriever" in prompts_for(card("/somewhere"))[0]


def test_an_engine_says_what_memory_it_holds() -> None:
    kept = np.ones(2**22)
    memory = Engine(card(), numerics(), "cpu", 16.0, family=FakeFamily()).memory()
    assert memory.peak_bytes >= memory.reserved_bytes > kept.nbytes
