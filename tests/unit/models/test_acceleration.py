"""Compiled blocks, attention kernels and a first-block cache, on tiny models of all families.

Blocks are compiled for real once, for Z-Image; elsewhere torch captures them all the same and its compiler is left out, since
it takes half a minute a model.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from farm.cardparts import Acceleration
from farm.engine import Batch, Engine, Picture
from farm.errors import CancelledError, ModelCardError
from farm.models.diffusion import DiffusionFamily
from farm.models.family import open_family
from farm.plan import ImageSpec
from tests.drawing import card, numerics, spec, write_tiny_zimage
from tests.newbie import write_tiny_newbie
from tests.tiny_qwen import write_tiny_qwen

WRITERS: dict[str, Callable[[Path], Path]] = {
    "z-image": write_tiny_zimage,
    "qwen-image": write_tiny_qwen,
    "newbie": write_tiny_newbie,
}
SHORT, LONG = "a red circle", "a red circle and " * 12
CAPTURED = {"backend": "eager"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}


@pytest.fixture(autouse=True, scope="module")
def _as_it_was() -> Iterator[None]:
    """Nothing here is for other tests to find: how torch compiles is one setting for the whole process."""
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def opened(folders: dict[str, Path], family: str, *, batch: int = 2, **how: Any) -> Engine:
    """A loaded engine, accelerated as said."""
    changes = {"family": family, "batch": {"cpu": batch}}
    if how:
        changes["acceleration"] = {"cpu": Acceleration(**how)}
    described = card(folders[family], **changes)
    given = numerics(batch=batch)
    engine = Engine(described, given, "cpu", 16.0, family=open_family(described, given, device="cpu", vram_gib=16.0))
    engine.load()
    return engine


def family_of(engine: Engine) -> DiffusionFamily:
    family = engine._family
    assert isinstance(family, DiffusionFamily)
    return family


def shapes() -> list[list[ImageSpec]]:
    """Batches of one to three pictures, of several sizes, with guidance and without, with captions of many lengths."""
    return [
        [
            spec(
                i,
                text,
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=2,
                negative_prompt=negative,
            )
            for i, text in enumerate(texts)
        ]
        for width, height in ((64, 64), (96, 64), (256, 256))
        for guidance, negative in ((0.0, ""), (4.0, "black"), (4.0, LONG))
        for texts in ((SHORT,), (LONG,), (SHORT, "a blue star"), (SHORT, LONG), ("a green square", LONG, SHORT))
    ]


def drawn(engine: Engine, specs: Sequence[ImageSpec]) -> list[np.ndarray]:
    pictures: list[Picture] = []
    engine.render(specs, on_picture=pictures.append)
    return [picture.pixels.astype(int) for picture in sorted(pictures, key=lambda picture: picture.spec.index)]


def apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> int:
    return max(int(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))


def same(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    return apart(ours, theirs) == 0


@pytest.fixture(params=WRITERS)
def captured(
    request: pytest.FixtureRequest, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Engine]:
    """A family whose blocks are captured, and computed as they were written."""
    monkeypatch.setattr("farm.models.acceleration.COMPILER", CAPTURED)
    return request.param, opened(folders, request.param, compile=True)


def test_what_was_compiled_as_the_model_loaded_takes_every_shape(
    captured: tuple[str, Engine], folders: dict[str, Path]
) -> None:
    family, engine = captured
    plain = opened(folders, family)
    for specs in shapes():
        with torch.compiler.set_stance("fail_on_recompile"):
            found = drawn(engine, specs)
        assert apart(found, drawn(plain, specs)) <= 1


def test_captured_blocks_are_cut_into_without_a_trace_and_take_weights_that_lie_elsewhere(
    captured: tuple[str, Engine],
) -> None:
    _, engine = captured
    outer, inner = shapes()[2], engine.batches([spec(9, "a star", width=96, guidance_scale=3.0)])[0]
    before, alone = drawn(engine, outer), drawn(engine, inner.specs)
    within: list[Picture] = []
    with torch.compiler.set_stance("fail_on_recompile"):
        assert same(_disturbed(engine, outer, inner, within), before)
        assert within
        assert same([picture.pixels.astype(int) for picture in within], alone * len(within))
        for weights in family_of(engine)._modules.denoiser.parameters():
            weights.data = weights.data.clone()  # as after every time that the denoiser was off the device
        assert same(drawn(engine, outer), before)


def _disturbed(engine: Engine, outer: Sequence[ImageSpec], inner: Batch, within: list[Picture]) -> list[np.ndarray]:
    inside = engine.inside()
    assert inside is not None
    pictures: list[Picture] = []
    for batch in engine.batches(outer):
        ahead, _ = engine.encode_ahead([batch, inner], on_step=lambda step: None, cancelled=lambda: False)

        def between_steps() -> float:
            inside.render_batch(inner, on_picture=within.append, on_step=lambda step: None, cancelled=lambda: False)
            return 0.0

        engine.render_batch(
            batch,
            on_picture=pictures.append,
            on_step=lambda step: None,
            cancelled=lambda: False,
            ahead=ahead,
            between_steps=between_steps,
        )
    return [picture.pixels.astype(int) for picture in pictures]


@pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CI")), reason="torch's compiler needs g++ on a CPU")
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's compiler itself
def test_compiled_blocks_draw_what_stock_ones_do_whatever_was_drawn_before(folders: dict[str, Path]) -> None:
    engine, plain = opened(folders, "z-image", compile=True), opened(folders, "z-image")
    there_and_back = [*shapes(), *reversed(shapes())]
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [drawn(engine, specs) for specs in there_and_back]
    assert all(same(first, again) for first, again in zip(found, reversed(found), strict=True))
    assert max(apart(ours, drawn(plain, specs)) for ours, specs in zip(found, there_and_back, strict=False)) <= 1


def test_what_cannot_be_compiled_is_told_as_the_model_loads(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr("farm.models.acceleration.COMPILER", {"backend": broken})
    with pytest.raises(
        ModelCardError, match=r"model sketch: with compile it cannot be drawn on cpu: .*no compiler found"
    ):
        opened(folders, "qwen-image", compile=True)
    monkeypatch.setattr("farm.models.newbie_transformer.NewBieTransformer._repeated_blocks", ())
    with pytest.raises(ModelCardError, match="NewBieTransformer names no repeated blocks to compile"):
        opened(folders, "newbie", compile=True)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_an_attention_kernel_is_one_models_own(folders: dict[str, Path], family: str) -> None:
    plain, other = opened(folders, family), opened(folders, family, attention="_native_flash")
    kernels = [_kernels(engine) for engine in (plain, other)]
    assert "_native_flash" in kernels[1]
    assert kernels[0] <= {"native"}  # Z-Image's blocks for the CPU have no choice
    assert apart(drawn(other, shapes()[3]), drawn(plain, shapes()[3])) <= 1


def test_a_kernel_that_takes_no_masks_leaves_those_to_torch(folders: dict[str, Path]) -> None:
    plain, flash = opened(folders, "z-image"), opened(folders, "z-image", attention="_native_flash")
    for specs in shapes():
        assert apart(drawn(flash, specs), drawn(plain, specs)) <= 1


def _kernels(engine: Engine) -> set[str]:
    """Of all attention modules; Z-Image's keep another for where there is no mask."""
    processors = [getattr(module, "processor", None) for module in family_of(engine)._modules.denoiser.modules()]
    chosen = [getattr(processor, "_without_masks", processor) for processor in processors if processor is not None]
    return {processor._attention_backend.value for processor in chosen}


def test_an_attention_kernel_that_is_not_installed_or_does_not_work_here_is_told_as_the_model_loads(
    folders: dict[str, Path],
) -> None:
    with pytest.raises(ModelCardError, match=r"model sketch: attention flash cannot be used here: .*flash-attn"):
        opened(folders, "qwen-image", attention="flash")
    with pytest.raises(
        ModelCardError,
        match=r"with attention _native_cudnn it cannot be drawn on cpu: .*; take it out .* a new name",
    ):
        opened(folders, "z-image", attention="_native_cudnn")


@pytest.fixture(params=["z-image", "qwen-image"])
def cached(request: pytest.FixtureRequest) -> str:
    """A family that has a first-block cache."""
    return str(request.param)


def test_a_first_block_cache_leaves_blocks_out(folders: dict[str, Path], cached: str) -> None:
    plain, leaves_out = (opened(folders, cached, batch=1, **how) for how in ({}, {"first_block_cache": 1e6}))
    exact = opened(folders, cached, batch=1, first_block_cache=1e-12)
    guided = [spec(0, SHORT, guidance_scale=4.0, num_inference_steps=6)]
    counts = [_runs_of_the_last_block(engine) for engine in (plain, leaves_out, exact)]
    pictures = [drawn(engine, guided) for engine in (plain, leaves_out, exact)]
    passes = 2 if cached == "qwen-image" else 1  # with and without the prompt, one after the other or together
    assert [len(count) for count in counts] == [6 * passes, passes, 6 * passes]
    assert not same(pictures[1], pictures[0])
    assert same(pictures[2], pictures[0])


def _runs_of_the_last_block(engine: Engine) -> list[bool]:
    runs: list[bool] = []
    denoiser: Any = family_of(engine)._modules.denoiser
    last = denoiser.transformer_blocks[-1].attn if hasattr(denoiser, "transformer_blocks") else denoiser.layers[-1]
    last.register_forward_pre_hook(lambda module, given: runs.append(True))
    return runs


def test_the_blocks_for_a_cpu_are_left_out_like_any_other(folders: dict[str, Path]) -> None:
    engine = opened(folders, "z-image", batch=1, first_block_cache=0.1)
    assert {type(block).__name__ for block in family_of(engine)._modules.denoiser.layers} == {"PackedBlock"}


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_qwen_image_is_drawn_as_with_diffusers_hooks(folders: dict[str, Path], guidance: float) -> None:
    ours, theirs = opened(folders, "qwen-image", batch=1, first_block_cache=0.35), opened(folders, "qwen-image")
    apply_first_block_cache(family_of(theirs)._modules.denoiser, FirstBlockCacheConfig(threshold=0.35))
    specs = [spec(0, SHORT, guidance_scale=guidance, num_inference_steps=8)]
    runs = _runs_of_the_last_block(ours)
    assert same(drawn(ours, specs), drawn(theirs, specs))
    assert 1 < len(runs) < 8 * (2 if guidance else 1)


def test_a_picture_is_cut_into_without_a_trace_in_its_first_block_cache(folders: dict[str, Path], cached: str) -> None:
    engine = opened(folders, cached, batch=1, first_block_cache=1e6)
    outer = [spec(i, text, guidance_scale=4.0, num_inference_steps=4) for i, text in enumerate((SHORT, LONG))]
    inner = engine.batches([spec(9, "a star", width=96, num_inference_steps=4)])[0]
    before, alone = drawn(engine, outer), drawn(engine, inner.specs)
    within: list[Picture] = []
    assert same(_disturbed(engine, outer, inner, within), before)
    assert len(within) == 2 * (4 + 1)  # after each step, and after decoding
    assert same([picture.pixels.astype(int) for picture in within], alone * len(within))


def test_blocks_that_are_left_out_may_be_compiled(
    folders: dict[str, Path], cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.models.acceleration.COMPILER", CAPTURED)
    both = opened(folders, cached, batch=1, first_block_cache=1e6, compile=True)
    one = opened(folders, cached, batch=1, first_block_cache=1e6)
    specs = [spec(0, SHORT, guidance_scale=4.0, num_inference_steps=6)]
    runs = _runs_of_the_last_block(one)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = drawn(both, specs)
    assert apart(found, drawn(one, specs)) <= 1
    assert len(runs) == (2 if cached == "qwen-image" else 1)


def test_nothing_of_a_cancelled_batch_stays_in_a_first_block_cache(folders: dict[str, Path], cached: str) -> None:
    engine = opened(folders, cached, batch=1, first_block_cache=1e6)
    one, other = spec(0, SHORT, guidance_scale=4.0), spec(1, LONG, width=96, guidance_scale=4.0)
    before = drawn(engine, [one])
    steps = iter((False, False, True))
    with pytest.raises(CancelledError):
        engine.render_batch(
            engine.batches([other])[0],
            on_picture=lambda picture: None,
            on_step=lambda step: None,
            cancelled=lambda: next(steps),
        )
    assert same(drawn(engine, [one]), before)
