"""The engine around a family without torch: batches, cache, progress, cancelling, errors."""

import subprocess
import sys
import time

import pytest

from farm.cardparts import Acceleration, Adapter, Denoiser, Scheduler, Source
from farm.engine import EmbeddingCache, Picture, RenderStep, check_numerics, weights_of
from farm.errors import CancelledError, NumericsError, OutOfMemoryError, RenderError
from farm.models.family import Embedding, Tokens
from farm.versions import versions_for
from tests.drawing import FakeFamily, card, engine, numerics, spec

LONG = "a long prompt of more than thirty-two bytes in all"


def test_batches_are_cut_by_shape_in_order_of_first_appearance() -> None:
    specs = [spec(i, LONG if i in (1, 2, 8) else "short", height=96 if i == 3 else 64) for i in range(10)]
    batches = engine(FakeFamily()).batches(specs)
    assert [batch.indexes for batch in batches] == [(0, 4, 5, 6), (7, 9), (1, 2, 8), (3,)]


def test_steps_guidance_and_size_each_make_a_shape_and_seeds_do_not() -> None:
    specs = [spec(0), spec(1, seed=5), spec(2, num_inference_steps=4), spec(3, guidance_scale=0.0), spec(4, width=32)]
    assert [batch.indexes for batch in engine(FakeFamily()).batches(specs)] == [(0, 1), (2,), (3,), (4,)]


def test_each_distinct_prompt_is_encoded_once() -> None:
    family = FakeFamily()
    renderer = engine(family)
    specs = [spec(i, f"prompt {i % 3}") for i in range(12)]
    renderer.render(specs, on_picture=lambda picture: None)
    renderer.render(specs, on_picture=lambda picture: None)
    assert len(family.encoded) == 4  # three prompts and the empty negative one


def test_without_guidance_the_negative_prompt_is_not_encoded() -> None:
    family = FakeFamily()
    engine(family).render([spec(0, guidance_scale=0.0)], on_picture=lambda picture: None)
    assert family.encoded == [family.tokenize("a red circle")]


def test_an_encoder_that_leaves_encodes_the_whole_shard_first() -> None:
    family = FakeFamily()
    family.encodes_ahead = True
    order: list[str] = []
    family.trouble = lambda specs: order.append(f"denoise after {len(family.encoded)}")
    engine(family).render([spec(i, f"prompt {i}") for i in range(8)], on_picture=lambda picture: None)
    assert order == ["denoise after 9", "denoise after 9"]


def test_the_cache_is_bounded_by_bytes_and_drops_what_was_used_longest_ago() -> None:
    cache = EmbeddingCache(2500)
    for i in range(2):
        cache.put(Tokens((i,)), Embedding(i, 1000))
    cache.get(Tokens((0,)))
    cache.put(Tokens((2,)), Embedding(2, 1000))
    cache.put(Tokens((3,)), Embedding(3, 9000))
    assert (cache.nbytes, len(cache)) == (2000, 2)
    assert [cache.get(Tokens((i,))) is not None for i in range(4)] == [True, False, True, False]


def test_progress_names_the_stage_the_step_and_the_images_done() -> None:
    steps: list[RenderStep] = []
    engine(FakeFamily(), batch=2).render(
        [spec(i) for i in range(3)], on_picture=lambda picture: None, on_step=steps.append
    )
    assert steps == [
        *(
            RenderStep(0, "encode", 0, 3),
            *(RenderStep(0, "denoise", i, 3) for i in (1, 2, 3)),
            RenderStep(0, "decode", 0, 1),
        ),
        *(
            RenderStep(2, "encode", 0, 3),
            *(RenderStep(2, "denoise", i, 3) for i in (1, 2, 3)),
            RenderStep(2, "decode", 0, 1),
        ),
    ]


def test_a_cancel_is_heard_after_the_step_and_the_engine_goes_on() -> None:
    renderer = engine(FakeFamily())
    steps: list[RenderStep] = []
    pictures: list[Picture] = []
    with pytest.raises(CancelledError):
        renderer.render(
            [spec(i) for i in range(8)],
            on_picture=pictures.append,
            on_step=steps.append,
            cancelled=lambda: any(step.step == 2 for step in steps),
        )
    assert [step.step for step in steps if step.stage == "denoise"] == [1, 2]
    assert pictures == []
    renderer.render([spec(0)], on_picture=pictures.append)
    assert len(pictures) == 1


def test_whatever_a_pipeline_raises_becomes_a_render_error_that_says_what_was_done() -> None:
    def trouble(specs: object) -> None:
        raise IndexError("index 1024 is out of bounds")

    with pytest.raises(RenderError) as caught:
        engine(FakeFamily(trouble)).render([spec(3), spec(4)], on_picture=lambda picture: None)
    assert caught.value.message == "could not denoise images 3 to 4: IndexError: index 1024 is out of bounds"
    assert isinstance(caught.value.__cause__, IndexError)


def test_errors_of_the_farm_pass_as_they_are() -> None:
    def trouble(specs: object) -> None:
        raise OutOfMemoryError("none left")

    with pytest.raises(OutOfMemoryError, match="none left"):
        engine(FakeFamily(trouble)).render([spec(3)], on_picture=lambda picture: None)


def test_a_picture_of_no_numbers_says_so() -> None:
    pictures: list[Picture] = []
    engine(FakeFamily()).render([spec(0, "nan"), spec(1)], on_picture=pictures.append)
    assert [picture.nan for picture in pictures] == [True, False]


def test_seconds_are_told_by_stage() -> None:
    seconds = engine(FakeFamily()).render([spec(0)], on_picture=lambda picture: None)
    assert sorted(seconds) == ["decode", "denoise", "encode"]
    assert all(took >= 0 for took in seconds.values())


def test_seconds_that_others_took_between_steps_are_told_nowhere() -> None:
    renderer, pictures = engine(FakeFamily()), []
    batch = renderer.batches([spec(0)])[0]

    def between_steps() -> float:
        time.sleep(0.02)
        return 0.02

    started = time.perf_counter()
    seconds = renderer.render_batch(
        batch,
        on_picture=pictures.append,
        on_step=lambda step: None,
        cancelled=lambda: False,
        between_steps=between_steps,
    )
    took = time.perf_counter() - started
    assert 0 < sum(seconds.values()) <= took - 4 * 0.02
    assert pictures[0].seconds == pytest.approx(sum(seconds.values()))


def test_a_cancel_that_came_while_others_had_the_device_is_heard_before_the_next_step() -> None:
    renderer, steps, stop = engine(FakeFamily()), [], []
    with pytest.raises(CancelledError):
        renderer.render_batch(
            renderer.batches([spec(0)])[0],
            on_picture=lambda picture: None,
            on_step=steps.append,
            cancelled=lambda: bool(stop),
            between_steps=lambda: stop.append(True) or 0.5,
        )
    assert [step.step for step in steps if step.stage == "denoise"] == [1]


def test_the_engine_within_a_step_shares_the_embeddings_and_goes_when_the_model_goes() -> None:
    family = FakeFamily()
    outer = engine(family)
    inner = outer.inside()
    assert inner is not None
    assert inner is outer.inside()
    inner.render([spec(0)], on_picture=lambda picture: None)
    outer.render([spec(1)], on_picture=lambda picture: None)
    assert len(family.encoded) == 2
    outer.unload()
    assert outer.inside() is not inner
    family.within = "nothing"
    outer.unload()
    assert outer.inside() is None


def test_a_batch_fits_within_a_step_where_nothing_has_to_come_to_the_device() -> None:
    family = FakeFamily()
    renderer = engine(family)
    known, new = (renderer.batches([spec(0, prompt)])[0] for prompt in ("known", "new"))
    renderer.render([spec(0, "known")], on_picture=lambda picture: None)
    fits = []
    for within in ("anything", "encoded", "nothing"):
        family.within = within
        fits.append([renderer.fits_within_a_step(batch) for batch in (known, new)])
    assert fits == [[True, True], [True, False], [False, False]]


def test_batches_may_be_cut_smaller_than_the_plans_and_never_larger() -> None:
    renderer = engine(FakeFamily())
    specs = [spec(i) for i in range(6)]
    sizes = [[len(batch.specs) for batch in renderer.batches(specs, most=most)] for most in (None, 2, 100)]
    assert sizes == [[4, 2], [2, 2, 2], [4, 2]]


def test_other_versions_and_other_devices_are_refused() -> None:
    check_numerics(numerics(), device="cpu")
    with pytest.raises(NumericsError, match=r"made with torch 1\.0, .* is installed; install torch==1\.0 to go on"):
        check_numerics(numerics(versions={"torch": "1.0"}), device="cpu")
    with pytest.raises(NumericsError, match="made with no-such-package 3, none is installed"):
        check_numerics(numerics(versions={"no-such-package": "3"}), device="cpu")
    with pytest.raises(NumericsError, match="made for cpu and this renderer has cuda; give it to one that fits"):
        check_numerics(numerics(), device="cuda:0")


def test_an_engine_with_other_versions_loads_nothing() -> None:
    family = FakeFamily()
    with pytest.raises(NumericsError):
        engine(family, versions={"torch": "1.0"}).load()
    assert not family.loaded


def test_engine_and_the_family_sleep_import_no_torch() -> None:
    code = (
        "import sys; from tests.drawing import card, numerics, spec; from farm.engine import Engine; "
        "e = Engine(card(family='sleep'), numerics(), 'cpu', 16.0); e.load(); seen = []; "
        "e.render([spec(0), spec(1)], on_picture=seen.append); "
        "assert seen[0].pixels.shape == (64, 64, 3) and (seen[0].pixels != seen[1].pixels).any(); "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "changes",
    [
        {"denoiser": Denoiser(hub="a/b", file="q4.gguf", format="gguf")},
        {"decoder": Source(hub="a/vae")},
        {"quantise": {"encoder": "nf4"}},
        {"adapters": (Adapter(hub="a/b", file="one.safetensors", name="one"),)},
        {"scheduler": Scheduler(name="flow-heun")},
        {"options": {"encoder_on": "cpu"}},
        {"acceleration": {"cpu": Acceleration(compile=True)}},
        {"max_sequence_length": 32},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_a_card_is_loaded_with_makes_other_weights(changes: dict[str, object]) -> None:
    assert weights_of(card(**changes), numerics()) != weights_of(card(), numerics())


def test_equal_weights_with_other_code_are_other_weights() -> None:
    def weights(sha256: str) -> object:
        return weights_of(card(family="diffusers", code={"pipeline.py": sha256}), numerics())

    assert weights("0" * 64) != weights("1" * 64)


def test_an_adapters_weight_and_a_files_name_make_other_weights() -> None:
    def weights(**changes: object) -> object:
        one = Adapter(**{"hub": "a/b", "file": "one.safetensors", "name": "one"} | changes)
        return weights_of(card(adapters=(one,)), numerics())

    assert len({weights(), weights(weight=0.5), weights(file="two.safetensors"), weights(revision="1a2b")}) == 4


def test_weights_of_one_revision_are_the_same_wherever_they_lie_and_whatever_the_batch() -> None:
    here = card("/here").model_copy(update={"source": Source(path="/here", revision="sha256:1a")})
    there = here.model_copy(update={"source": Source(path="/there", revision="sha256:1a"), "title": "Another"})
    assert weights_of(here, numerics()) == weights_of(there, numerics(batch=1))
    assert weights_of(here, numerics()) != weights_of(card("/here"), numerics())


def test_guidance_is_on_where_the_family_says_so() -> None:
    class FromOne(FakeFamily):
        def guided(self, params: object) -> bool:
            return params.guidance_scale > 1  # type: ignore[attr-defined]

    batches = engine(FromOne()).batches([spec(0, guidance_scale=1.0), spec(1, guidance_scale=1.5)])
    assert [len(batch.negative) for batch in batches] == [0, 1]


def test_a_plan_that_names_no_version_of_a_cards_own_shares_the_weights_of_one_that_does() -> None:
    packed = card(denoiser=Denoiser(path="/models", file="a.gguf", format="gguf"))
    named = numerics(versions=versions_for(packed, "cpu"))
    assert "gguf" in named.versions
    silent = numerics(versions={name: one for name, one in named.versions.items() if name != "gguf"})
    assert weights_of(packed, silent) == weights_of(packed, named)
    other = numerics(versions={**named.versions, "gguf": "0.1"})
    assert weights_of(packed, other) != weights_of(packed, named)
