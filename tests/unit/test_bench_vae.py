from pathlib import Path

import pytest
import torch

from farm.bench.vae import FIGURES, Decoded, measure, table, write_page
from tests.tiny_qwen import tiny_vae

MIB = 2**20
ROWS = [Decoded(128, 6.0, 2.5, 400 * MIB, 100 * MIB, apart=2e-6, spread=0.25)]


def test_the_table_has_times_their_ratio_memory_and_how_far_floats_are_apart() -> None:
    assert table(ROWS).splitlines()[2] == "| 128×128 | 6.00 | 2.50 | 2.40× | 400 | 100 | 2.0e-06 | 0.25 |"


def test_both_decoders_are_timed_on_latents_of_each_size_and_agree_but_for_rounding() -> None:
    threads = torch.get_num_threads()
    rows = measure(tiny_vae(), sizes=(32, 64), rounds=1)
    assert [row.side for row in rows] == [32, 64]
    assert all(row.stock_s > 0 and row.folded_s > 0 for row in rows)
    assert all(row.apart < 1e-4 < row.spread for row in rows)
    assert torch.get_num_threads() == threads


def test_the_page_keeps_what_stands_above_its_mark(tmp_path: Path) -> None:
    page = tmp_path / "vae.md"
    page.write_text(f"# Words\n\n{FIGURES}\n\nold figures\n", encoding="utf-8")
    write_page(page, ROWS, millions=126.9, rounds=3)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Words\n\n{FIGURES}\n\n20")
    assert "old figures" not in text
    assert "127 million random weights, float32, one thread; medians of 3 rounds in turn." in text
    assert text.endswith(f"{table(ROWS)}\n")


def test_a_page_without_its_mark_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "vae.md"
    page.write_text("# Words\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"has no line '<!-- figures"):
        write_page(page, ROWS, millions=1.0, rounds=1)
