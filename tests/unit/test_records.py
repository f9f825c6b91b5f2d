"""The ledger's small records: what is worked out from them."""

import pytest

from farm.records import DEVICE_STAGES, device_seconds
from tests.unit.finished_jobs import make_totals


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, 0.0),
        ({"write": 9.0, "fetch": 2.0}, 0.0),
        ({"load": 1.0, "encode": 2.0, "denoise": 3.0, "decode": 4.0, "write": 50.0}, 10.0),
    ],
)
def test_seconds_of_stages_beside_the_device_are_not_the_devices(seconds: dict[str, float], expected: float) -> None:
    assert device_seconds(seconds) == expected
    assert make_totals(seconds=seconds).gpu_seconds == expected


def test_each_stage_on_the_device_counts_once() -> None:
    assert device_seconds(dict.fromkeys(DEVICE_STAGES, 1.0)) == len(DEVICE_STAGES)
