"""A `farm` command to call in this process, in a folder of its own, and a farm that renders at once and without Ray."""

import json
import logging
import sys
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from farm.cli import following, waiting
from farm.cli.app import main
from farm.export import finalise
from farm.ledger import Ledger
from farm.plan import Plan
from farm.rebuild import read_job
from farm.run import JobProgress, JobView
from farm.settings import Settings
from tests.unit.finished_jobs import CARD, commit_shard, make_ledger


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of its error."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("error: ")


@dataclass
class Place:
    """The folder in which commands run."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def ledger(self) -> Ledger:
        return make_ledger(self.store)

    def __call__(self, *arguments: str) -> Ended:
        self.capsys.readouterr()
        code = main(arguments)
        seen = self.capsys.readouterr()
        return Ended(code, seen.out, seen.err)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def manifest(self, **fields: object) -> str:
        """Write a manifest of five prompts and two seeds each, some of its fields changed; None takes one out."""
        whole = {
            "name": "shapes",
            "model": "shapes",
            "prompts": [f"shape number {row}" for row in range(5)],
            "seeds": {"count": 2},
        } | fields
        return self.write(
            "job.yaml", json.dumps({name: value for name, value in whole.items() if value is not None}, indent=1)
        )

    def jobs_written(self) -> list[Path]:
        """Every object that belongs to a job."""
        return [path for part in ("jobs", "open") for path in (self.store / part).rglob("*") if path.is_file()]


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Place]:
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "shapes.yaml").write_text(json.dumps(CARD.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FARM_MODELS", str(cards))
    monkeypatch.setattr(sys, "argv", ["farm"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield Place(tmp_path, capsys)
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@dataclass
class FakeFarm:
    """Renders what is submitted at once; `failed` images fail, and `trouble` is what asking for progress raises.

    `says`: states, or snapshots, that it reports before it tells how the job stands. `meanwhile` is done at the first look,
    as by another terminal.
    """

    failed: Collection[int] = ()
    trouble: BaseException | None = None
    stop_after_shards: int | None = None
    started_here: bool = True
    says: list[tuple[str, str | None]] = field(default_factory=list)
    meanwhile: Callable[[], object] | None = None
    opened: list[int | None] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)
    ledger: Ledger | None = None

    def open(
        self, settings: Settings, *, renderers: int | None = None, start: bool = True, give_up: object = None
    ) -> Self:
        self.ledger = make_ledger(Path(settings.store))
        self.opened.append(renderers)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, job: str) -> None:
        assert self.ledger is not None
        self.submitted.append(job)
        while runs := read_job(self.ledger, job).runs:
            plans = {plan.run: plan for plan in self.ledger.plans(job)}
            for run in runs:
                self._render(plans[run.run], run.pass_number)
            if self.stop_after_shards is not None:
                break

    def _render(self, plan: Plan, number: int) -> None:
        assert self.ledger is not None
        done = self.ledger.done_shards(plan, number)
        for shard in range(len(done))[: self.stop_after_shards]:
            if not done[shard]:
                commit_shard(self.ledger, plan, shard, pass_number=number, failed=self.failed)
        if self.ledger.done_shards(plan, number).all():
            finalise(self.ledger, plan, number)

    def progress(self, job: str) -> JobProgress:
        assert self.ledger is not None
        if self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()
        if self.trouble is not None:
            raise self.trouble
        view = read_job(self.ledger, job)
        state, message = self.says.pop(0) if self.says else (_state(view), None)
        return JobProgress(job, "run", 1, state, 10, 4, 0, 1.0, 2.0, 0.0, 1, 1, message, {})

    def others(self, job: str) -> tuple[str, ...]:
        return ()


def _state(view: JobView) -> str:
    if view.state != "open":
        return view.state
    if view.runs:
        return "waiting"
    return "pilot" if view.awaits_approval else "done"


@pytest.fixture
def fake_farm(monkeypatch: pytest.MonkeyPatch) -> FakeFarm:
    fake = FakeFarm()
    module = types.ModuleType("actors.cluster")
    module.open_farm = fake.open  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.cluster", module)
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)
    return fake


@dataclass
class Somebody:
    """Somebody at the terminal: what they were asked, and what they answer."""

    answer: bool = True
    asked: list[str] = field(default_factory=list)

    def confirm(self, question: str, **_: object) -> bool:
        self.asked.append(question)
        return self.answer


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> Somebody:
    person = Somebody()
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(waiting, "sys", types.SimpleNamespace(stdin=terminal, stderr=terminal))
    monkeypatch.setattr(waiting.typer, "confirm", person.confirm)
    return person
