"""Drafting, creating, resuming, appending, refusing; and dying between any two writes."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farm.cardparts import Acceleration
from farm.devices import DeviceInfo
from farm.errors import (
    ControlError,
    ManifestError,
    PlanChangedError,
    PromptError,
    RowsAppendedError,
    StoreFullError,
    UnknownModelError,
)
from farm.ledger import Ledger, Profile, Totals
from farm.manifest import load_manifest
from farm.plan import Plan, speed_identity
from farm.prompts import PromptReader
from farm.removal import delete_job
from farm.request import Speed, speed_of
from farm.settings import Settings
from farm.storage.local import LocalStore
from farm.submission import Request, Submission, draft, prepare, submit

CARD = """\
name: shapes
title: Shapes
family: sleep
source: {}
licence: none
dtypes: {cpu: [float32]}
batch: {cpu: 4}
defaults: {width: 64, height: 64, num_inference_steps: 8, guidance_scale: 2.5}
presets: {draft: {num_inference_steps: 4}}
"""
WARNED = CARD.replace(
    "presets: {",
    "licence_warning: for study alone\nnegative_prompts: {plain: 'blurry, ugly'}\n"
    "presets: {bold: {guidance_scale: 9, negative_prompt: '@plain', warning: its authors give 2.5}, ",
)
DEVICE = DeviceInfo("cpu", "a CPU", (), 2)
NOW = "2026-01-01T00:00:00Z"
HEAD = "name: job\nmodel: shapes\n"


class Bench:
    """A folder with a card, a manifest, prompt files and a store; random bits are 1, 2, 3, ..."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "cards").mkdir()
        (folder / "cards" / "shapes.yaml").write_text(CARD)
        self.settings = Settings(models=folder / "cards")
        self.ledger = Ledger(LocalStore(folder / "store"))
        self._numbers: Iterator[int] = itertools.count(1)

    def bits(self, count: int) -> int:
        return next(self._numbers)

    def request(self, text: str, *, renderers: int = 1) -> Request:
        (self.folder / "m.yaml").write_text(text)
        return prepare(load_manifest(self.folder / "m.yaml"), self.settings, device=DEVICE, renderers=renderers)

    def submit(self, text: str, *, append: bool = False) -> Submission:
        return submit(self.request(text), self.ledger, now=NOW, by="alice@desk", append=append, bits=self.bits)

    def prompts(self, plan: Plan) -> list[tuple[str, int]]:
        return [(spec.prompt, spec.seed) for spec in PromptReader(plan, self.ledger).specs(range(plan.images))]

    def finish(self, plan: Plan) -> None:
        totals = Totals(
            images=plan.images,
            ok=plan.images,
            failed=0,
            flagged=0,
            failures_by_code={},
            bytes=100 * plan.images,
            seconds={},
            renderers=1,
            started_at=NOW,
            finished_at=NOW,
            wall_seconds=1.0,
        )
        self.ledger.put_totals(plan, 1, totals)
        self.ledger.close(plan.job)

    def measure(self, seconds_per_image: float) -> None:
        """Leave a profile of the card's own size and steps."""
        self.ledger.put_profile(
            Profile(
                model="shapes",
                device="a CPU",
                seconds_per_image=seconds_per_image,
                width=64,
                height=64,
                num_inference_steps=8,
                batch=4,
                images=100,
                measured_at=NOW,
            )
        )

    def objects(self) -> list[str]:
        return [info.key for info in self.ledger.store.list("")]

    def jsonl(self, *ids: str, text: str = "prompt {}") -> None:
        lines = [json.dumps({"id": one, "prompt": text.format(one)}) for one in ids]
        (self.folder / "p.jsonl").write_text("\n".join(lines))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


INLINE = HEAD + "prompts: [one, two]\nseeds: {count: 2, from: random}\n"
KEYED = HEAD + "prompts: {file: p.jsonl, key: id}\nseeds: {count: 2, from: key}\n"


def test_new_job_writes_parts_marker_and_plan(bench: Bench) -> None:
    made = bench.submit(INLINE)
    assert made.outcome == "created"
    assert bench.objects() == [
        "jobs/job/00000001/prompts/part-00000.parquet",
        "jobs/job/plans/0001.json",
        "open/job",
    ]
    assert bench.ledger.plan("job") == made.plan
    assert (made.plan.images, made.plan.shards, made.plan.shard_images, made.plan.created_at) == (4, 1, 4, NOW)
    assert made.plan.numerics.threads == 2


def test_job_of_more_images_than_indexes_is_refused(bench: Bench) -> None:
    with pytest.raises(ManifestError) as caught:
        bench.submit(HEAD + "prompts: {template: 'a {b|c}', draw: 600000000}\nseeds: {count: 2}\n")
    assert caught.value.message.startswith(f"{bench.folder}/m.yaml:3: comes to 1,200,000,000 images, a job has at most")
    assert bench.objects() == []


def test_equal_manifest_resumes_and_draws_nothing_anew(bench: Bench) -> None:
    text = HEAD + "prompts: [one, two]\nseeds: [5, -1, -1]\n"
    first = bench.submit(text)
    assert first.plan.seeds.seeds == (5, 3, 4)
    again = bench.submit("# a comment\n" + text)
    assert (again.plan, again.outcome, again.numerics_differ) == (first.plan, "resumed", ())
    assert (again.changed, again.kept, bench.ledger.controls("job")) == ((), (), [])


def test_drawn_template_keeps_its_root(bench: Bench) -> None:
    text = HEAD + "prompts: {template: 'a {c}', vary: {c: [red, blue, green]}, draw: 50}\n"
    first = bench.submit(text)
    assert bench.submit(text).plan == first.plan
    assert first.plan.prompts.template is not None
    assert (first.plan.images, first.plan.prompts.parts) == (50, 0)


def test_inputs_may_move_as_long_as_their_content_stays(bench: Bench) -> None:
    bench.jsonl("a", "b")
    first = bench.submit(KEYED)
    (bench.folder / "p.jsonl").rename(bench.folder / "q.jsonl")
    assert bench.submit(KEYED.replace("p.jsonl", "q.jsonl")).plan == first.plan


def test_preset_that_comes_to_the_same_is_no_change(bench: Bench) -> None:
    first = bench.submit(INLINE + "preset: draft\n")
    assert bench.submit(INLINE + "params: {num_inference_steps: 4}\n").plan == first.plan


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (INLINE + "params: {guidance_scale: 1}\n", "params.guidance_scale: 2.5 -> 1.0"),
        (INLINE.replace("count: 2", "count: 3"), "seeds.count: 2 -> 3"),
        (INLINE.replace("random", "slot"), "seeds.from: 'random' -> 'slot'"),
        (INLINE + "output: {format: webp}\n", "output.format: 'png' -> 'webp'"),
        (INLINE + "sweep: {num_inference_steps: [4, 8]}\n", 'sweep: {} -> {"num_inference_steps": [4, 8]}'),
        (INLINE + "pilot: 2\n", "pilot: none -> 2"),
        (INLINE.replace("two", "2 x"), "prompts: other texts in the 2 rows, or another order"),
        (INLINE.replace("two", "two, three"), "prompts: 2 rows -> 3 rows"),
        (HEAD + "prompts: {template: one}\nseeds: {count: 2, from: random}\n", "prompts: rows -> a template"),
    ],
)
def test_changed_manifest_is_refused_with_what_changed(bench: Bench, text: str, change: str) -> None:
    bench.submit(INLINE)
    before = bench.objects()
    with pytest.raises(PlanChangedError) as caught:
        bench.submit(text)
    assert caught.value.message == (
        f"job job exists and was planned from something else: {change}. "
        "Give this manifest a new name, or put the old values back"
    )
    assert bench.objects() == before


def test_changed_template_is_refused_with_what_changed(bench: Bench) -> None:
    text = HEAD + "prompts: {template: 'a {c}', vary: {c: [red, blue]}}\n"
    bench.submit(text)
    with pytest.raises(PlanChangedError, match=r'prompts.vary: {"c": \["red", "blue"\]} -> {"c": \["red"\]}'):
        bench.submit(text.replace(", blue", ""))


def test_appended_rows_are_offered_and_then_rendered_alone(bench: Bench) -> None:
    bench.jsonl("a", "b")
    first = bench.submit(KEYED).plan
    bench.finish(first)
    bench.jsonl("c", "a", "b", "d")
    with pytest.raises(RowsAppendedError) as caught:
        bench.submit(KEYED)
    assert caught.value.message == (
        "job job exists and 2 rows were added to its prompts since; --append renders just those, as a new run of the job"
    )
    second = bench.submit(KEYED, append=True)
    assert second.outcome == "created"
    assert (second.plan.appended_to, second.plan.prompts.rows, second.plan.images) == (first.run, 2, 4)
    assert [prompt for prompt, _ in bench.prompts(second.plan)] == ["prompt c", "prompt c", "prompt d", "prompt d"]
    assert len(bench.ledger.plans("job")) == 2
    assert bench.ledger.open_jobs() == ["job"]
    assert bench.submit(KEYED).plan == second.plan
    bench.finish(second.plan)
    bench.jsonl("a", "b", "c", "d", "e")
    third = bench.submit(KEYED, append=True)
    assert [prompt for prompt, _ in bench.prompts(third.plan)] == ["prompt e", "prompt e"]


def test_appended_rows_have_the_seeds_they_would_have_had(bench: Bench) -> None:
    bench.jsonl("a", "b", "c")
    whole = bench.submit(KEYED.replace("name: job", "name: whole"))
    bench.jsonl("a", "b")
    first = bench.submit(KEYED).plan
    bench.finish(first)
    bench.jsonl("a", "b", "c")
    second = bench.submit(KEYED, append=True).plan
    assert bench.prompts(first) + bench.prompts(second) == bench.prompts(whole.plan)


def test_appended_rows_wait_for_the_run_in_hand(bench: Bench) -> None:
    bench.jsonl("a")
    first = bench.submit(KEYED).plan
    bench.jsonl("a", "b")
    waiting = bench.submit(KEYED, append=True)
    assert (waiting.plan, waiting.outcome, waiting.waiting_rows) == (first, "resumed", 1)


def test_rows_in_another_order_are_the_same_keyed_job(bench: Bench) -> None:
    bench.jsonl("a", "b", "c")
    first = bench.submit(KEYED)
    bench.jsonl("c", "a", "b")
    assert bench.submit(KEYED).plan == first.plan


def test_rows_that_changed_or_went_are_refused(bench: Bench) -> None:
    bench.jsonl("a", "b")
    bench.submit(KEYED)
    bench.jsonl("a", "b", text="other {}")
    with pytest.raises(PlanChangedError, match="prompts: 2 rows have other contents, the first of key 'a'"):
        bench.submit(KEYED)
    bench.jsonl("a", "c")
    with pytest.raises(PlanChangedError, match="prompts: 1 rows are gone") as caught:
        bench.submit(KEYED, append=True)
    assert not isinstance(caught.value, RowsAppendedError)


def test_rows_appended_where_seeds_follow_rows_are_a_change(bench: Bench) -> None:
    text = KEYED.replace("from: key", "from: slot")
    bench.jsonl("a")
    bench.submit(text)
    bench.jsonl("a", "b")
    with pytest.raises(PlanChangedError, match="prompts: 1 rows -> 2 rows"):
        bench.submit(text, append=True)


def test_other_versions_here_are_told_and_the_plan_keeps_its_own(bench: Bench) -> None:
    first = bench.submit(INLINE)
    here = first.plan.numerics.model_copy(
        update={"versions": {**first.plan.numerics.versions, "torch": "9.9"}, "threads": 7}
    )
    again = submit(replace(bench.request(INLINE), numerics=here), bench.ledger, now=NOW)
    assert again.plan == first.plan
    assert again.numerics_differ == ("threads: 2 -> 7", f"torch: {first.plan.numerics.versions['torch']} -> 9.9")


def test_packages_that_the_plan_does_not_name_count_for_nothing(bench: Bench) -> None:
    first = bench.submit(INLINE)
    here = first.plan.numerics.model_copy(update={"versions": {**first.plan.numerics.versions, "sharpening": "1"}})
    assert submit(replace(bench.request(INLINE), numerics=here), bench.ledger, now=NOW).numerics_differ == ()


def test_appended_rows_with_other_numerics_than_the_run_before_say_what_differs(bench: Bench) -> None:
    bench.jsonl("a")
    first = bench.submit(KEYED)
    bench.finish(first.plan)
    bench.jsonl("a", "b")
    here = first.plan.numerics.model_copy(update={"dtype": "bfloat16"})
    appended = submit(replace(bench.request(KEYED), numerics=here), bench.ledger, now=NOW, append=True)
    assert (appended.outcome, appended.plan.numerics, appended.plan.appended_to) == ("created", here, first.plan.run)
    assert appended.numerics_differ == ("dtype: float32 -> bfloat16",)


def test_finished_job_is_not_opened_again(bench: Bench) -> None:
    bench.finish(bench.submit(INLINE).plan)
    assert bench.submit(INLINE).outcome == "resumed"
    assert bench.ledger.open_jobs() == []


def test_resume_opens_an_unfinished_job_again(bench: Bench) -> None:
    bench.submit(INLINE)
    bench.ledger.close("job")
    bench.submit(INLINE)
    assert bench.ledger.open_jobs() == ["job"]


class _KilledError(BaseException):
    """Stands in for kill -9: nothing that catches errors catches it."""


def _dying(bench: Bench, survives: int) -> Callable[..., Any]:
    """Let so many writes through, then die before the next."""
    store, writes = bench.ledger.store, itertools.count()
    real = {name: getattr(store, name) for name in ("put", "create", "delete")}

    def guarded(name: str) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if next(writes) >= survives:
                raise _KilledError
            return real[name](*args, **kwargs)

        return write

    return guarded


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_death_between_any_two_writes_leaves_what_a_new_try_completes(
    bench: Bench, survives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        guarded = _dying(bench, survives)
        for name in ("put", "create", "delete"):
            patch.setattr(bench.ledger.store, name, guarded(name), raising=False)
        with pytest.raises(_KilledError):
            bench.submit(INLINE)
    assert bench.ledger.plans("job") == []
    made = bench.submit(INLINE)
    assert made.outcome == "created"
    assert len(bench.prompts(made.plan)) == 4
    assert bench.ledger.open_jobs() == ["job"]


def test_bad_row_leaves_nothing_behind(bench: Bench) -> None:
    good = [json.dumps({"id": n, "prompt": f"p{n}"}) for n in range(70_000)]
    (bench.folder / "p.jsonl").write_text("\n".join([*good, '{"id": 70001, "prompt": ""}']))
    with pytest.raises(PromptError, match=r"p\.jsonl:70001: the prompt is empty; write one, or take the row out"):
        bench.submit(KEYED)
    assert bench.objects() == []


def test_full_store_is_reported_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise StoreFullError("no space left")

    monkeypatch.setattr(bench.ledger, "put_prompt_part", full)
    with pytest.raises(StoreFullError, match="no space left"):
        bench.submit(INLINE)


def test_losing_the_race_means_resuming_the_winners_plan(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.ledger.create_plan
    winner: list[Plan] = []

    def racing(plan: Plan, number: int) -> bool:
        if not winner:
            winner.append(plan.model_copy(update={"run": "feedbeef"}))
            source = bench.ledger.prompt_part(plan, 0)
            bench.ledger.put_prompt_part("job", "feedbeef", 0, source)
            assert real(winner[0], number)
        return real(plan, number)

    monkeypatch.setattr(bench.ledger, "create_plan", racing)
    made = bench.submit(INLINE)
    assert (made.plan.run, made.outcome) == ("feedbeef", "resumed")
    assert [key for key in bench.objects() if "part-" in key] == ["jobs/job/feedbeef/prompts/part-00000.parquet"]


def test_draft_says_what_it_comes_to_and_writes_nothing(bench: Bench) -> None:
    text = HEAD + "prompts: [one, two, three]\nseeds: {count: 2, from: shared}\nsweep: {width: [64, 128]}\n"
    made = draft(bench.request(text), bench.ledger, now=NOW)
    assert (made.plan.images, made.plan.shards, made.state, made.drawn) == (12, 3, "new", False)
    assert made.sizes == {(64, 64): 6, (128, 64): 6}
    assert [(spec.prompt, spec.seed, spec.params.width) for spec in made.first][:3] == [
        ("one", 0, 64),
        ("one", 0, 128),
        ("two", 0, 64),
    ]
    assert (made.seconds, made.speed.source) == (None, "unknown")
    assert bench.objects() == []


def test_draft_counts_sizes_of_rows(bench: Bench) -> None:
    (bench.folder / "p.csv").write_text("prompt,w\na,128\nb,\nc,128\n")
    made = draft(bench.request(HEAD + "prompts: {file: p.csv, per_row: {width: w}}\nseeds: {count: 3}\n"), now=NOW)
    assert made.sizes == {(128, 64): 6, (64, 64): 3}


def test_draft_knows_the_job_that_exists(bench: Bench) -> None:
    bench.jsonl("a")
    plan = bench.submit(KEYED).plan
    assert draft(bench.request(KEYED), bench.ledger, now=NOW).plan == plan
    assert draft(bench.request(KEYED), bench.ledger, now=NOW).state == "resume"
    changed = draft(bench.request(KEYED + "params: {guidance_scale: 1}\n"), bench.ledger, now=NOW)
    assert (changed.state, changed.changes) == ("changed", ("params.guidance_scale: 2.5 -> 1.0",))
    bench.jsonl("a", "b")
    appended = draft(bench.request(KEYED), bench.ledger, now=NOW)
    assert (appended.state, appended.changes) == ("appended", ("prompts: 1 rows added",))


def test_time_is_measured_scaled_or_unknown(bench: Bench) -> None:
    bench.measure(0.5)
    text = HEAD + "prompts: [one, two]\nseeds: {count: 100}\n"
    measured = draft(bench.request(text, renderers=2), bench.ledger, now=NOW)
    assert (measured.seconds, measured.speed.source) == (50.0, "measured")
    scaled = draft(bench.request(text + "preset: draft\n"), bench.ledger, now=NOW)
    assert (scaled.seconds, scaled.speed.source) == (50.0, "estimated")


def test_a_speed_without_acceleration_is_none_of_a_card_with_it(bench: Bench) -> None:
    bench.measure(0.5)
    request = bench.request(HEAD + "prompts: [one]\n")
    quick = Acceleration(attention="_native_cudnn")
    card = request.card.model_copy(update={"acceleration": {request.numerics.device: quick}})
    accelerated = replace(request, card=card)
    assert speed_of(accelerated, bench.ledger).source == "unknown"
    profile = bench.ledger.profile("shapes", "a CPU")
    assert profile is not None
    bench.ledger.put_profile(profile.model_copy(update={"acceleration": quick, "seconds_per_image": 0.25}))
    assert speed_of(accelerated, bench.ledger).seconds_per_image == 0.25
    assert speed_of(request, bench.ledger).seconds_per_image == 0.5


def test_the_speed_of_a_pool_of_several_kinds_is_what_they_come_to_side_by_side(bench: Bench) -> None:
    bench.measure(0.5)
    profile = bench.ledger.profile("shapes", "a CPU")
    assert profile is not None
    request = replace(bench.request(HEAD + "prompts: [one]\n"), device="slow", others=("a CPU", "a CPU"), renderers=3)
    alone = speed_of(request, bench.ledger)  # nothing is known of the slow one
    assert (alone.seconds_per_image, alone.source) == (0.5, "estimated")
    bench.ledger.put_profile(profile.model_copy(update={"device": "slow", "seconds_per_image": 2.0}))
    whole = speed_of(request, bench.ledger)
    assert (whole.seconds_per_image, whole.source) == (pytest.approx(3 / (1 / 2.0 + 2 / 0.5)), "measured")
    assert speed_of(replace(request, device="a CPU", others=("slow", "a CPU")), bench.ledger) == whole
    assert speed_of(replace(request, renderers=1), bench.ledger).seconds_per_image == 2.0


def test_the_speed_of_other_weights_is_an_estimate(bench: Bench) -> None:
    bench.measure(0.5)
    request = bench.request(HEAD + "prompts: [one]\n")
    profile = bench.ledger.profile("shapes", "a CPU")
    assert profile is not None
    mine = profile.model_copy(update={"identity": speed_identity(request.card, request.numerics)})
    bench.ledger.put_profile(mine)
    assert speed_of(request, bench.ledger).source == "measured"
    bench.ledger.put_profile(mine.model_copy(update={"identity": "of other weights"}))
    assert speed_of(request, bench.ledger) == Speed(0.5, "estimated")


def test_draft_of_random_seeds_says_that_they_will_be_drawn(bench: Bench) -> None:
    assert draft(bench.request(INLINE), now=NOW).drawn
    assert draft(bench.request(HEAD + "prompts: [a]\nseeds: [-1]\n"), now=NOW).drawn
    assert draft(bench.request(HEAD + "prompts: {template: 'a {b|c}'}\n"), now=NOW).drawn
    assert not draft(bench.request(HEAD + "prompts: {template: 'a {b|c}', seed: 1}\n"), now=NOW).drawn


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "name: job\nmodel: shape\nprompts: [a]\n",
            UnknownModelError,
            ":2: no model card is called 'shape'; did you mean shapes?",
        ),
        (
            HEAD + "prompts: [a]\npreset: drafts\n",
            ManifestError,
            ":4: shapes has no preset 'drafts'; did you mean draft?",
        ),
        (
            HEAD + "prompts: [a]\nparams:\n  width: 70\n",
            ManifestError,
            ":5: params.width: 70 in 70x64 is not a multiple of 16, as shapes needs; nearest is 64x64",
        ),
        (
            HEAD + "prompts: [a]\nsweep: {num_inference_steps: [4, 400]}\n",
            ManifestError,
            ":4: sweep.num_inference_steps: 400 is more than shapes's 200; lower it",
        ),
    ],
)
def test_what_the_card_cannot_is_refused_with_its_line(
    bench: Bench, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        bench.request(text)
    assert str(caught.value).removeprefix(f"{bench.folder}/m.yaml").startswith(message)


def test_template_fault_names_its_line(bench: Bench) -> None:
    with pytest.raises(ManifestError) as caught:
        bench.submit(HEAD + "prompts:\n  template: 'a {c}'\n")
    assert caught.value.message.startswith(f"{bench.folder}/m.yaml:4: prompts.template: variable {{c}} has no values")


def test_only_a_template_with_draws_has_a_root_of_its_own(bench: Bench) -> None:
    plain = bench.submit(HEAD + "prompts: {template: 'a {x}', vary: {x: [b, c]}}\n").plan
    drawn = bench.submit("name: drawn\nmodel: shapes\nprompts: {template: 'a {b|c}'}\n").plan
    assert plain.prompts.template is not None
    assert drawn.prompts.template is not None
    assert plain.prompts.template.root == 0
    assert drawn.prompts.template.root > 0


LIMITED = INLINE + "priority: 60\nfinish_by: 2026-02-01T00:00Z\nbudget: {gpu_hours: 2, images: 100}\n"


def test_a_job_has_the_owner_of_the_settings(bench: Bench) -> None:
    assert bench.submit(INLINE).plan.owner == ""
    bench.settings = bench.settings.model_copy(update={"owner": "alice"})
    assert bench.submit(INLINE.replace("job", "hers")).plan.owner == "alice"


def test_limits_that_the_manifest_states_anew_are_said_to_the_job(bench: Bench) -> None:
    first = bench.submit(LIMITED)
    assert (first.changed, first.kept) == ((), ())
    again = bench.submit(
        LIMITED.replace("60", "80").replace("T00:00Z", "T08:00+08:00").replace("images: 100", "images: 5")
    )
    assert (again.plan, again.changed, again.kept) == (
        first.plan,
        ("priority: 60 -> 80", "budget.images: 100 -> 5"),
        (),
    )
    (control,) = bench.ledger.controls("job")
    assert (control.action, control.by, control.at) == ("change", "alice@desk", NOW)
    assert (control.priority, control.max_images, control.gpu_hours, control.finish_by) == (80, 5, None, None)
    back = bench.submit(LIMITED)
    assert (back.changed, back.kept) == ((), ("priority: 80", "budget.images: 5")), (
        "what was said since stays, and is told"
    )


def test_limits_that_the_manifest_leaves_out_stay_and_are_told(bench: Bench) -> None:
    bench.submit(LIMITED)
    again = bench.submit(INLINE)
    assert again.changed == ()
    assert again.kept == ("finish_by: 2026-02-01T00:00:00+00:00", "budget.gpu_hours: 2", "budget.images: 100")
    assert bench.ledger.controls("job") == []


def test_limits_of_appended_rows_are_said_to_the_job_too(bench: Bench) -> None:
    bench.jsonl("a")
    bench.finish(bench.submit(KEYED).plan)
    bench.jsonl("a", "b")
    appended = bench.submit(KEYED + "priority: 90\n", append=True)
    assert (appended.outcome, appended.changed) == ("created", ("priority: 50 -> 90",))
    assert [control.priority for control in bench.ledger.controls("job")] == [90]


def test_a_done_job_has_no_limits_to_change(bench: Bench) -> None:
    bench.finish(bench.submit(INLINE).plan)
    assert bench.submit(INLINE + "priority: 90\n").changed == ()
    assert bench.ledger.controls("job") == []


def test_a_finish_by_that_has_passed_is_refused(bench: Bench) -> None:
    text = INLINE + "finish_by: 2025-12-31T23:00Z\n"
    for act in (bench.submit, lambda text: draft(bench.request(text), bench.ledger, now=NOW)):
        with pytest.raises(ManifestError) as caught:
            act(text)
        assert caught.value.message == (
            f"{bench.folder}/m.yaml:5: finish_by: 2025-12-31T23:00:00+00:00 has passed; give a later moment, or leave it out"
        )
    assert bench.objects() == []
    bench.submit(INLINE)
    with pytest.raises(ManifestError, match=r"finish_by: 2025-12-31T23:00:00\+00:00 has passed"):
        bench.submit(text)
    assert bench.ledger.controls("job") == []


def test_a_job_whose_time_passed_is_resumed_all_the_same(bench: Bench) -> None:
    bench.submit(LIMITED)
    again = submit(bench.request(LIMITED), bench.ledger, now="2026-03-01T00:00:00Z")
    assert (again.outcome, again.changed) == ("resumed", ())


def test_a_deleted_job_is_refused_until_it_is_gone(bench: Bench) -> None:
    bench.submit(INLINE)
    bench.ledger.store.put("deleted/job", b"")
    before = bench.objects()
    for act in (bench.submit, lambda text: draft(bench.request(text), bench.ledger, now=NOW)):
        with pytest.raises(ControlError, match="job job is being deleted; run farm delete job again, which ends it"):
            act(INLINE)
    assert bench.objects() == before
    for key in before:
        bench.ledger.store.delete(key)
    assert bench.submit(INLINE).outcome == "created"


def test_a_delete_while_a_job_is_created_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.ledger.create_plan

    def deleted_meanwhile(plan: Plan, number: int) -> bool:
        bench.ledger.store.put("deleted/job", b"")
        return real(plan, number)

    monkeypatch.setattr(bench.ledger, "create_plan", deleted_meanwhile)
    with pytest.raises(ControlError, match="job job is being deleted"):
        bench.submit(INLINE)


def test_what_was_said_to_a_deleted_job_of_the_name_holds_for_no_new_one(bench: Bench) -> None:
    bench.ledger.append_control("job", "cancel", at=NOW, by="bob@desk")
    bench.ledger.append_control("job-2", "cancel", at=NOW, by="bob@desk")
    assert bench.submit(INLINE).outcome == "created"
    assert bench.ledger.controls("job") == []
    assert len(bench.ledger.controls("job-2")) == 1


def test_what_was_said_to_the_winner_of_a_race_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.ledger.open

    def overtaken(job: str) -> None:
        monkeypatch.setattr(bench.ledger, "open", real)
        assert bench.submit(INLINE).outcome == "created"
        bench.ledger.append_control("job", "pause", at=NOW, by="bob@desk")
        real(job)

    monkeypatch.setattr(bench.ledger, "open", overtaken)
    assert bench.submit(INLINE).outcome == "resumed"
    assert [control.action for control in bench.ledger.controls("job")] == ["pause"]


def test_limits_stated_anew_while_the_job_is_deleted_hold_for_no_later_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit(INLINE)
    real = bench.ledger.store.create

    def deleted_meanwhile(key: str, data: bytes, **options: str) -> bool:
        monkeypatch.setattr(bench.ledger.store, "create", real)
        delete_job(bench.ledger, "job", at=NOW, by="bob@desk")
        return real(key, data, **options)

    monkeypatch.setattr(bench.ledger.store, "create", deleted_meanwhile)
    with pytest.raises(ControlError, match="job was deleted meanwhile, so change was taken back"):
        bench.submit(INLINE + "priority: 80\n")
    assert bench.objects() == []


def test_a_pilot_is_cut_for_all_renderers_and_the_others_as_ever(bench: Bench) -> None:
    text = HEAD + "prompts: [a]\nseeds: {count: 100000}\npilot: 64\n"
    bench.measure(1.0)
    plan = submit(bench.request(text, renderers=2), bench.ledger, now=NOW).plan
    assert (plan.pilot, plan.pilot_shard_images, plan.shard_images) == (64, 8, 180)
    assert plan.estimated_seconds_per_image == 1.0
    assert plan.shards == 8 + -(-99_936 // 180)


def test_appended_rows_have_no_pilot_of_their_own(bench: Bench) -> None:
    bench.jsonl("a", "b")
    text = KEYED + "pilot: 2\n"
    first = bench.submit(text).plan
    assert (first.pilot, first.pilot_shard_images) == (2, 4)
    bench.finish(first)
    bench.jsonl("a", "b", "c", "d")
    assert bench.submit(text, append=True).waiting_rows == 2
    bench.ledger.open_pass(first, 2, None)
    bench.ledger.put_totals(first, 2, bench.ledger.totals(first, 1))
    second = bench.submit(text, append=True).plan
    assert (second.appended_to, second.pilot) == (first.run, None)


def test_draft_tells_whether_limits_are_kept(bench: Bench) -> None:
    bench.measure(36.0)
    text = HEAD + "prompts: [one, two]\nseeds: {count: 100}\nfinish_by: 2026-01-01T01:00Z\nbudget: {gpu_hours: 1.9}\n"
    found = draft(bench.request(text), bench.ledger, now=NOW).outlook
    assert (found.seconds_left, found.seconds_needed, found.renderers_needed, found.in_time) == (
        3600.0,
        7200.0,
        2,
        False,
    )
    assert (found.gpu_hours_needed, found.images_needed, found.within_budget) == (2.0, 200, False)
    bench.submit(text)
    later = draft(bench.request(text.replace("1.9", "2.5") + "priority: 9\n"), bench.ledger, now=NOW)
    assert later.changes == ("priority: 50 -> 9", "budget.gpu_hours: 1.9 -> 2.5")
    assert (later.state, later.outlook.within_budget, later.outlook.limits.priority) == ("resume", True, 9)


def test_draft_of_a_job_that_is_half_done_counts_what_is_left(bench: Bench) -> None:
    bench.jsonl("a", "b")
    text = KEYED + "finish_by: 2026-01-01T01:00Z\n"
    bench.measure(10.0)
    plan = bench.submit(text).plan
    assert draft(bench.request(text), bench.ledger, now=NOW).outlook.seconds_needed == 40.0
    bench.finish(plan)
    assert draft(bench.request(text), bench.ledger, now=NOW).outlook.seconds_needed == 0.0
    bench.jsonl("a", "b", "c")
    appended = draft(bench.request(text), bench.ledger, now=NOW)
    assert (appended.state, appended.outlook.seconds_needed, appended.outlook.images_needed) == ("appended", 20.0, 6)


def warned(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    (tmp_path / "cards" / "shapes.yaml").write_text(WARNED)
    return bench


def test_a_card_warns_of_its_licence_and_of_a_preset(tmp_path: Path) -> None:
    bench = warned(tmp_path)
    assert [one.code for one in bench.request(HEAD + "prompts: [a]\n").warnings] == ["licence"]
    licence, preset = bench.request(HEAD + "preset: bold\nprompts: [a]\n").warnings
    assert (licence.code, licence.text) == ("licence", "shapes is under none: for study alone")
    assert (preset.code, preset.text) == ("preset", "preset bold of shapes: its authors give 2.5")


def test_negative_prompts_go_by_name_in_presets_params_sweeps_and_rows(tmp_path: Path) -> None:
    bench = warned(tmp_path)
    (tmp_path / "p.csv").write_text("prompt,not\na,@plain\nb,@@home\nc,\nd,text\n")
    assert bench.request(HEAD + "preset: bold\nprompts: [a]\n").params.negative_prompt == "blurry, ugly"
    text = HEAD + "params: {negative_prompt: '@@plain'}\nprompts: {file: p.csv, per_row: {negative_prompt: not}}\n"
    plan = bench.submit(text.replace("p.csv", str(tmp_path / "p.csv"))).plan
    specs = PromptReader(plan, bench.ledger).specs(range(plan.images))
    assert [spec.params.negative_prompt for spec in specs] == ["blurry, ugly", "@home", "@plain", "text"]
    swept = bench.request(HEAD + "sweep: {negative_prompt: ['', '@plain']}\nprompts: [a]\n")
    assert [point.negative_prompt for point in swept.points] == ["", "blurry, ugly"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "params: {negative_prompt: '@plan'}\nprompts: [a]\n",
            "m.yaml:3: params.negative_prompt '@plan': shapes has no",
        ),
        (
            "sweep: {negative_prompt: ['@plan']}\nprompts: [a]\n",
            "m.yaml:3: sweep.negative_prompt '@plan': shapes has no",
        ),
    ],
)
def test_a_negative_prompt_that_no_card_has_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        warned(tmp_path).request(HEAD + text)
    assert caught.value.message.removeprefix(f"{tmp_path}/").startswith(message)
    assert "; did you mean @plain? (@@ begins a text with an @)" in caught.value.message


def test_a_row_that_names_no_negative_prompt_of_the_card_is_refused(tmp_path: Path) -> None:
    bench = warned(tmp_path)
    (tmp_path / "p.csv").write_text("prompt,not\na,@plain\nb,@none\n")
    text = f"{HEAD}prompts: {{file: {tmp_path / 'p.csv'}, per_row: {{negative_prompt: not}}}}\n"
    with pytest.raises(PromptError, match=r"p\.csv:3: negative_prompt '@none': shapes has no .*; it has @plain"):
        bench.submit(text)
