"""Draw a contact sheet: pictures of a job with the prompt, seed and varying parameters under each.

Knows nothing of stores: pictures come as bytes. Small pictures are enlarged to a size that an eye can judge, large
ones made smaller; every tile has the same box. A failed image is a grey tile that says why.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, UnidentifiedImageError

from farm.fonts import Fonts, installed
from farm.lettering import Lettering
from farm.receipt import ImageRow

TILES_SPREAD = 48  # of a large job
TILES_ALL = 60  # a job of up to this many images is shown whole

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


def draw_sheet(title: str, subtitle: str, tiles: Sequence[Tile], *, fonts: Fonts | None = None) -> bytes:
    """Draw the sheet and return it as PNG. Wants at least one tile; `fonts` are this machine's where they are left out."""
    fonts = fonts or installed()
    box = _picture_box(tiles)
    columns = _columns(len(tiles), box)
    varying = _varying(tile.row for tile in tiles)
    prompts, details = Lettering(fonts, PROMPT_SIZE), Lettering(fonts, DETAIL_SIZE)
    texts = [prompts.wrap(_caption(tile.row), box[0], PROMPT_LINES) for tile in tiles]
    wrapped = [details.flow(_details(tile.row, varying), box[0], DETAIL_LINES) for tile in tiles]
    prompt_step, detail_step = prompts.line_height, details.line_height
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    words = [len(text) * prompt_step + 5 + len(said) * detail_step for text, said in zip(texts, wrapped, strict=True)]
    heights = [PAD * 3 + box[1] + max(words[n] for n in row) for row in rows]
    titles = Lettering(fonts, TITLE_SIZE)
    head = titles.line_height + prompts.line_height + 18
    tile_width = box[0] + 2 * PAD
    width = 2 * MARGIN + columns * tile_width + (columns - 1) * GAP
    height = 2 * MARGIN + head + sum(heights) + (len(rows) - 1) * GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * MARGIN
    titles.draw(sheet, (MARGIN, MARGIN), titles.wrap(title, room, 1)[0], INK)
    below = MARGIN + titles.line_height + 2
    prompts.draw(sheet, (MARGIN, below), prompts.wrap(subtitle, room, 1)[0], FAINT)
    top = MARGIN + head
    for row, row_height in zip(rows, heights, strict=True):
        for column, n in enumerate(row):
            left = MARGIN + column * (tile_width + GAP)
            draw.rounded_rectangle(
                (left, top, left + tile_width - 1, top + row_height - 1), radius=8, fill=TILE, outline=EDGE
            )
            picture = _opened(tiles[n])
            if picture is None:
                _draw_failure(sheet, tiles[n].row, (left + PAD, top + PAD), box, prompts, details)
            else:
                _draw_picture(sheet, picture, (left + PAD, top + PAD), box)
            line = top + 2 * PAD + box[1]
            for text in texts[n]:
                prompts.draw(sheet, (left + PAD, line), text, INK)
                line += prompt_step
            line += 5
            for text in wrapped[n]:
                details.draw(sheet, (left + PAD, line), text, FAINT)
                line += detail_step
        top += row_height + GAP
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


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


def _draw_failure(
    sheet: Image.Image, row: ImageRow, at: tuple[int, int], box: tuple[int, int], large: Lettering, small: Lettering
) -> None:
    ImageDraw.Draw(sheet).rounded_rectangle((*at, at[0] + box[0] - 1, at[1] + box[1] - 1), radius=4, fill=FAILED)
    failed = row.status == "failed"
    said = f"{row.error_code}: {row.error_message}" if failed else "the picture cannot be read"
    large.draw(sheet, (at[0] + PAD, at[1] + PAD), "failed" if failed else "missing", WARNING)
    line = at[1] + PAD + large.line_height + 4
    for text in small.wrap(said, box[0] - 2 * PAD, max(1, (at[1] + box[1] - PAD - line) // small.line_height)):
        small.draw(sheet, (at[0] + PAD, line), text, INK)
        line += small.line_height


def _draw_picture(sheet: Image.Image, picture: Image.Image, at: tuple[int, int], box: tuple[int, int]) -> None:
    width, height = _scaled(picture.size, min(box))
    ratio = min(box[0] / width, box[1] / height)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = at[0] + (box[0] - size[0]) // 2, at[1] + (box[1] - size[1]) // 2
    sheet.paste(resized, (left, top))
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=EDGE)


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
        said.append(f"not: {row.negative_prompt or '(nothing)'}")
    if row.flag:
        said.append(f"flag: {row.flag}")
    return said
