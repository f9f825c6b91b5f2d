"""Which prompts are looked at."""

import pyarrow as pa

from farm.samples import LOOK_ROWS, Sample, Sampler, template_samples
from farm.sources import Chunk
from farm.sweep import Template, TemplatePrompts


def add(sampler: Sampler, *texts: str, listed: bool = False) -> None:
    chunk = Chunk("a.txt", {}, len(texts), range(11, 11 + len(texts)), "line")
    sampler.add(chunk, pa.table({"prompt": list(texts)}), listed=listed)


def test_a_prompt_is_taken_once_where_it_first_stands() -> None:
    sampler = Sampler(most=3)
    add(sampler, "a", "b", "a")
    add(sampler, "b", "c")
    assert sampler.samples.prompts == (
        Sample(0, "a.txt:11", "a"),
        Sample(1, "a.txt:12", "b"),
        Sample(4, "a.txt:12", "c"),
    )
    assert sampler.samples.whole


def test_a_prompt_too_many_is_not_looked_at_and_is_known_of() -> None:
    sampler = Sampler(most=2)
    add(sampler, "a", "b", "b", "c", "d", listed=True)
    assert [sample.where for sample in sampler.samples.prompts] == ["", ""]
    assert (sampler.full, sampler.samples.whole) == (True, False)


def test_rows_are_not_searched_for_ever() -> None:
    sampler = Sampler(most=2)
    add(sampler, *["a"] * (2 * LOOK_ROWS), "b")
    assert [sample.prompt for sample in sampler.samples.prompts] == ["a"]
    assert not sampler.samples.whole


def test_a_template_s_first_prompts_are_taken() -> None:
    prompts = TemplatePrompts(Template(text="{a} {b}", vary={"a": ("x", "x"), "b": ("1", "2", "3")}))
    assert [sample.prompt for sample in template_samples(prompts, 4).prompts] == ["x 1", "x 2", "x 3"]
    assert not template_samples(prompts, 4).whole
    assert template_samples(prompts, 6).whole
