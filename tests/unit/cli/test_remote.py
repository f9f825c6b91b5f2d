"""Commands that speak to a farm's endpoint say the same as on a store, and end with the same codes."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.cli import remote
from farm.cli.options import Options
from farm.client import Client
from farm.client.answers import Job, Progress
from tests.unit.cli.conftest import Place
from tests.unit.client.conftest import URL, Endpoint, live

MANIFEST = """\
name: {name}
model: sketch
prompts: [a red circle, a blue star]
params: {{num_inference_steps: 2}}
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with live(tmp_path_factory.mktemp("farm")) as found:
        yield found


@pytest.fixture
def there(farm: Place, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Commands whose address is that farm's."""

    def client(options: Options) -> Client:
        return endpoint.client()

    monkeypatch.setattr(Options, "client", client)
    monkeypatch.setenv("FARM_URL", URL)
    return farm


def submit(there: Place, name: str, *flags: str, more: str = "") -> None:
    there.write("job.yaml", MANIFEST.format(name=name) + more)
    assert there("submit", "job.yaml", *flags).code == 0


def test_submit_says_what_was_made_and_how_to_follow_it(there: Place) -> None:
    there.write("job.yaml", MANIFEST.format(name="first"))
    ended = there("submit", "job.yaml")
    assert (ended.code, ended.out) == (0, "")
    assert [line for line in ended.err.splitlines() if "first" in line] == [
        f"first: 2 images, open at {URL}",
        "follow it: farm status first -w",
    ]
    assert json.loads(there("submit", "job.yaml", "--json").out)["job"] == "first"


def test_submit_and_watch_end_with_what_the_job_came_to(there: Place) -> None:
    there.write("job.yaml", MANIFEST.format(name="watched"))
    ended = there("submit", "job.yaml", "--watch")
    assert ended.code == 0
    assert ended.out.startswith("watched: done, 2 of 2 images, 0 failed\n  model      sketch\n")
    again = there("status", "watched", "-w", "--json")
    assert again.code == 0
    assert json.loads(again.out)["state"] == "done"
    assert there.jobs_written() == []


def test_status_lists_the_farm_s_jobs(there: Place) -> None:
    submit(there, "listed", "-w")
    assert "listed" in there("status").out
    assert "listed" in [one["job"] for one in json.loads(there("status", "--json").out)["jobs"]]
    ended = there("status", "lisetd")
    assert ended.code == 2
    assert "listed" in ended.error


def test_a_pilot_is_waited_at_and_approved(there: Place) -> None:
    there.write("job.yaml", MANIFEST.format(name="piloted") + "seeds: {count: 4}\npilot: 2\n")
    ended = there("submit", "job.yaml", "-w")
    assert (ended.code, ended.error) == (
        9,
        "the pilot of piloted is done; look at its sheet, then: farm approve piloted",
    )
    assert "piloted is approved; its other 6 images follow" in there("approve", "piloted").err
    assert there("status", "piloted", "-w").code == 0


def test_words_are_said_to_the_farm_s_job(there: Place) -> None:
    submit(there, "said", more="seeds: {count: 2000}\n")
    assert "said is paused; farm resume said goes on with it" in there("pause", "said").err.splitlines()
    ended = there("status", "said", "-w")
    assert ended.code == 9
    assert ended.error.startswith("said is paused with ")
    assert "said: priority: 50 -> 80" in there("change", "said", "--priority", "80").err.splitlines()
    assert json.loads(there("resume", "said", "--json").out)["state"] == "open"
    assert "said is cancelled; farm resume said goes on with it" in there("cancel", "said").err.splitlines()
    assert there("status", "said", "-w").code == 8
    assert there("change", "said").error.startswith("nothing to change of said is given")


def test_retry_opens_a_pass_there(there: Place) -> None:
    submit(there, "retried", "-w")
    assert "2 images of retried will be rendered again" in there("retry", "retried", "--all").err.splitlines()
    assert there("status", "retried", "-w").code == 0
    assert "no image of retried failed; there is nothing to render again" in there("retry", "retried").err.splitlines()


def test_models_are_the_farm_s(there: Place) -> None:
    assert "sketch" in there("models").out
    assert json.loads(there("models", "sketch", "--json").out)["id"] == "sketch"


def test_a_store_that_is_named_goes_before_the_endpoint(there: Place) -> None:
    submit(there, "afar", "-w")
    ended = there("status", "--store", str(there.store))
    assert (ended.code, ended.out) == (0, "")
    assert "no jobs in " in ended.err
    both = there("status", "--store", str(there.store), "--url", URL)
    assert (both.code, both.error) == (2, "--store and --url exclude each other; leave one of them out")


def test_prompts_from_a_pipe_become_pictures(there: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/steps 1\n/seed 7\na red circle\n\n/n 2\na blue star\nquit\nno\n"))
    ended = there("prompt", "--to", "pictures")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "pictures/0001.png  seed 7",
        "pictures/0002.png  seed 7",
        "pictures/0003.png  seed 8",
    ]
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["0001.png", "0002.png", "0003.png"]


def test_a_prompt_that_is_refused_is_said_and_decides_how_a_pipe_ends(
    there: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/model nothing\n/size 63x63\na red circle\n"))
    ended = there("prompt")
    assert ended.code == 2
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "nothing" in errors[0]


def test_pictures_are_told_as_json_too(there: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/steps 1\na red circle\n"))
    told = json.loads(there("prompt", "--json").out)
    assert told["file"] == "farm-pictures/0001.png"
    assert told["model"] == "sketch"
    assert "b64_json" not in told


def test_a_job_that_the_farm_stopped_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    live = Progress(state="stalled", message="the store refuses it")
    job = Job(job="held", state="open", images=2, live=live)
    remote.show_job(Options(), job)
    seen = capsys.readouterr()
    assert seen.out.startswith("held: stalled, 0 of 2 images")
    assert "note       the store refuses it" in seen.out
    assert seen.err == "when its trouble is mended, the farm tries again: farm resume held\n"
    other = Job(job="goes", state="open", live=Progress(state="running"))
    remote.show_jobs(None, [job, other])  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.split()[0] in ("held", "goes")] == [
        ["held", "stalled"],
        ["goes", "open"],
    ]


def test_submit_says_what_the_farm_warns_of(there: Place) -> None:
    there.write("job.yaml", MANIFEST.format(name="warned").replace("a blue star", "a nike shoe"))
    said = "names a brand (nike), which tends to be drawn as a logo; take it out"
    assert f"warning: manifest:3: prompt 2: {said}\n" in there("submit", "job.yaml").err
    record = json.loads(there("submit", "job.yaml", "--json").out)
    assert record["warnings"] == [{"code": "brand", "text": said, "where": "manifest:3: prompt 2"}]
