from datetime import UTC, datetime

import pytest

from farm.cli.wording import age, count, cut, duration, gpu_hours, rate, size


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (0.04, "40 ms"),
        (0.4, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (442_800, "5 d 3 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_500_000, "12.5 MB"), (1.2e15, "1,200.0 TB")]
)
def test_sizes(number: float, said: str) -> None:
    assert size(number) == said


def test_hours_of_gpus() -> None:
    assert [gpu_hours(x) for x in (1, 0.5, 2.125, 1300)] == [
        "1 GPU-hour",
        "0.5 GPU-hours",
        "2.125 GPU-hours",
        "1,300 GPU-hours",
    ]


def test_counts_rates_ages_and_cuts() -> None:
    assert (count(1, "image"), count(12_000, "image")) == ("1 image", "12,000 images")
    assert [rate(x) for x in (None, 2.06, 0.84, 0.05, 0.0005)] == [
        "– images/s",
        "2.1 images/s",
        "0.84 images/s",
        "3.0 images/min",
        "1.8 images/h",
    ]
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert age("2026-01-01T11:59:15+00:00", now) == "45 s"
    assert age("some day", now) == "some day"
    assert cut("a\n b  c", 10) == "a b c"
    assert cut("a long line", 7) == "a long…"
    assert cut("red \x1b[31m, bell \x07, turned \u202e", 40) == "red \ufffd[31m, bell \ufffd, turned \ufffd"
