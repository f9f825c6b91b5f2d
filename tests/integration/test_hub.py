"""A mirror of the hub on loopback, asked by the real command where `HF_ENDPOINT` names it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import farm.sketch
from farm.modelcard import find_card
from farm.settings import Settings

WEIGHTS = Path(farm.sketch.__file__).parent / "weights"
FILES = {str(file.relative_to(WEIGHTS)): file.read_bytes() for file in WEIGHTS.rglob("*") if file.is_file()}
COMMIT = "5" * 40
HUB = "some/sketch"
LIMIT_S = 120


class Mirror(ThreadingHTTPServer):
    """Has the bundled model under another name, and writes down the paths that it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        name = path.removeprefix(f"/{HUB}/resolve/{COMMIT}/")
        if name in FILES:
            content, kind = FILES[name], "application/octet-stream"
        elif path.startswith(f"/api/models/{HUB}/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": _etag(name)} for name in FILES]
            content, kind = json.dumps(tree).encode(), "application/json"
        elif path.startswith(f"/api/models/{HUB}"):
            about = {"id": HUB, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            content, kind = json.dumps(about).encode(), "application/json"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if name in FILES:
            self.send_header("ETag", f'"{_etag(name)}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _etag(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()[:40]


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_weights_are_pulled_from_the_mirror_of_the_hub_that_hf_endpoint_names(mirror: Mirror, tmp_path: Path) -> None:
    card = find_card("sketch", Settings()).model_dump(mode="json", exclude_defaults=True)
    card |= {"name": "mirrored", "source": {"hub": HUB, "revision": COMMIT}}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mirrored.yaml").write_text(json.dumps(card))
    named = ("HF_", "HUGGING", "FARM_", "XDG_")
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(named) and "proxy" not in name.lower()
    }
    env |= {"HF_ENDPOINT": mirror.endpoint, "HF_HOME": str(tmp_path / "hf"), "FARM_MODELS": str(tmp_path / "models")}
    command = [sys.executable, "-m", "farm", "models", "pull", "mirrored", "--json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = json.loads(done.stdout)["folders"].values()
    assert Path(folder).is_relative_to(tmp_path / "hf")
    assert Path(folder).name == COMMIT
    pulled = {name: Path(folder, name).read_bytes() for name in FILES}
    assert pulled == FILES
    assert {f"/{HUB}/resolve/{COMMIT}/{name}" for name in FILES} <= set(mirror.asked)
