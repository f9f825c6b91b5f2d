"""Draw a contact sheet: pictures of a job with the prompt, seed and varying parameters under each.

Knows nothing of stores: pictures come as bytes. Small pictures are enlarged to a size that an eye can judge, large
ones made smaller; every tile has the same box. A failed image is a grey tile that says why.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from farm.receipt import ImageRow

TILES_SPREAD = 48  # of a large job
TILES_ALL = 60  # a job of up to this many images is shown whole

# Fonts that draw Latin and CJK both, then Latin alone; Pillow's own where none is installed.
FONT_FILES = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
)
FONT_FOLDERS = (
    "~/.local/share/fonts",
    "~/.fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
CJK_FILES = frozenset(FONT_FILES[: FONT_FILES.index("DejaVuSans.ttf")])

BACKGROUND = "#f6f6f4"
TILE = "#ffffff"
EDGE = "#dcdcd8"
INK = "#1d1d1b"
FAINT = "#73736e"
FAILED = "#cfcfcb"
WARNING = "#a33a2a"

WIDTH = 1616
MARGIN = 28
GAP = 16
PAD = 10
PROMPT_LINES = 4
PROMPT_SIZE = 14
DETAIL_SIZE = 12
DETAIL_LINES = 3
TITLE_SIZE = 24
LINE_CHARACTERS = 1000
"""More than fit on any line: what of a text lies beyond is not measured, since Pillow refuses a text of megabytes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of the sheet. `picture`: the file's bytes, or None where the image failed or could not be read."""

    row: ImageRow
    picture: bytes | None


def spread(images: int, *, tiles: int = TILES_SPREAD, all_below: int = TILES_ALL) -> list[int]:
    """Choose image indexes for a sheet: all of a small job, else one from each of `tiles` equal stretches.

    The place within a stretch moves by the golden ratio, so that a stride never meets the same seed each time.
    """
    if images <= all_below:
        return list(range(images))
    golden = 0.6180339887498949
    return [int((slot + (slot * golden) % 1.0) * images / tiles) for slot in range(tiles)]


def draw_sheet(title: str, subtitle: str, tiles: Sequence[Tile]) -> bytes:
    """Draw the sheet and return it as PNG. Wants at least one tile."""
    box = _picture_box(tiles)
    columns = _columns(len(tiles), box)
    varying = _varying(tile.row for tile in tiles)
    prompt_font, detail_font = load_font(PROMPT_SIZE), load_font(DETAIL_SIZE)
    texts = [_wrap(_caption(tile.row), prompt_font, box[0], PROMPT_LINES) for tile in tiles]
    wrapped = [_flowed(_details(tile.row, varying), detail_font, box[0], DETAIL_LINES) for tile in tiles]
    prompt_step, detail_step = _line_height(prompt_font), _line_height(detail_font)
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    words = [len(text) * prompt_step + 5 + len(said) * detail_step for text, said in zip(texts, wrapped, strict=True)]
    heights = [PAD * 3 + box[1] + max(words[n] for n in row) for row in rows]
    title_font, subtitle_font = load_font(TITLE_SIZE), load_font(PROMPT_SIZE)
    head = _line_height(title_font) + _line_height(subtitle_font) + 18
    tile_width = box[0] + 2 * PAD
    width = 2 * MARGIN + columns * tile_width + (columns - 1) * GAP
    height = 2 * MARGIN + head + sum(heights) + (len(rows) - 1) * GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * MARGIN
    draw.text((MARGIN, MARGIN), _wrap(title, title_font, room, 1)[0], font=title_font, fill=INK)
    below = MARGIN + _line_height(title_font) + 2
    draw.text((MARGIN, below), _wrap(subtitle, subtitle_font, room, 1)[0], font=subtitle_font, fill=FAINT)
    top = MARGIN + head
    for row, row_height in zip(rows, heights, strict=True):
        for column, n in enumerate(row):
            left = MARGIN + column * (tile_width + GAP)
            draw.rounded_rectangle(
                (left, top, left + tile_width - 1, top + row_height - 1), radius=8, fill=TILE, outline=EDGE
            )
            _draw_picture(sheet, draw, tiles[n], (left + PAD, top + PAD), box)
            line = top + 2 * PAD + box[1]
            for text in texts[n]:
                draw.text((left + PAD, line), text, font=prompt_font, fill=INK)
                line += prompt_step
            line += 5
            for text in wrapped[n]:
                draw.text((left + PAD, line), text, font=detail_font, fill=FAINT)
                line += detail_step
        top += row_height + GAP
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


@cache
def font_path() -> Path | None:
    """Find the best installed font file, one with Chinese, Japanese and Korean first; None where there is none."""
    found: dict[str, Path] = {}
    for folder in FONT_FOLDERS:
        root = Path(folder).expanduser()
        if root.is_dir():
            for path in sorted(root.rglob("*.[to]t[cf]")):
                found.setdefault(path.name, path)
    return next((found[name] for name in FONT_FILES if name in found), None)


def draws_cjk(path: Path) -> bool:
    """Whether a font file is one of those known to draw Chinese, Japanese and Korean."""
    return path.name in CJK_FILES


@cache
def load_font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the installed font, or Pillow's own, at a size."""
    path = font_path()
    return ImageFont.truetype(str(path), size_px) if path else ImageFont.load_default(size_px)


def _picture_box(tiles: Sequence[Tile]) -> tuple[int, int]:
    """Size of a tile's picture: room for each shape of the sheet, all at the area of 160 px squared (224 if large)."""
    area = 160 if all(max(tile.row.width, tile.row.height) <= 160 for tile in tiles) else 224
    shapes = {(tile.row.width, tile.row.height) for tile in tiles}
    scaled = [_scaled(shape, area) for shape in shapes]
    return max(160, *(w for w, _ in scaled)), max(h for _, h in scaled)


def _scaled(shape: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = shape
    ratio = (side * side / (width * height)) ** 0.5
    ratio = min(ratio, 2 * side / max(width, height))
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def _columns(count: int, box: tuple[int, int]) -> int:
    """Columns that fit into `WIDTH`, or up to two fewer where that leaves less of the last row empty."""
    fitting = max(1, (WIDTH - 2 * MARGIN + GAP) // (box[0] + 2 * PAD + GAP))
    if count <= fitting:
        return count
    return min(range(fitting, max(fitting - 3, 0), -1), key=lambda columns: -count % columns)


def _draw_picture(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, at: tuple[int, int], box: tuple[int, int]
) -> None:
    picture = _opened(tile)
    if picture is None:
        row = tile.row
        draw.rounded_rectangle((*at, at[0] + box[0] - 1, at[1] + box[1] - 1), radius=4, fill=FAILED)
        font = load_font(DETAIL_SIZE)
        said = f"{row.error_code}: {row.error_message}" if row.status == "failed" else "the picture cannot be read"
        lines = _wrap("failed" if row.status == "failed" else "missing", load_font(PROMPT_SIZE), box[0] - 2 * PAD, 1)
        draw.text((at[0] + PAD, at[1] + PAD), lines[0], font=load_font(PROMPT_SIZE), fill=WARNING)
        step = _line_height(font)
        line = at[1] + PAD + _line_height(load_font(PROMPT_SIZE)) + 4
        for text in _wrap(said, font, box[0] - 2 * PAD, max(1, (at[1] + box[1] - PAD - line) // step)):
            draw.text((at[0] + PAD, line), text, font=font, fill=INK)
            line += step
        return
    width, height = _scaled(picture.size, min(box))
    ratio = min(box[0] / width, box[1] / height)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = at[0] + (box[0] - size[0]) // 2, at[1] + (box[1] - size[1]) // 2
    sheet.paste(resized, (left, top))
    draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=EDGE)


def _opened(tile: Tile) -> Image.Image | None:
    if tile.picture is None or tile.row.status == "failed":
        return None
    try:
        return Image.open(io.BytesIO(tile.picture)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


def _caption(row: ImageRow) -> str:
    return " ".join(row.prompt.split()) or "(empty prompt)"


def _varying(rows: Iterable[ImageRow]) -> tuple[str, ...]:
    """Names of the parameters that differ between rows, in the order in which they are shown."""
    names = ("num_inference_steps", "guidance_scale", "size", "negative_prompt")
    seen: dict[str, set[object]] = {name: set() for name in names}
    for row in rows:
        seen["num_inference_steps"].add(row.num_inference_steps)
        seen["guidance_scale"].add(row.guidance_scale)
        seen["size"].add((row.width, row.height))
        seen["negative_prompt"].add(row.negative_prompt)
    return tuple(name for name in names if len(seen[name]) > 1)


def _details(row: ImageRow, varying: tuple[str, ...]) -> list[str]:
    said = [f"seed {row.seed}"]
    if "num_inference_steps" in varying:
        said.append(f"{row.num_inference_steps} steps")
    if "guidance_scale" in varying:
        said.append(f"guidance {row.guidance_scale:g}")
    if "size" in varying:
        said.append(f"{row.width}×{row.height}")
    if "negative_prompt" in varying:
        said.append(f"not: {row.negative_prompt or '–'}")
    if row.flag:
        said.append(f"flag: {row.flag}")
    return said


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, top, _, bottom = font.getbbox("Ágjy国")
    return round(bottom - min(top, 0) + 3)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Break text into at most `lines` lines of `width` pixels, at spaces, else (CJK, long words) between letters."""
    text = text[: LINE_CHARACTERS * (lines + 1)]
    broken: list[str] = []
    line = ""
    for word in _words(text):
        if font.getlength(line + word.rstrip()) <= width:
            line += word
            continue
        if line.strip():
            broken.append(line.rstrip())
        line = ""
        for letter in word:
            if line and font.getlength(line + letter.rstrip()) > width:
                broken.append(line)
                line = ""
            line += letter
        if len(broken) > lines:
            break
    if line.strip():
        broken.append(line.rstrip())
    if len(broken) <= lines:
        return broken or [""]
    last = broken[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*broken[: lines - 1], last.rstrip() + "…"]


def _flowed(
    parts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int
) -> list[str]:
    """Set short parts side by side with dots between them, as many on a line as fit."""
    flowed: list[str] = []
    for part in parts:
        joined = f"{flowed[-1]} · {part}" if flowed else part
        if flowed and font.getlength(joined) <= width:
            flowed[-1] = joined
        else:
            flowed += _wrap(part, font, width, lines)
    return flowed[:lines]


def _words(text: str) -> list[str]:
    """Cut text after spaces, and around every ideograph, syllable or full-width sign: a line may end there."""
    words: list[str] = []
    word = ""
    for letter in text:
        if letter == " ":
            words.append(word + " ")
            word = ""
        elif ord(letter) >= 0x2E80:
            if word:
                words.append(word)
            words.append(letter)
            word = ""
        else:
            word += letter
    return [*words, word] if word else words
