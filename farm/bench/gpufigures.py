"""What `farm.bench.gpu` finds, as records and as tables. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from farm.bench.report import three_digits

CONTEXT_GIB = 1.0
"""Of a budget, what the CUDA context and fragments take outside of torch's allocator."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: a size of the articles and a number of steps."""

    width: int
    height: int
    steps: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}, {self.steps} steps"


@dataclass(frozen=True, slots=True)
class Row:
    """What drawing one shard came to. Shares are of its seconds; None where this device has no such figure."""

    model: str
    case: Case
    budget_gib: float
    batch: int
    images: int
    placement: str = ""
    explained: str = ""
    load_s: float | None = None
    seconds_per_image: float | None = None
    outside: float | None = None
    idle_between: float | None = None
    idle_inside: float | None = None
    peak_gib: float | None = None
    failed: str | None = None

    @property
    def within(self) -> str:
        """Whether memory was kept to, in a word."""
        if self.peak_gib is None:
            return "—"
        return "ok" if self.peak_gib <= self.budget_gib - CONTEXT_GIB else "over"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `held` is None where it could not be tried, and `found` says why."""

    model: str
    name: str
    found: str
    held: bool | None


def idle_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Return the share, from the first span's beginning to the last one's end, that no span covers; None where there is none.

    They come in the order of their beginnings.
    """
    if not spans:
        return None
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return 1 - covered / whole if whole else 0.0


def memory_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | picture | batch | budget, GiB | placement | peak reserved, GiB | | load, s | s an image "
        "| outside the denoiser | idle between batches | idle inside |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        begin = f"| {row.model} | {row.case} | {row.batch} | {row.budget_gib:g} | "
        if row.failed is not None:
            lines.append(f"{begin}{row.placement or 'none'} | | | | {row.failed} | | | |")
            continue
        peak = "—" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        lines.append(
            f"{begin}{row.placement} | {peak} | {row.within} | {_seconds(row.load_s)} | {_seconds(row.seconds_per_image)} | "
            f"{_share(row.outside)} | {_share(row.idle_between)} | {_share(row.idle_inside)} |"
        )
    return "\n".join(lines)


def ratios(rows: Sequence[Row], peers: Sequence[Row]) -> Iterator[tuple[Row, Row, float | None]]:
    """Each peer's row beside the farm's of the same shape, budget and batch, and how many times as long the peer takes."""
    ours = {(row.case, row.budget_gib, row.batch): row for row in reversed(rows)}
    for peer in peers:
        mine = ours.get((peer.case, peer.budget_gib, peer.batch))
        if mine is None:
            continue
        both = mine.seconds_per_image and peer.seconds_per_image
        yield mine, peer, (peer.seconds_per_image or 0.0) / (mine.seconds_per_image or 1.0) if both else None


def peer_table(compared: Sequence[tuple[Row, Row, float | None]]) -> str:
    """Markdown."""
    lines = [
        "| model | picture | the farm, s an image | the peer, s an image | ratio | the peer's peak, GiB |",
        "|" + "---|" * 6,
    ]
    for mine, peer, ratio in compared:
        theirs = peer.failed or _seconds(peer.seconds_per_image)
        peak = "—" if peer.peak_gib is None else f"{peer.peak_gib:.2f}"
        said = "—" if ratio is None else f"{ratio:.2f}×"
        lines.append(
            f"| {mine.model} | {mine.case} | {mine.failed or _seconds(mine.seconds_per_image)} | {theirs} | {said} | {peak} |"
        )
    return "\n".join(lines)


def checks_table(checks: Sequence[Check]) -> str:
    """Markdown."""
    words = {True: "ok", False: "NOT HELD", None: "not tried"}
    lines = ["| model | check | found | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {one.model} | {one.name} | {one.found} | {words[one.held]} |" for one in checks)])


def _seconds(value: float | None) -> str:
    return "—" if value is None else three_digits(value)


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}"
