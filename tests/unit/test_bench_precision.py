from pathlib import Path

import pytest

from farm.bench.precision import FIGURES, Row, _row, table, variants_of, write_page
from farm.bench.quality import drawn, judged, open_engine, specs_of
from farm.devices import local_device
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
    for name in ("float32", "GGUF Q8_0", "GGUF Q4_0"):
        engine = open_engine(found[name].card, local_device(), vram_gib=16.0)
        engine.load()
        pictures[name] = drawn(engine, specs)
        engine.unload()
    close, far = (_row(name, 0.0, pictures[name], pictures["float32"], 1.0, 1.0) for name in ("GGUF Q8_0", "GGUF Q4_0"))
    assert 0 < close.apart < 0.2
    assert close.apart < far.apart < 4
    assert close.psnr_db is not None
    assert close.psnr_db > 50
    rights = [judged(pictures[name]).right for name in pictures]
    assert rights[0] >= 10
    assert rights[1] == rights[0]
    assert rights[2] >= rights[0] - 2


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
