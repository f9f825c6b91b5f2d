"""Short rounds of `tests.chaos`, strict: whatever is done to a farm, nothing is lost and every exit is explained.

`CHAOS_SEED` draws other moments; `make chaos` draws its own, and is long. A round's story is in what the test printed.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.chaos.bench import Bench, Size, bench
from tests.chaos.namespaces import unavailable
from tests.chaos.nodes import cut
from tests.chaos.rounds import kills
from tests.integration.servers import S3Server

SHORT = Size(events=0, images=96, renderers=1, steps=4, longest_s=9.0)
SEED = os.environ.get("CHAOS_SEED")

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def shared(s3_server: S3Server) -> Iterator[Bench]:
    with bench(s3_server.folder) as made:
        yield made


def test_nothing_is_lost_whatever_is_killed(shared: Bench) -> None:
    size = replace(SHORT, events=6)
    happened = kills(shared, size, int(SEED or 1))
    print(happened)
    assert len(happened["happened"]) == size.events


def test_nothing_is_lost_when_nodes_are_cut_off_and_come_back(shared: Bench) -> None:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    size = replace(SHORT, events=1)
    happened = cut(shared, size, int(SEED or 56))
    print(happened)
    assert len(happened["happened"]) == size.events
