"""Placements by estimated sizes of real models."""

import pytest

from farm.errors import PlacementError
from farm.placement import ALL, DRAWING, DeviceLimits, Needs, place

Z_IMAGE = Needs(encoder_gib=7.49, denoiser_gib=11.46, decoder_gib=0.16, step_gib=0.5, decode_gib=1.5)
SKETCH = Needs(encoder_gib=0.001, denoiser_gib=0.005, decoder_gib=0.001, step_gib=0.01, decode_gib=0.1)
QWEN = Needs(encoder_gib=13.17, denoiser_gib=38.05, decoder_gib=0.25, step_gib=0.4, decode_gib=3.4)


def gpu(vram_gib: float, total_gib: float | None = None, capability: tuple[int, int] = (8, 9)) -> DeviceLimits:
    return DeviceLimits("cuda", "a card", vram_gib, total_gib or vram_gib, capability)


def test_a_small_model_stays_on_the_device_whole() -> None:
    placed = place("sketch", SKETCH, dtype="float32", device=gpu(16))
    assert (placed.layout, placed.encode, placed.denoise, placed.decode) == ("resident", ALL, ALL, ALL)


def test_z_image_is_phased_on_16_gib_and_resident_on_24() -> None:
    placed = place("z-image-turbo", Z_IMAGE, dtype="bfloat16", device=gpu(16))
    assert (placed.layout, placed.encode, placed.denoise) == ("phased", frozenset({"encoder"}), DRAWING)
    assert placed.peak_gib == pytest.approx(13.12)
    assert placed.reason == "the text encoder by itself: 13.1 GiB of 15.0 usable"
    assert place("z-image-turbo", Z_IMAGE, dtype="bfloat16", device=gpu(24)).layout == "resident"


def test_the_budget_holds_on_a_larger_card_and_the_card_within_a_larger_budget() -> None:
    assert place("z-image-turbo", Z_IMAGE, dtype="bfloat16", device=gpu(16, 80)).layout == "phased"
    assert place("z-image-turbo", Z_IMAGE, dtype="bfloat16", device=gpu(80, 16)).layout == "phased"


def test_one_part_at_a_time_where_denoiser_and_decoder_do_not_fit_together() -> None:
    placed = place("z-image-turbo", Z_IMAGE, dtype="bfloat16", device=gpu(13.5))
    assert (placed.denoise, placed.decode) == (frozenset({"denoiser"}), frozenset({"decoder"}))
    assert placed.peak_gib == pytest.approx(11.96)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlacementError) as caught:
        place("qwen-image", QWEN, dtype="bfloat16", device=gpu(16))
    assert caught.value.message == (
        "model qwen-image does not fit a card: its largest phase needs 38.4 GiB (text encoder 13.2, denoiser 38.0 + "
        "0.4 a step, decoder 0.2 + 3.4 a decode) and 15.0 GiB may be used; lower the card's batch or sizes, or raise "
        "FARM_VRAM_GIB on a larger GPU"
    )


def test_bfloat16_is_refused_on_a_card_that_only_emulates_it() -> None:
    with pytest.raises(PlacementError, match=r"compute capability 7\.5, which only emulates it"):
        place("sketch", SKETCH, dtype="bfloat16", device=gpu(16, capability=(7, 5)))
    assert place("sketch", SKETCH, dtype="float32", device=gpu(16, capability=(7, 5))).layout == "resident"


def test_a_cpu_is_always_resident() -> None:
    assert place("qwen-image", QWEN, dtype="float32", device=DeviceLimits("cpu", "the CPU", 16)).layout == "resident"
