import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from farm.fonts import Fonts
from farm.sheet import FAILED, Tile, draw_sheet, spread
from tests.tiny_font import tiny_font
from tests.unit.finished_jobs import make_ledger, make_plan, make_row, picture_bytes


def tiles_of(tmp_path: Path, count: int) -> list[Tile]:
    ledger, plan = make_ledger(tmp_path), make_plan(rows=count, seeds=1)
    return [Tile(make_row(ledger, plan, index), picture_bytes(index)) for index in range(count)]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_a_small_job_is_shown_whole_and_a_large_one_spread_over_its_length() -> None:
    assert spread(60) == list(range(60))
    chosen = spread(10_000_000)
    assert len(chosen) == len(set(chosen)) == 48
    assert chosen == sorted(chosen)
    assert chosen[0] < 10_000_000 / 48
    assert chosen[-1] >= 10_000_000 * 47 / 48


def test_the_spread_does_not_show_the_same_seed_of_every_prompt() -> None:
    assert len({index % 10 for index in spread(480)}) > 5


def test_a_small_picture_is_enlarged(tmp_path: Path) -> None:
    drawn = opened(draw_sheet("job", "1 image", tiles_of(tmp_path, 1)))
    colour = opened(picture_bytes(0)).getpixel((60, 60))
    assert sum(1 for pixel in drawn.get_flattened_data() if pixel == colour) > 100 * 100


def test_a_failed_image_is_a_grey_tile(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan()
    drawn = opened(draw_sheet("job", "1 image", [Tile(make_row(ledger, plan, 0, failed=True), None)]))
    grey = tuple(int(FAILED[at : at + 2], 16) for at in (1, 3, 5))
    assert sum(1 for pixel in drawn.get_flattened_data() if pixel == grey) > 10_000


def test_a_sheet_of_any_prompt_and_shape_is_drawn(tmp_path: Path) -> None:
    prompts = [
        "",
        "word " * 500,
        "x" * 3000,
        "y" * 2_000_000,
        "一只红色的圆在白色背景上",
        "a\nb\tc",
        "\u0000\u200b🎨",
        "עברית",
    ]
    tiles = [
        Tile(replace(tile.row, prompt=prompt, width=[64, 1344][at % 2], negative_prompt="n" * at), tile.picture)
        for at, (prompt, tile) in enumerate(zip(prompts, tiles_of(tmp_path, len(prompts)), strict=True))
    ]
    assert opened(draw_sheet("job " * 200, "said", tiles)).width <= 1700


def test_a_sheet_is_drawn_without_any_font_installed(tmp_path: Path) -> None:
    assert opened(draw_sheet("job", "2 images", tiles_of(tmp_path, 2), fonts=Fonts(()))).height > 200


def test_a_prompt_in_chinese_is_drawn_in_a_font_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "Squares.ttf").write_bytes(tiny_font("国"))
    tiles = [replace(tile, row=replace(tile.row, prompt="国国国")) for tile in tiles_of(tmp_path, 1)]
    dark = []
    for fonts in (Fonts([str(tmp_path / "fonts")]), Fonts(())):
        drawn = draw_sheet("job", "1 image", tiles, fonts=fonts)
        assert draw_sheet("job", "1 image", tiles, fonts=fonts) == drawn
        words = opened(drawn).convert("L")
        dark.append(sum(1 for pixel in words.get_flattened_data() if pixel < 60))
    assert dark[0] - dark[1] > 3 * 8 * 8  # three solid squares of 13 px, and thin boxes where nothing draws them
