"""`farm compare`: two jobs, folders or pictures side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.exits import Exit
from farm.cli.following import counting
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, say
from farm.cli.wording import count, cut, duration
from farm.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from farm.pairs import Pair, Side, SideBySide

Which = Annotated[str, typer.Argument(help="A job, JOB/RUN, a picture, or a folder of pictures.")]
SHEET_PAIRS = 24
SHOWN_PAIRS = 20
AMPLIFIED = 8
"""The difference is shown so many times as strong, or an eye would see nothing of it."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "compare")(compare)


def compare(
    options: Options,
    a: Which,
    b: Which,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write pairs.png and compare.json there.")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", metavar="N", help="Look at so many pairs at most, spread evenly.")
    ] = 200,
) -> Exit:
    """Put two jobs, two folders or two pictures side by side.

    Says which parameters differ, seconds and memory where they are known, and how far the pictures of each pair are apart:
    the mean absolute difference of uint8 channels, and PSNR. Folders of farm bench bring their own seconds and memory.
    """
    from farm.pairs import open_side, side_by_side

    if images < 1:
        raise InputError(f"--images {cut(str(images), 60)}: must be 1 or more")
    first, second = open_side(a, options.open_ledger), open_side(b, options.open_ledger)
    found, pairs = side_by_side(first, second, most=images)
    drawn: list[tuple[Pair, np.ndarray, np.ndarray]] = []
    with counting("comparing", min(images, found.paired), quiet=options.json) as counted:
        for done, pair in enumerate(pairs, start=1):
            if out is not None and len(drawn) < SHEET_PAIRS:
                drawn.append(pair)
            counted(done)
    if out is not None:
        _write(out, found, drawn)
    if options.json:
        print_json({**found.record(), "out": str(out) if out else None})
    else:
        _show(found)
        if out is not None:
            say(f"  written     {out / 'pairs.png'}, {out / 'compare.json'}")
    return Exit.OK


def _show(found: "SideBySide") -> None:
    record = found.record()
    for side, name in ((found.a, "A"), (found.b, "B")):
        say(f"{name}  {side.name}: {', '.join(_facts(side))}")
    for change in found.changes or ("nothing that is known",):
        say(f"  differs     {change}")
    if found.a.seconds and found.b.seconds:
        say(f"  seconds     B takes {found.b.seconds / found.a.seconds:.2f} times as long as A")
    if found.a.peak_gib and found.b.peak_gib and "job" not in (found.a.kind, found.b.kind):
        say(f"  memory      B holds {found.b.peak_gib - found.a.peak_gib:+.2f} GiB against A")
    looked = f", {len(found.pairs):,} of them looked at" if len(found.pairs) < found.paired else ""
    say(f"  pictures    {count(found.paired, 'pair')}{looked}, {record['identical']:,} of equal pixels")
    if record["mean_absolute"] is not None:
        psnr = (
            "" if record["psnr_db"] is None else f", PSNR {record['psnr_db']:.1f} dB (the median of those that differ)"
        )
        say(f"  apart       {record['mean_absolute']:.3g} of 255 levels on average{psnr}")
    for pair in found.pairs[:SHOWN_PAIRS]:
        say(f"    {cut(pair.label or pair.a.label, 24):<24}  {_pair(pair)}")
    if len(found.pairs) > SHOWN_PAIRS:
        note(f"{len(found.pairs) - SHOWN_PAIRS:,} more pairs; --json lists them")
    if found.only_a or found.only_b:
        note(f"note: without a partner: {found.only_a:,} of A, {found.only_b:,} of B")


def _facts(side: "Side") -> list[str]:
    said = [side.kind, count(len(side.pictures), "picture")]
    if side.seconds is not None:
        said.append(f"{duration(side.seconds)} an image")
    if side.gpu_seconds is not None:
        said.append(f"{duration(side.gpu_seconds)} in all on {', '.join(side.devices)}")
    if side.peak_gib is not None:
        said.append(f"{side.peak_gib:.2f} GiB at most{', as its model was benchmarked' if side.kind == 'job' else ''}")
    return said


def _pair(pair: "Pair") -> str:
    apart = pair.difference
    if apart is None:
        return pair.note
    if apart.psnr_db is None:
        return "equal"
    return (
        f"{apart.mean_absolute:.3g} levels on average, {apart.most} at most, {100 * apart.differing:.3g} % of the pixels, "
        f"PSNR {apart.psnr_db:.1f} dB"
    )


def _write(out: Path, found: "SideBySide", drawn: list[tuple["Pair", "np.ndarray", "np.ndarray"]]) -> None:
    import json

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("pairs.png", "compare.json"):
            if (out / name).exists():
                raise InputError(f"--out {out}: holds {name} already; name another folder")
        (out / "pairs.png").write_bytes(_sheet(found, drawn))
        text = json.dumps(found.record(), indent=1, ensure_ascii=False, allow_nan=False)
        (out / "compare.json").write_text(f"{text}\n", encoding="utf-8")
    except OSError as exc:
        raise InputError(f"--out {out}: cannot be written: {exc.strerror}; name another folder") from exc


def _sheet(found: "SideBySide", drawn: list[tuple["Pair", "np.ndarray", "np.ndarray"]]) -> bytes:
    from farm.grid import GridRow, draw_grid
    from farm.pairs import amplified

    rows = []
    for pair, left, right in drawn:
        said = str(pair.a.params.get("prompt", pair.note))
        apart = amplified(left, right, times=AMPLIFIED) if pair.difference is not None else None
        words = "" if pair.difference is None else _short(pair)
        seconds = ["" if one.seconds is None else duration(one.seconds) for one in (pair.a, pair.b)]
        shown = tuple(None if pixels.size == 0 else pixels for pixels in (left, right))
        rows.append(GridRow(pair.label or pair.a.label, said, (*shown, apart), (*seconds, words)))
    columns = (f"A: {found.a.name}", f"B: {found.b.name}", f"the difference, {AMPLIFIED} times")
    changes = "; ".join(found.changes) or "nothing that is known differs"
    return draw_grid(f"{found.a.name} and {found.b.name}", changes, columns=columns, rows=rows)


def _short(pair: "Pair") -> str:
    apart = pair.difference
    if apart is None or apart.psnr_db is None:
        return "equal"
    return f"{apart.mean_absolute:.3g} levels, PSNR {apart.psnr_db:.1f} dB"
