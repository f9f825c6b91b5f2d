import json

from tests.unit.cli.conftest import FakeFarm, Place


def test_plan_counts_and_writes_nothing(farm: Place) -> None:
    ended = farm("plan", farm.manifest(sweep={"num_inference_steps": [2, 4]}))
    assert ended.code == 0
    assert ended.out.startswith("shapes: 20 images in ")
    assert "  state      a new job\n" in ended.out
    assert "  images     5 prompts × 2 sweep points × 2 seeds\n" in ended.out
    assert "  sizes      64×64: 20\n" in ended.out
    assert "  time       unknown: nothing of the kind was rendered on this device yet\n" in ended.out
    assert ", num_inference_steps 2\n" in ended.out
    assert not farm.store.exists()


def test_plan_as_json_has_the_first_images(farm: Place) -> None:
    record = json.loads(farm("plan", farm.manifest(), "--json").out)
    assert (record["images"], record["prompts"], record["seeds"], record["state"]) == (10, 5, 2, "new")
    assert record["first"][0]["prompt"] == "shape number 0"
    assert record["speed_source"] == "unknown"


def test_plan_of_a_job_that_is_there_says_what_a_render_would_do(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest())
    assert "planned from just this" in farm("plan", farm.manifest()).out
    ended = farm("plan", farm.manifest(seeds={"count": 3}))
    assert "planned from something else" in ended.out
    assert "seeds.count: 2 -> 3" in ended.out
    assert ended.code == 0
