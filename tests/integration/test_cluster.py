"""What `actors.cluster` asks of Ray when a farm starts at an address and ends, with a Ray that answers as the test says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from actors import cluster
from farm.errors import FarmUnavailableError
from farm.settings import Settings
from farm.whereabouts import note_file


class FakeRay:
    """Writes down what it is told. `lives`: whether a dispatcher is there; `answer`: what its `stop` ends with."""

    def __init__(self, *, lives: bool, answer: Exception | None = None):
        self.told: list[Any] = []
        self.lives = lives
        self.answer = answer
        self.dispatcher = SimpleNamespace(stop=SimpleNamespace(remote=lambda: "stopping"))

    def init(self, **options: Any) -> None:
        self.told.append(("init", options["address"]))

    def shutdown(self) -> None:
        self.told.append("shutdown")

    def get_actor(self, name: str, namespace: str) -> Any:
        if not self.lives:
            raise ValueError(f"no actor {name}")
        return self.dispatcher

    def get(self, call: str, *, timeout: float) -> None:
        self.told.append(call)
        if self.answer is not None:
            raise self.answer

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        assert actor is self.dispatcher
        self.told.append(("kill", no_restart))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("FARM_RUNTIME_DIR", str(tmp_path / "runtime"))
    return Settings(store=str(tmp_path / "store"), address="10.0.0.1:6379")


def test_at_an_address_where_a_farm_runs_another_is_refused_and_that_one_lives_on(settings, tmp_path, monkeypatch):
    ray = FakeRay(lives=True)
    monkeypatch.setattr(cluster, "ray", ray)
    with pytest.raises(FarmUnavailableError, match=r"a farm runs at 10\.0\.0\.1:6379 already; farm down ends it"):
        cluster.bring_up(settings, environment={}, folder=tmp_path)
    assert ray.told == [("init", "10.0.0.1:6379"), "shutdown"]
    assert not note_file(settings).exists()


@pytest.mark.parametrize("answer", [GetTimeoutError("10 s"), RayActorError()])
def test_a_dispatcher_that_does_not_say_that_it_has_stopped_is_ended_all_the_same(settings, answer, monkeypatch):
    ray = FakeRay(lives=True, answer=answer)
    monkeypatch.setattr(cluster, "ray", ray)
    with pytest.raises(type(answer)):
        cluster._end(ray.dispatcher, kill=True)
    assert ray.told == ["stopping", ("kill", True)]


def test_a_dispatcher_that_ends_with_its_ray_is_not_killed(monkeypatch):
    ray = FakeRay(lives=True)
    monkeypatch.setattr(cluster, "ray", ray)
    cluster._end(ray.dispatcher, kill=False)
    assert ray.told == ["stopping"]
