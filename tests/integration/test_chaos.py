"""A short round of `tests.chaos`: one of each kind of process is killed while a small job is rendered into S3.

`CHAOS_SEED` draws another order and other moments; `make chaos` draws its own and kills more.
"""

import os
from pathlib import Path

import pytest

from tests.chaos import KINDS, run


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_nothing_is_lost_whatever_is_killed(tmp_path: Path, s3_server: object) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    happened = run(seed=seed, kills=len(KINDS), images=96, renderers=1, steps=4, folder=tmp_path)
    assert sorted(happened["killed"]) == sorted(KINDS)
