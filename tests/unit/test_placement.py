"""Placements by the measured sizes of real models (GiB in bfloat16)."""

from dataclasses import replace
from typing import Any

import pytest

from farm.errors import PlacementError
from farm.placement import ALL, DENOISER, DRAWING, ENCODER, NONE, DeviceLimits, Needs, Placement, place

SKETCH = Needs(encoder_gib=0.001, denoiser_gib=0.005, decoder_gib=0.001, step_gib=0.01, decode_gib=0.1)
Z_IMAGE = Needs(7.49, 11.46, 0.16, 0.53, 1.52, encoder_streamed_gib=1.1, denoiser_streamed_gib=1.2, pixels=2**20)
NEWBIE = Needs(8.27, 6.49, 0.16, 0.68, 1.52, pixels=2**20)
QWEN = Needs(13.17, 38.05, 0.24, 0.4, 1.51, pixels=2**20, denoiser_q4_gib=12.2)
QWEN_Q4 = Needs(13.17, 12.2, 0.24, 0.8, 1.51, inner_step_gib=0.8, inner_decode_gib=1.51, pixels=2**20)


def gpu(vram_gib: float, total_gib: float | None = None, capability: tuple[int, int] = (8, 9)) -> DeviceLimits:
    return DeviceLimits("cuda", "a card", vram_gib, total_gib or vram_gib, capability)


def placed(needs: Needs, vram_gib: float) -> Placement:
    return place("some", needs, dtype="bfloat16", device=gpu(vram_gib))


def refusal(needs: Needs, device: DeviceLimits) -> str:
    with pytest.raises(PlacementError) as caught:
        place("some", needs, dtype="bfloat16", device=device)
    return caught.value.message


def test_a_small_model_stays_on_the_device_whole() -> None:
    found = place("sketch", SKETCH, dtype="float32", device=gpu(16))
    assert (found.layout, found.encode, found.denoise, found.decode) == ("resident", ALL, ALL, ALL)
    assert (found.within, found.encodes_ahead) == ("anything", False)


def test_z_image_is_phased_on_16_gib_and_resident_on_24() -> None:
    found = placed(Z_IMAGE, 16)
    assert (found.layout, found.encode, found.denoise, found.encodes_ahead) == ("phased", ENCODER, DRAWING, True)
    assert found.peak_gib == pytest.approx(13.14)
    assert found.explained == (
        "phased: text encoder 7.5 GiB in for the prompts, then denoiser 11.5 GiB stays, decode 1.5 GiB, batch 1, 13.1 of "
        "15.0 GiB; urgent images: within a step once encoded, else at the end of the batch"
    )
    whole = placed(Z_IMAGE, 24)
    assert whole.explained == (
        "resident: all parts stay (text encoder 7.5 GiB, denoiser 11.5, decoder 0.2), decode 1.5 GiB, batch 1, 20.6 of "
        "23.0 GiB; urgent images: within a step"
    )


def test_qwen_image_2512_as_q4_k_m_fits_15_gib_phased_at_1024() -> None:
    found = placed(QWEN_Q4, 16)
    assert (found.layout, found.encode, found.denoise, found.decode) == ("phased", ENCODER, DRAWING, DRAWING)
    assert (found.within, found.reserves) == ("encoded", True)
    assert found.peak_gib <= 15.0
    assert "text encoder 13.2 GiB in for the prompts, then denoiser 12.2 GiB stays, decode 1.5 GiB" in found.reason


def test_qwen_image_2512_fits_16_gib_at_its_largest_size_too() -> None:
    largest = replace(QWEN_Q4, encoder_gib=4.43, denoiser_gib=12.3, decoder_gib=0.05, step_gib=1.08, decode_gib=2.54)
    found = placed(replace(largest, inner_step_gib=1.08, inner_decode_gib=2.54), 16)
    assert (found.layout, found.denoise, found.within) == ("phased", DRAWING, "encoded")
    assert found.peak_gib == pytest.approx(14.89)


def test_room_is_left_for_fragments() -> None:
    def denoiser_alone(gib: float) -> Placement:
        return placed(Needs(0.0, gib, 0.0, 0.0, 0.0, encode_gib=0.0), 16)

    assert denoiser_alone(14.89).peak_gib == 14.89
    with pytest.raises(
        PlacementError, match=r"largest phase needs 14\.9 GiB .* and 14\.9 GiB may be used; .* GPU of 16\.5 GiB"
    ):
        denoiser_alone(14.95)
    assert placed(replace(SKETCH, inner_decode_gib=14.98), 16).reserves is False


@pytest.mark.parametrize(
    ("needs", "layouts"),
    [
        (Z_IMAGE, ("streamed", "phased", "resident")),
        (NEWBIE, ("phased", "phased", "resident")),
        (replace(QWEN_Q4, denoiser_streamed_gib=0.6, encoder_streamed_gib=1.4), ("streamed", "phased", "phased")),
    ],
    ids=["z-image", "newbie", "qwen-image as Q4_K_M"],
)
def test_each_card_of_a_mixed_pool_has_a_placement_of_its_own(needs: Needs, layouts: tuple[str, ...]) -> None:
    assert tuple(placed(needs, gib).layout for gib in (12, 16, 24)) == layouts
    assert all(placed(needs, gib).peak_gib <= gib - 1 for gib in (12, 16, 24))


def test_the_budget_holds_on_a_larger_card_and_the_card_within_a_larger_budget() -> None:
    for device in (gpu(16, 80), gpu(80, 16)):
        assert place("z-image-turbo", Z_IMAGE, dtype="bfloat16", device=device).layout == "phased"


def test_a_small_encoder_comes_in_beside_the_others_where_only_a_decode_needs_its_room() -> None:
    found = placed(replace(Z_IMAGE, encoder_gib=2.4), 16)
    assert (found.layout, found.encode, found.denoise, found.within) == ("phased", ALL, DRAWING, "encoded")
    assert "text encoder 2.4 GiB beside the others for the prompts, denoiser 11.5 GiB stays" in found.reason


def test_one_part_at_a_time_where_denoiser_and_decoder_do_not_fit_together() -> None:
    found = placed(Z_IMAGE, 13.5)
    assert (found.denoise, found.decode, found.within) == (DENOISER, frozenset({"decoder"}), "nothing")
    assert found.peak_gib == pytest.approx(11.99)


def test_blocks_are_streamed_only_where_nothing_else_fits() -> None:
    found = placed(Z_IMAGE, 12)
    assert (found.layout, found.streamed, found.within) == ("streamed", DENOISER, "nothing")
    assert found.reason == (
        "text encoder 7.5 GiB, denoiser block by block, 1.2 of 11.5 GiB at a time, decode 1.5 GiB, batch 1, 7.7 of 11.0 GiB"
    )
    both = placed(Z_IMAGE, 8)
    assert (both.layout, both.streamed) == ("streamed", ENCODER | DENOISER)
    encoder = placed(replace(NEWBIE, encoder_gib=20.0, encoder_streamed_gib=1.0), 16)
    assert (encoder.layout, encoder.streamed, encoder.denoise, encoder.within) == (
        "streamed",
        ENCODER,
        DRAWING,
        "encoded",
    )


def test_an_encoder_on_the_cpu_lets_urgent_images_in_within_a_step() -> None:
    found = placed(replace(QWEN_Q4, encoder_on_cpu=True), 16)
    assert (found.encode, found.denoise, found.on_cpu) == (DRAWING, DRAWING, ENCODER)
    assert (found.within, found.encodes_ahead) == ("anything", False)
    assert found.explained.startswith(
        "phased: text encoder 13.2 GiB on the CPU, denoiser 12.2 GiB stays, decode 1.5 GiB"
    )
    assert found.explained.endswith("urgent images: within a step")


def test_an_urgent_image_needs_room_for_its_own_decode_within_a_step() -> None:
    found = placed(replace(QWEN_Q4, inner_decode_gib=3.4), 16)
    assert (found.layout, found.reserves, found.within) == ("phased", False, "nothing")
    assert found.explained.endswith("urgent images: at the end of the batch")
    larger = placed(replace(QWEN_Q4, inner_decode_gib=2.4), 16)
    assert (larger.within, larger.peak_gib) == ("encoded", pytest.approx(14.84))
    beside = placed(replace(QWEN_Q4, inner_decode_gib=2.3, kept_gib=0.1), 16)
    assert (beside.within, beside.peak_gib) == ("encoded", pytest.approx(14.84))
    assert placed(replace(QWEN_Q4, inner_decode_gib=2.3, kept_gib=1.1), 16).within == "nothing"


def test_what_cannot_fit_is_refused_with_the_numbers_and_the_nearest_that_would() -> None:
    assert refusal(QWEN, gpu(16)) == (
        "model some does not fit a card: its largest phase needs 38.4 GiB (text encoder 13.2, denoiser 38.0 + 0.4 a step of "
        "batch 1, decoder 0.2 + 1.5 a decode) and 14.9 GiB may be used; nearest that fits: a card with a GGUF denoiser (as "
        "Q4_K_M about 12.2 GiB), or a GPU of 40 GiB with FARM_VRAM_GIB=40"
    )


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"batch": 8, "step_gib": 8 * 0.53}, "nearest that fits: a batch of 2, or"),
        ({"decode_gib": 9 * 1.52, "pixels": 9 * 2**20}, "nearest that fits: pictures of 2944x2944, or"),
        (
            {"decode_gib": 9 * 1.52, "limit_pixels": 9 * 2**20},
            f"nearest that fits: a card with limits: {{max_pixels: {2944**2}}}, or",
        ),
        ({"batch": 8, "step_gib": 0.9 + 8 * 0.53, "fixed_step_gib": 0.9}, "nearest that fits: a batch of 1, or"),
        (
            {"encoder_gib": 20.0, "encoder_streamed_gib": None, "encoder_q4_gib": 6.0, "encoder_moves": True},
            "nearest that fits: a card with options: {encoder_on: cpu}, or a card with quantise: {encoder: nf4}, or",
        ),
        (
            {"encoder_gib": 20.0, "encoder_streamed_gib": None, "encoder_q4_gib": 13.0},
            "nearest that fits: a GPU of 21.5 GiB",
        ),
    ],
)
def test_the_nearest_is_a_smaller_batch_a_smaller_size_or_a_smaller_encoder(
    changes: dict[str, Any], nearest: str
) -> None:
    needs = replace(Z_IMAGE, denoiser_streamed_gib=None, **changes)
    assert nearest in refusal(needs, gpu(14))


def test_the_nearest_gpu_is_the_least_that_fits_in_any_layout() -> None:
    needs = replace(QWEN_Q4, encoder_gib=4.43, denoiser_streamed_gib=0.6, encoder_moves=True)
    said = refusal(needs, gpu(4))
    assert said.endswith(
        "2.9 GiB may be used; nearest that fits: a card with options: {encoder_on: cpu}, or a GPU of "
        "6 GiB with FARM_VRAM_GIB=6"
    )
    assert "its largest phase needs 4.7 GiB (text encoder 4.4, denoiser 12.2, 0.6 block by block + 0.8 a step" in said
    assert placed(needs, 6).layout == placed(replace(needs, encoder_on_cpu=True), 4).layout == "streamed"
    with pytest.raises(PlacementError):
        placed(needs, 5.5)
    assert "and 0.0 GiB may be used; nearest that fits: a GPU of 6 GiB" in refusal(needs, gpu(0.5))


def test_a_decode_at_the_cards_limit_is_said_to_be() -> None:
    found = placed(replace(Z_IMAGE, limit_pixels=1_763_584), 16)
    assert "decode 1.5 GiB at the card's limit of 1,763,584 pixels, batch 1, " in found.reason
    several = placed(replace(Z_IMAGE, limit_pixels=1_763_584, batch=2), 16)
    assert "decode 1.5 GiB and steps at the card's limit of 1,763,584 pixels, batch 2, " in several.reason


def test_an_accelerated_model_that_would_fit_block_by_block_without_is_told_so() -> None:
    needs = replace(Z_IMAGE, denoiser_streamed_gib=None, plain_streamed_gib=1.2)
    without = "the card without compile or first_block_cache, whose blocks then come one by one"
    assert f"nearest that fits: {without}" in refusal(needs, gpu(12))
    assert without not in refusal(replace(needs, plain_streamed_gib=11.0), gpu(12))


def test_host_copies_of_all_renderers_of_a_node_must_fit_its_memory() -> None:
    node = replace(gpu(16), host_gib=64.0, renderers=2)
    found = place("some", Z_IMAGE, dtype="bfloat16", device=node)
    assert (found.host_gib, found.pins) == (pytest.approx(19.11), False)
    assert place("some", Z_IMAGE, dtype="bfloat16", device=replace(node, host_gib=128.0)).pins
    assert refusal(Z_IMAGE, replace(node, renderers=4)) == (
        "model some on a card keeps 19.1 GiB of weights in main memory for each renderer, 4 of them 76.4 GiB, and of the "
        "node's 64.0 GiB they may take 54.4; start 2 with FARM_RENDERERS=2"
    )
    assert refusal(Z_IMAGE, replace(node, host_gib=16.0)).endswith("13.6; add memory, or choose a quantised card")


def test_a_resident_model_needs_no_host_copies_and_keeps_them_where_there_is_room() -> None:
    node = replace(gpu(24), host_gib=16.0)
    found = place("some", Z_IMAGE, dtype="bfloat16", device=node)
    assert (found.layout, found.host_gib) == ("resident", 0.0)
    roomy = place("some", Z_IMAGE, dtype="bfloat16", device=replace(node, host_gib=64.0))
    assert (roomy.layout, roomy.host_gib, roomy.pins) == ("resident", pytest.approx(19.11), False)


def test_bfloat16_is_refused_on_a_card_that_only_emulates_it() -> None:
    assert "compute capability 7.5, which only emulates it" in refusal(SKETCH, gpu(16, capability=(7, 5)))
    assert place("sketch", SKETCH, dtype="float32", device=gpu(16, capability=(7, 5))).layout == "resident"


def test_a_cpu_is_resident_as_far_as_its_memory_goes() -> None:
    cpu = DeviceLimits("cpu", "the CPU", 16)
    found = place("qwen-image", QWEN, dtype="float32", device=cpu)
    assert (found.layout, found.streamed, found.within) == ("resident", NONE, "anything")
    assert found.explained == "resident: 51.5 GiB in main memory, batch 1; urgent images: within a step"
    assert "51.5 GiB of weights in main memory" in refusal(QWEN, replace(cpu, host_gib=32.0))
