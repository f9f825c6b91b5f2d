from pathlib import Path

import pytest

from farm.bench.caches import FIGURES, Row, measure, table, write_page

ROWS = [
    Row(8, "all blocks", None, 19, 20, 0.76, 0.99, 20, None, 0.0, 0.05, 1.0),
    Row(8, "cache, 0.1", 0.1, 18, 20, 0.70, 0.97, 4, 63.84, 0.104, 0.046, 0.93),
    Row(8, "6 steps", None, 19, 20, 0.76, 0.99, 0, 51.3, 0.25, 0.038, 0.77),
    Row(16, "all blocks", None, 20, 20, 0.84, 1.0, 20, None, 0.0, 0.1, 1.0),
]
KERNELS = [Row(8, "native", None, 19, 20, 0.76, 0.99, 20, None, 0.0, 0.08, 1.0)]


@pytest.fixture(scope="module")
def measured() -> tuple[list[Row], list[Row]]:
    return measure(prompts=6, steps=(8,), thresholds=(1e-9, 0.15, 1e6))


def test_a_cache_leaves_out_more_and_strays_further_the_higher_its_threshold(
    measured: tuple[list[Row], list[Row]],
) -> None:
    rows = {row.way: row for row in measured[0]}
    assert list(rows) == ["all blocks", "cache, 1e-09", "cache, 0.15", "cache, 1e+06", "7 steps", "6 steps", "4 steps"]
    whole, none, some, most = (rows[way] for way in list(rows)[:4])
    for row in (whole, none):
        assert (row.equal, row.psnr_db, row.left_out, row.right) == (6, None, 0.0, 6)
    assert most.left_out == pytest.approx(7 / 8 * 5 / 6)  # all but the first step's, and of each its first block
    assert 0 < some.left_out < most.left_out
    assert (some.psnr_db or 0) > 30 > (most.psnr_db or 0) > 0
    assert some.right > most.right
    assert most.ratio > 0
    assert [rows[way].left_out for way in ("7 steps", "6 steps", "4 steps")] == [0.125, 0.25, 0.5]
    assert {row.of for row in rows.values()} == {6}


def test_kernels_that_run_here_are_measured_against_torchs_choice(measured: tuple[list[Row], list[Row]]) -> None:
    native, *others = measured[1]
    assert (native.way, native.ratio, native.equal) == ("native", 1.0, 6)
    assert all((row.psnr_db or 99) > 60 and row.left_out == 0 for row in others)
    assert "_native_flash" in {row.way for row in others}


def test_the_table_tells_what_is_left_out_and_what_that_comes_to() -> None:
    lines = table(ROWS).splitlines()
    assert lines[2] == "| 8 | all blocks | 95.0 | 76–99 | 20 of 20 | — | 0 | 1.00× |"
    assert lines[3] == "| 8 | cache, 0.1 | 90.0 | 70–97 | 4 of 20 | 63.8 | 10 | 0.93× |"


def test_the_page_keeps_what_stands_above_its_mark(tmp_path: Path) -> None:
    page = tmp_path / "caches.md"
    page.write_text(f"# Words\n\n{FIGURES}\n\nold figures\n", encoding="utf-8")
    write_page(page, ROWS, KERNELS)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Words\n\n{FIGURES}\n\n20")
    assert "old figures" not in text
    assert "All blocks, an image: 8 steps 50 ms, 16 steps 100 ms." in text
    assert "over the layers of diffusers at 8 steps:" in text
    assert (tmp_path / "caches.svg").read_text(encoding="utf-8").startswith("<?xml")
    page.write_text("# Words\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"has no line '<!-- figures"):
        write_page(page, ROWS, KERNELS)
