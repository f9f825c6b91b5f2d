"""Templates and sweeps by arithmetic equal those built naively."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.errors import ManifestError
from farm.modelcard import ParamOverrides
from farm.sweep import Template, TemplatePrompts, sweep_points

LISTS = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.text("xyz", min_size=1, max_size=3), min_size=1, max_size=4), min_size=1
)


@given(LISTS)
def test_product_by_row_equals_the_naive_product(lists: dict[str, list[str]]) -> None:
    text = "; ".join(f"{{{name}}}" for name in lists)
    prompts = TemplatePrompts(Template(text=text, vary={name: tuple(values) for name, values in lists.items()}))
    naive = ["; ".join(values) for values in itertools.product(*lists.values())]
    assert [prompts.row(at) for at in range(prompts.rows)] == naive
    assert len(prompts) == len(naive)


@given(st.integers(0, 2**32), st.integers(1, 10**12), st.data())
def test_drawn_rows_depend_on_root_and_row_alone(root: int, draw: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, draw - 1))
    one = Template(text="{c} {a|b|c}", vary={"c": ("red", "blue")}, draw=draw, root=root)
    shorter = one.model_copy(update={"draw": row + 1})
    assert TemplatePrompts(one).row(row) == TemplatePrompts(shorter).row(row)


def test_draws_and_choices_come_out_about_even() -> None:
    prompts = TemplatePrompts(Template(text="{c} {a|b}", vary={"c": ("red", "blue")}, draw=4000, root=3))
    counts = dict.fromkeys(("red a", "red b", "blue a", "blue b"), 0)
    for text in prompts:
        counts[text] += 1
    assert all(900 < count < 1100 for count in counts.values())


def test_zip_goes_side_by_side() -> None:
    prompts = TemplatePrompts(
        Template(text="{c} {s}", vary={"c": ("red", "blue"), "s": ("star", "ball")}, combine="zip")
    )
    assert list(prompts) == ["red star", "blue ball"]


def test_doubled_braces_are_braces() -> None:
    assert TemplatePrompts(Template(text="{{x}} {c}}}", vary={"c": ("red",)})).row(0) == "{x} red}"


def test_same_variable_twice_is_the_same_value() -> None:
    assert list(TemplatePrompts(Template(text="{c} on {c}", vary={"c": ("red", "blue")}))) == [
        "red on red",
        "blue on blue",
    ]


def test_ten_billion_rows_take_no_memory() -> None:
    values = tuple(f"v{number}" for number in range(100_000))
    prompts = TemplatePrompts(Template(text="{a} {b}", vary={"a": values, "b": values}))
    assert prompts.rows == 10**10
    assert prompts.row(10**10 - 1) == "v99999 v99999"
    with pytest.raises(IndexError, match="prompts 0 to 9999999999, not 10000000000"):
        prompts.row(10**10)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            Template(text="a {colour} ball", vary={"color": ("red",)}),
            "prompts.template: variable {colour} has no values; add colour: [...] to prompts.vary (which has: color)",
        ),
        (
            Template(text="a ball", vary={"c": ("red",)}),
            "prompts.vary: c is not used in the template; write {c} there, or take it out",
        ),
        (
            Template(text="{c} {s}", vary={"c": ("red",), "s": ("a", "b")}, combine="zip"),
            "prompts.vary: combine: zip needs lists of one length, got c 1, s 2; even them out, or use combine: product",
        ),
        (Template(text="{c}", vary={"c": ()}), "prompts.vary: c is an empty list; give it at least one value"),
        (Template(text="a {c"), "prompts.template: `{` at character 3 is never closed; write `{{` for a brace"),
        (Template(text="a {c {d}}"), "prompts.template: `{` at character 3 is never closed; write `{{` for a brace"),
        (Template(text="a } b"), "prompts.template: `}` at character 3 closes nothing; write `}}` for a brace"),
        (
            Template(text="{}"),
            "prompts.template: {} at character 1 is neither a variable's name nor a choice {a|b}; "
            "a name has letters, digits and _; write {{ and }} for braces",
        ),
    ],
)
def test_template_that_means_nothing_is_refused(template: Template, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        TemplatePrompts(template)
    assert caught.value.message == message


def test_sweep_points_are_the_product_last_list_fastest() -> None:
    points = sweep_points({"num_inference_steps": [4, 8], "guidance_scale": [1, 2.5]})
    assert [(point.num_inference_steps, point.guidance_scale) for point in points] == [
        (4, 1),
        (4, 2.5),
        (8, 1),
        (8, 2.5),
    ]


def test_no_sweep_is_one_empty_point() -> None:
    assert sweep_points({}) == (ParamOverrides(),)


def test_sweep_of_too_many_points_is_refused() -> None:
    with pytest.raises(ManifestError, match="sweep: 10201 points, at most 10000 are allowed; shorten a list"):
        sweep_points({"width": range(1, 102), "height": range(1, 102)})
