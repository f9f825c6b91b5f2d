from pathlib import Path

import pytest

from farm.bench.figures import wilson
from farm.bench.quality import FIGURES, RESPECTS, Setting, table, write_page


def setting(steps: int, guidance: float, right: int) -> Setting:
    low, high = wilson(right, 100)
    return Setting(steps, guidance, right, 100, low, high, 0.01 * steps, dict.fromkeys(RESPECTS, right / 100))


ROWS = [setting(4, 0.0, 50), setting(8, 0.0, 90), setting(4, 2.0, 40), setting(8, 2.0, 95)]


def test_the_table_has_shares_intervals_and_times() -> None:
    lines = table(ROWS).splitlines()
    assert lines[0] == (
        "| guidance | steps | right, % | 95 % interval | background, % | colours, % | count, % | places, % | shapes, % "
        "| ms an image |"
    )
    assert lines[2] == "| 0 | 4 | 50 | 40–60 | 50 | 50 | 50 | 50 | 50 | 40 |"
    assert lines[5] == "| 2 | 8 | 95 | 89–98 | 95 | 95 | 95 | 95 | 95 | 80 |"


def test_the_page_keeps_what_stands_above_its_mark(tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    page.write_text(f"# Words\n\n{FIGURES}\n\nold figures\n", encoding="utf-8")
    write_page(page, ROWS, ceiling=0.995)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Words\n\n{FIGURES}\n\n20")
    assert "old figures" not in text
    assert "The judge finds 99.5 % of 2,000 drawings right." in text
    assert (tmp_path / "quality.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_page_without_its_mark_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    page.write_text("# Words\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"has no line '<!-- figures"):
        write_page(page, ROWS, ceiling=1.0)
