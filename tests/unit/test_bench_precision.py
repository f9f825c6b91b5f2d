from pathlib import Path

import pytest

from farm.bench.precision import FIGURES, Row, _engine, _megabytes, _row, table, variants_of, write_page
from farm.bench.quality import drawn, judged, specs_of
from farm.modelcard import find_card
from farm.settings import Settings
from farm.sketch.adherence import unseen_prompts

ROWS = [
    Row("float32", 9.9, 19, 20, 0.76, 0.99, 20, 0.0, None, 0.04, 1.0),
    Row("GGUF Q4_0", 2.63, 18, 20, 0.70, 0.97, 0, 1.33, 42.6, 0.08, 2.0),
]


def test_a_quantised_denoiser_draws_what_the_reference_draws(tmp_path: Path) -> None:
    """Weights that came out wrong draw noise, which no judge takes for anything."""
    card = find_card("sketch", Settings())
    found = {variant.name: variant for variant in variants_of(card, tmp_path, Settings())}
    specs = specs_of(unseen_prompts(12), card.defaults)
    pictures = {}
    for name in ("float32", "GGUF Q8_0", "GGUF Q4_0", "nf4", "text encoder nf4"):
        engine = _engine(found[name], Settings())
        engine.load()
        pictures[name] = drawn(engine, specs)
        engine.unload()
    rows = {name: _row(name, 0.0, pictures[name], pictures["float32"], 1.0, 1.0) for name in pictures}
    close, far = rows["GGUF Q8_0"], rows["GGUF Q4_0"]
    assert 0 < close.apart < 0.2
    assert close.apart < far.apart < 4
    assert close.apart < rows["nf4"].apart < 4
    assert 0 < rows["text encoder nf4"].apart < 1
    assert close.psnr_db is not None
    assert close.psnr_db > 50
    rights = {name: judged(pictures[name]).right for name in pictures}
    assert rights["float32"] >= 10
    assert rights["GGUF Q8_0"] == rights["float32"]
    assert min(rights.values()) >= rights["float32"] - 2


def test_the_size_of_a_row_is_that_of_the_part_that_is_another(tmp_path: Path) -> None:
    found = {each.name: each for each in variants_of(find_card("sketch", Settings()), tmp_path, Settings())}
    expected = {"float32": 9.9, "nf4": 2.64, "int8": 2.57, "text encoder nf4": 0.16}
    assert {name: round(_megabytes(found[name], Settings()), 2) for name in expected} == expected


def test_the_table_tells_what_is_equal_and_how_far_others_are() -> None:
    lines = table(ROWS).splitlines()
    assert lines[2] == "| float32 | 9.90 | 95.0 | 76–99 | 20 of 20 | 0.00 | — | 1.00× |"
    assert lines[3] == "| GGUF Q4_0 | 2.63 | 90.0 | 70–97 | 0 of 20 | 1.33 | 42.6 | 2.00× |"


def test_the_page_keeps_what_stands_above_its_mark(tmp_path: Path) -> None:
    page = tmp_path / "precision.md"
    page.write_text(f"# Words\n\n{FIGURES}\n\nold figures\n", encoding="utf-8")
    write_page(page, ROWS)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Words\n\n{FIGURES}\n\n20")
    assert "old figures" not in text
    assert "40 ms an image in float32" in text
    page.write_text("# Words\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"has no line '<!-- figures"):
        write_page(page, ROWS)
