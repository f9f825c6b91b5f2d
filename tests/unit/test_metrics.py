"""The exposition, read back by prometheus-client's own parsers."""

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from farm.meters import METERS, Meters
from farm.metrics import exposition
from farm.tally import Snapshot, Tallies

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
BULK = {"class": "bulk"}


def counted(process: str = "renderer-1") -> Snapshot:
    """A snapshot with two series of every metric of the table."""
    meters = Meters(process, "a")
    for meter in METERS.values():
        for value in ("one", "two"):
            labels = dict.fromkeys(meter.labels, value)
            if meter.kind == "counter":
                meters.count(meter.name, 2, **labels)
            elif meter.kind == "gauge":
                meters.shift(meter.name, 1.5, **labels)
            else:
                meters.observe(meter.name, 0.07, **labels)
                meters.observe(meter.name, 7, **labels)
    return meters.snapshot()


def test_text_is_what_prometheus_reads():
    meters = Meters("renderer-1", "a")
    meters.count("farm_images_total", 16, model='a "card"', status="ok", **BULK)
    shown = exposition([meters.snapshot()])
    assert shown.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert shown.body.decode().splitlines()[:3] == [
        "# HELP farm_images_total Images drawn: of jobs when their receipt is stored, of the endpoint when they are answered.",
        "# TYPE farm_images_total counter",
        'farm_images_total{class="bulk",model="a \\"card\\"",status="ok"} 16.0',
    ]


def test_openmetrics_is_given_to_who_asks_for_it():
    shown = exposition([counted()], accept=OPENMETRICS)
    assert shown.content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert shown.body.endswith(b"# EOF\n")
    assert exposition([counted()], accept="text/html").content_type.startswith("text/plain")


def test_every_metric_of_the_table_is_shown_in_both_formats_with_its_help_and_type():
    for accept, parse in (("", parse_text), (OPENMETRICS, parse_openmetrics)):
        shown = exposition([counted(), counted("renderer-2")], accept=accept)
        families = {family.name: family for family in parse(shown.body.decode())}
        for meter in METERS.values():
            family = families.pop(meter.name.removesuffix("_total"))
            assert (family.type, family.documentation) == (meter.kind, meter.help)
            first = [sample for sample in family.samples if "one" in sample.labels.values() or not meter.labels]
            values = {(sample.name, sample.labels.get("le")): sample.value for sample in first}
            each = 1 if meter.labels else 2  # without labels both series are one
            if meter.kind == "counter":
                assert values == {(meter.name, None): 4.0 * each}
            elif meter.kind == "gauge":
                assert values == {(meter.name, None): 3.0 * each}
            else:
                assert values[f"{meter.name}_count", None] == values[f"{meter.name}_bucket", "+Inf"] == 4
                assert values[f"{meter.name}_bucket", "0.1"] == 2
        assert families == {}


def test_a_counter_without_labels_is_there_before_it_counts():
    shown = exposition([]).body.decode()
    assert "farm_seats_expired_total 0.0" in shown
    assert "farm_seats " not in shown, "a gauge that nobody measured is no zero"


def test_sums_of_gone_and_living_processes_are_shown_as_one():
    tallies = Tallies()
    tallies.put(counted("renderer-1"), now=0)
    tallies.gone("renderer-1")
    tallies.put(counted("renderer-2"), now=0)
    shown = exposition([Snapshot("farm", "x", tallies.samples(now=1))]).body.decode()
    assert 'farm_refusals_total{code="one"} 4.0' in shown
    assert 'farm_renderers{state="one"} 1.5' in shown
