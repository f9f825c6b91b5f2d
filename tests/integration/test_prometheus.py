"""A real Prometheus scrapes a real exposition; every query of the dashboard and every rule runs on what it has."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from farm.meters import METERS, Meters
from farm.metrics import exposition
from farm.tally import Snapshot, Tallies

INFRA = Path(__file__).parents[2] / "infra"
FOLDER = INFRA / "prometheus"
SCRAPES = 4
VALUES = {
    "class": ("bulk", "urgent"),
    "code": ("busy", "internal"),
    "kind": ("load", "swap", "step", "batch", "idle"),
    "method": ("GET", "POST"),
    "model": ("sketch", 'a "second" one'),
    "renderer": ("renderer-0", "renderer-1"),
    "route": ("/v1/models", "/v1/jobs/{id}"),
    "stage": ("encode", "denoise", "decode"),
    "state": ("idle", "rendering", "stalled"),
    "status": ("ok", "failed", "200", "500"),
}
"""Values for the labels of every metric."""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server, and what it scraped."""

    url: str
    accepts: list[str]

    def get(self, path: str, **query: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as exc:
            raise AssertionError(f"{query}: {json.load(exc)['error']}") from exc

    def query(self, expression: str) -> list[Any]:
        """Run a query as of now; returns its series."""
        found: list[Any] = self.get("query", query=expression)["result"]
        return found


class Farm:
    """Two renderers, a gateway and a dispatcher that count everything there is, anew with every scrape."""

    def __init__(self) -> None:
        self._processes = [Meters(name, "a") for name in ("renderer-0", "renderer-1", "gateway-0", "dispatcher")]
        self._tallies = Tallies()
        self._lock = threading.Lock()
        self.accepts: list[str] = []

    def scrape(self, accept: str) -> tuple[bytes, str]:
        with self._lock:
            self.accepts.append(accept)
            for meters in self._processes:
                _count_everything(meters)
                self._tallies.put(meters.snapshot(), now=time.monotonic())
            sums = Snapshot("farm", "a", self._tallies.samples(now=time.monotonic()))
        shown = exposition([sums], accept=accept)
        return shown.body, shown.content_type


def _count_everything(meters: Meters) -> None:
    for meter in METERS.values():
        sets: list[dict[str, str]] = [{}]
        for label in meter.labels:
            sets = [{**one, label: value} for one in sets for value in VALUES[label]]
        for labels in sets:
            if meter.kind == "counter":
                meters.count(meter.name, 0.2, **labels)
            elif meter.kind == "gauge":
                meters.gauge(meter.name, 0.5, **labels)
            else:
                for value in (0.03, 0.3, 3.0):
                    meters.observe(meter.name, value, **labels)


@pytest.fixture(scope="module")
def programs() -> None:
    """Prometheus and promtool. Not to be had: skips with the reason, and fails where `CI` is set."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        reason = f"Prometheus is not installed; run: sudo {FOLDER / 'install.sh'}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def prometheus(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus of the repository's own configuration, which scrapes faster and has scraped SCRAPES times."""
    farm = Farm()

    class Scraped(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, content_type = farm.scrape(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    exporter = ThreadingHTTPServer(("127.0.0.1", 0), Scraped)
    threading.Thread(target=exporter.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    folder = tmp_path_factory.mktemp("prometheus")
    text = (FOLDER / "prometheus.yml").read_text()
    text = text.replace("interval: 15s", "interval: 1s").replace("127.0.0.1:8000", f"127.0.0.1:{exporter.server_port}")
    (folder / "prometheus.yml").write_text(text.replace("rules/*.yml", f"{FOLDER}/rules/*.yml"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + 60
        while len(farm.accepts) < SCRAPES:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < end, "Prometheus did not scrape"
            time.sleep(0.1)
        yield Prometheus(f"http://{address}", farm.accepts)
    finally:
        process.terminate()
        process.wait(timeout=30)
        exporter.shutdown()
        exporter.server_close()


def dashboard_queries() -> dict[str, str]:
    """The dashboard's queries by the panel they belong to, Grafana's own variables filled in as it does."""
    dashboard = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
    queries = {f"annotation {one['name']}": one["expr"] for one in dashboard["annotations"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            queries[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    return queries


def rule_expressions() -> dict[str, str]:
    """The rules' expressions by what they record or alert."""
    rules = {}
    for path in sorted((FOLDER / "rules").glob("*.yml")):
        for group in YAML(typ="safe").load(path)["groups"]:
            rules |= {rule.get("record") or rule["alert"]: rule["expr"] for rule in group["rules"]}
    return rules


def test_prometheus_takes_the_exposition_as_openmetrics(prometheus: Prometheus):
    target = prometheus.get("targets", state="active")["activeTargets"][0]
    assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", "farm")
    assert prometheus.accepts[0].startswith("application/openmetrics-text")


def test_prometheus_knows_every_metric_of_the_table_with_its_type_and_help(prometheus: Prometheus):
    known = prometheus.get("metadata")
    for meter in METERS.values():
        name = meter.name.removesuffix("_total")  # OpenMetrics names a counter without it
        assert [(one["type"], one["help"]) for one in known[name]] == [(meter.kind, meter.help)], meter.name
    series = {one["__name__"] for one in prometheus.get("series", **{"match[]": '{job="farm"}'})}
    for meter in METERS.values():
        suffixes = ("_bucket", "_sum", "_count") if meter.kind == "histogram" else ("",)
        assert {meter.name + suffix for suffix in suffixes} <= series


@pytest.mark.parametrize("panel", dashboard_queries())
def test_every_query_of_the_dashboard_finds_something(prometheus: Prometheus, panel: str):
    expression = dashboard_queries()[panel]
    assert "$" not in expression, "a variable of Grafana that this test does not fill in"
    found = prometheus.query(expression)
    if panel != "annotation Alerts":  # none need fire
        assert found, expression
        assert all(float(one["value"][1]) >= 0 for one in found), found


def test_every_metric_is_on_the_dashboard():
    text = "\n".join(dashboard_queries().values())
    assert [name for name in METERS if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)] == []


@pytest.mark.parametrize("name", rule_expressions())
def test_every_rule_can_be_evaluated(prometheus: Prometheus, name: str):
    found = prometheus.query(rule_expressions()[name])
    if ":" in name:
        assert found, "a recording rule that records nothing"


def test_prometheus_itself_is_content_with_the_rules(prometheus: Prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == set(rule_expressions())
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"] == []


def test_promtool_finds_no_fault_and_its_tests_of_the_rules_pass(programs: None):
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "tests/rules.yml")):
        done = subprocess.run(
            ["promtool", *command], check=False, cwd=FOLDER, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_no_fault_with_the_exposition(programs: None):
    body, _ = Farm().scrape("")
    done = subprocess.run(["promtool", "check", "metrics"], check=False, input=body, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_every_alert_says_what_is_wrong_and_what_to_do():
    for group in YAML(typ="safe").load(FOLDER / "rules" / "alerts.yml")["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
            assert rule["labels"]["severity"] in ("critical", "warning")
    tested = (FOLDER / "tests" / "rules.yml").read_text()
    assert [name for name in rule_expressions() if name not in tested] == []
