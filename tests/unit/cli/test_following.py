import signal
from dataclasses import replace

import pytest

from farm.cli.following import PlainLine, follow, interruptible, measures
from farm.run import JobProgress

RUNNING = JobProgress(
    job="shapes",
    run="0a1b2c3d",
    pass_number=1,
    state="running",
    images=43,
    done=12,
    failed=0,
    fraction=0.3,
    images_per_s=2.06,
    eta_s=15.2,
    renderers=2,
    renderers_busy=1,
    message=None,
    seconds={},
)


def test_a_line_says_images_speed_time_left_and_renderers() -> None:
    assert measures(RUNNING) == "12/43 images · 2.1 images/s · 15 s left · 1/2 renderers busy"


def test_images_of_shards_in_hand_count_by_their_steps() -> None:
    assert measures(replace(RUNNING, fraction=0.5)).startswith("21/43 images")


def test_a_line_without_a_speed_says_so() -> None:
    unknown = replace(RUNNING, images_per_s=None, eta_s=None, failed=2)
    assert measures(unknown) == "12/43 images · 2 failed · – images/s · time left unknown · 1/2 renderers busy"


def test_without_a_terminal_a_line_comes_every_five_seconds_and_when_the_state_changes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 100.0
    line = PlainLine(clock=lambda: now)
    for later in range(12):
        now = 100.0 + later
        line.show(RUNNING)
    line.show(replace(RUNNING, state="finalising"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("shapes: running, 12/43 images")
    assert lines[3] == "shapes: finalising, 12/43 images · writing the dataset"


def test_following_ends_with_the_job_and_tells_each_new_message_once(capsys: pytest.CaptureFixture[str]) -> None:
    away = replace(RUNNING, message="store unavailable, trying again")
    snapshots = iter([RUNNING, away, away, RUNNING, replace(RUNNING, state="done")])
    slept: list[float] = []
    last = follow(lambda: next(snapshots), line=PlainLine(), sleep=slept.append)
    assert last.state == "done"
    assert len(slept) == 4
    assert capsys.readouterr().err.count("note: store unavailable, trying again") == 1


def test_a_job_of_another_farm_is_followed_and_that_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = replace(RUNNING, state="elsewhere", message="rendered by another farm, desk (process 7)")
    snapshots = iter([elsewhere, elsewhere, replace(elsewhere, done=20), replace(RUNNING, state="done")])
    assert follow(lambda: next(snapshots), line=PlainLine(), sleep=lambda _: None).state == "done"
    assert capsys.readouterr().err.splitlines() == [
        "note: rendered by another farm, desk (process 7); this one follows it, and takes over if that one ends",
        "shapes: elsewhere, 12/43 images · rendered by another farm",
    ]


@pytest.mark.parametrize("state", ["done", "paused", "cancelled", "deleted", "pilot", "stopped"])
def test_following_ends_where_nothing_moves_without_a_person(state: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = replace(RUNNING, state=state, message="why")
    assert follow(lambda: ended, line=PlainLine(), sleep=lambda _: None) is ended
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_stop_end_in_good_order_too(number: signal.Signals) -> None:
    found = signal.signal(number, signal.default_int_handler)  # under nohup it would be ignored, and stay so
    try:
        with interruptible() as take_signals:
            signal.signal(number, signal.SIG_IGN)  # as a library does that wants the signal for itself
            take_signals()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, found)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_ctrl_c_raises_and_the_second_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert ended == []
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before
