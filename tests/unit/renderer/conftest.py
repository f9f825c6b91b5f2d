"""A job of sixteen images, open in a store."""

from pathlib import Path

import pytest

from farm.ledger import Ledger
from farm.plan import Plan, PromptTable
from farm.storage.local import LocalStore
from farm.sweep import Template
from tests.unit.finished_jobs import make_plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Sixteen images that take 10 ms each, in shards of four; their prompts are a template's."""
    plan = make_plan(rows=8, seeds=2, shard_images=4)
    card = plan.card.model_copy(
        update={"defaults": plan.card.defaults.model_copy(update={"num_inference_steps": 1, "guidance_scale": 0.0})}
    )
    template = Template(text="shape {n}", vary={"n": tuple(str(n) for n in range(8))})
    table = PromptTable(rows=8, parts=0, keyed=False, digest="0" * 64, template=template)
    numerics = plan.numerics.model_copy(update={"versions": {}})
    return plan.model_copy(update={"prompts": table, "card": card, "params": card.defaults, "numerics": numerics})


@pytest.fixture
def ledger(tmp_path: Path, plan: Plan) -> Ledger:
    ledger = Ledger(LocalStore(tmp_path / "store"))
    ledger.open(plan.job)
    assert ledger.create_plan(plan, 1)
    return ledger
