"""A process's numbers: what the table has, and nothing else."""

import ast
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.meters import METERS, OTHER, SERIES_MAX, Meters, meter_of
from farm.tally import Sample, Snapshot


def values(meters: Meters) -> dict[str, float]:
    """A snapshot's samples as Prometheus would write them."""
    shown = {}
    for sample in meters.snapshot().samples:
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels)
        shown[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return shown


def test_counters_add_up_by_their_labels():
    meters = Meters("renderer-1", "a")
    meters.count("farm_images_total", model="sketch", status="ok", **{"class": "bulk"})
    meters.count("farm_images_total", 15, model="sketch", status="ok", **{"class": "bulk"})
    meters.count("farm_images_total", model="sketch", status="failed", **{"class": "bulk"})
    assert values(meters) == {
        'farm_images_total{model="sketch",class="bulk",status="ok"}': 16.0,
        'farm_images_total{model="sketch",class="bulk",status="failed"}': 1.0,
    }


def test_a_gauge_is_set_or_moved():
    meters = Meters("gateway-1", "a")
    meters.shift("farm_http_in_flight", 2)
    meters.shift("farm_http_in_flight", -1)
    assert values(meters) == {"farm_http_in_flight": 1.0}
    meters.gauge("farm_http_in_flight", 7)
    assert values(meters) == {"farm_http_in_flight": 7.0}


def test_a_histograms_buckets_hold_those_below_too_and_a_bound_is_in_its_bucket():
    meters = Meters("renderer-1", "a")
    for waited in (0.05, 0.051, 1000.0):
        meters.observe("farm_urgent_wait_seconds", waited, kind="step")
    shown = values(meters)
    assert shown['farm_urgent_wait_seconds_bucket{kind="step",le="0.025"}'] == 0
    assert shown['farm_urgent_wait_seconds_bucket{kind="step",le="0.05"}'] == 1
    assert shown['farm_urgent_wait_seconds_bucket{kind="step",le="0.1"}'] == 2
    assert shown['farm_urgent_wait_seconds_bucket{kind="step",le="300.0"}'] == 2
    assert shown['farm_urgent_wait_seconds_bucket{kind="step",le="+Inf"}'] == 3
    assert shown['farm_urgent_wait_seconds_count{kind="step"}'] == 3
    assert shown['farm_urgent_wait_seconds_sum{kind="step"}'] == pytest.approx(1000.101)


def test_what_the_table_does_not_have_is_refused():
    meters = Meters("renderer-1", "a")
    with pytest.raises(ValueError, match=r"there is no metric farm_imagse_total; farm/meters.py has the table"):
        meters.count("farm_imagse_total")
    with pytest.raises(ValueError, match=r"farm_seats is a gauge, not a counter"):
        meters.count("farm_seats")
    with pytest.raises(ValueError, match=r"farm_refusals_total has the labels \('code',\), got \('code', 'owner'\)"):
        meters.count("farm_refusals_total", code="busy", owner="ann")
    with pytest.raises(ValueError, match=r"farm_refusals_total has the labels \('code',\), got \(\)"):
        meters.count("farm_refusals_total")
    with pytest.raises(ValueError, match=r"farm_refusals_total only grows, got -1"):
        meters.count("farm_refusals_total", -1, code="busy")
    assert meters.snapshot().samples == ()


def test_labels_without_end_are_counted_together():
    meters = Meters("gateway-1", "a")
    for number in range(SERIES_MAX + 20):
        meters.count("farm_refusals_total", code=f"code-{number}")
    meters.count("farm_refusals_total", code="code-0")
    shown = values(meters)
    assert len(shown) == SERIES_MAX + 1
    assert shown[f'farm_refusals_total{{code="{OTHER}"}}'] == 20
    assert shown['farm_refusals_total{code="code-0"}'] == 2


def test_threads_lose_no_count():
    meters = Meters("renderer-1", "a")

    def count() -> None:
        for _ in range(2000):
            meters.count("farm_refusals_total", code="busy")
            meters.observe("farm_urgent_wait_seconds", 0.1, kind="idle")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values(meters)['farm_refusals_total{code="busy"}'] == 8000
    assert values(meters)['farm_urgent_wait_seconds_count{kind="idle"}'] == 8000


def test_a_snapshot_says_whose_it_is_and_does_not_change_later():
    meters = Meters("dispatcher", "b", began_at=1000.0)
    meters.gauge("farm_seats", 1)
    snapshot = meters.snapshot()
    meters.gauge("farm_seats", 2)
    assert snapshot == Snapshot("dispatcher", "b", (Sample("farm_seats", (), 1.0),), 1000.0)


def test_every_metric_is_named_as_prometheus_asks():
    units = ("_seconds", "_bytes", "_ratio")
    for meter in METERS.values():
        assert meter.name.startswith("farm_")
        assert meter.name.endswith("_total") == (meter.kind == "counter"), meter.name
        assert bool(meter.buckets) == (meter.kind == "histogram"), meter.name
        assert list(meter.buckets) == sorted(set(meter.buckets)), meter.name
        assert meter.kind != "histogram" or meter.name.endswith(units), meter.name
        assert meter.help.endswith("."), meter.name
        assert not {"job", "owner", "prompt", "key", "token"} & set(meter.labels), meter.name


def test_a_samples_name_leads_to_its_metric():
    assert meter_of("farm_seats").name == "farm_seats"
    assert meter_of("farm_urgent_wait_seconds_bucket").name == "farm_urgent_wait_seconds"
    for unknown in ("farm_urgent_wait_seconds", "farm_seats_sum", "farm_none_total"):
        with pytest.raises(ValueError, match=f"there is no metric {unknown}"):
            meter_of(unknown)


def counted() -> Iterator[str]:
    """The names of metrics that the farm's code counts, by its calls of a process's meters."""
    root = Path(__file__).parents[2]
    for path in [*root.glob("farm/**/*.py"), *root.glob("actors/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                name = node.args[0]
                is_meter = node.func.attr.lstrip("_") in ("count", "gauge", "shift", "observe")
                if is_meter and isinstance(name, ast.Constant) and str(name.value).startswith("farm_"):
                    yield str(name.value)


def test_what_the_table_promises_is_counted_somewhere_and_nothing_else_is():
    assert sorted(set(counted())) == sorted(METERS)
