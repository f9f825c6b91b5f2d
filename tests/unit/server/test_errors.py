"""Errors as answers."""

import json
import logging

import pytest

from farm import errors
from farm.server.errors import OPERATORS, STATUSES, answer_of, error_answer, fault, scrubbed, status_of, told


def every_error() -> list[type[errors.FarmError]]:
    found = [errors.FarmError]
    for known in found:
        found += known.__subclasses__()
    return sorted(set(found), key=lambda one: one.__name__)


@pytest.mark.parametrize("kind", every_error())
def test_every_error_of_ours_has_a_status_and_openais_shape(kind):
    answer = answer_of(kind("it is so"))
    assert answer.status_code in (400, 401, 403, 404, 409, 429, 500, 503)
    body = json.loads(answer.body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    message = next((text for root, text in OPERATORS.items() if issubclass(kind, root)), "it is so")
    assert (body["error"]["message"], body["error"]["code"]) == (message, kind.code)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UnauthorizedError("x"), 401),
        (errors.ForbiddenError("x"), 403),
        (errors.UnknownJobError("x"), 404),
        (errors.UnknownModelError("x"), 404),
        (errors.UnknownImageError("x"), 404),
        (errors.UnknownRendererError("x"), 404),
        (errors.RowsAppendedError("x"), 409),
        (errors.ControlError("x"), 409),
        (errors.ManifestError("x"), 400),
        (errors.RequestError("x"), 400),
        (errors.PlacementError("x"), 400),
        (errors.LimitedError("x"), 429),
        (errors.BusyError("x"), 503),
        (errors.FarmUnavailableError("x"), 503),
        (errors.NodeDiedError("x"), 503),
        (errors.StoreUnavailableError("x"), 503),
        (errors.StoreDeniedError("x"), 503),
        (errors.StoreFullError("x"), 503),
        (errors.ModelCardError("x"), 503),
        (errors.OutOfMemoryError("x"), 500),
    ],
)
def test_statuses(error, status):
    assert status_of(error) == status


def test_the_table_of_statuses_names_a_class_before_its_root():
    for at, (kind, _) in enumerate(STATUSES):
        assert not any(issubclass(kind, earlier) for earlier, _ in STATUSES[:at]), kind


def test_what_may_be_tried_again_says_when():
    assert answer_of(errors.LimitedError("x", 12.2)).headers["retry-after"] == "13"
    assert answer_of(errors.BusyError("x", 0.1)).headers["retry-after"] == "1"
    assert answer_of(errors.BusyError("x")).headers["retry-after"] == "5"
    assert answer_of(errors.FarmUnavailableError("x")).headers["retry-after"] == "5"
    assert "retry-after" not in answer_of(errors.ControlError("x")).headers


def test_a_missing_key_says_how_to_send_one():
    assert answer_of(errors.UnauthorizedError("x")).headers["www-authenticate"] == 'Bearer realm="farm"'


def test_param_is_the_field_to_mend():
    assert json.loads(answer_of(errors.RequestError("x", "size")).body)["error"]["param"] == "size"
    assert json.loads(answer_of(errors.UnknownModelError("x")).body)["error"]["param"] == "model"


def test_a_long_message_is_cut():
    message = json.loads(error_answer(400, "x" * 5000).body)["error"]["message"]
    assert len(message) == 2003
    assert message.endswith("...")


def test_what_validation_says_names_field_and_value():
    errors_found = [
        {"type": "int_parsing", "loc": ("body", "n"), "msg": "Input should be a valid integer", "input": "x" * 500}
    ]
    message, param = fault(errors_found)
    assert message.startswith('n: should be a valid integer, got "xxx')
    assert len(message) < 160
    assert param == "n"
    assert fault([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}]) == (
        "the body is missing; give it",
        None,
    )
    too_many = {"type": "too_long", "loc": ("body", "prompts"), "msg": "Tuple ...", "input": []}
    assert fault([too_many | {"ctx": {"field_type": "Tuple", "max_length": 64, "actual_length": 65}}]) == (
        "prompts: has 65 items, at most 64 are taken; send less",
        "prompts",
    )


@pytest.mark.parametrize("kind", [errors.StoreDeniedError, errors.StoreFullError])
def test_a_store_that_cannot_be_written_is_the_operators_affair(kind, caplog):
    with caplog.at_level(logging.ERROR):
        answer = answer_of(kind("/srv/store/.farm/tmp-1: Permission denied; give this user the right"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert json.loads(answer.body)["error"]["message"] == (
        "the farm's store cannot be written at the moment; tell its operator"
    )
    assert "/srv/store/.farm/tmp-1: Permission denied" in caplog.records[0].reason


def test_a_hub_out_of_reach_is_the_farms_fault():
    answer = answer_of(errors.ModelCardError("model z: the hub: [Errno 101] unreachable; check HF_TOKEN"))
    error = json.loads(answer.body)["error"]
    assert (answer.status_code, error["type"], error["param"]) == (503, "overloaded_error", "model")
    assert "HF_TOKEN" not in error["message"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/srv/store/jobs/a.json: Input/output error", "the store/jobs/a.json: Input/output error"),
        ("[Errno 2] No such file: '/root/.cache/hub/x y/z.bin'", "[Errno 2] No such file: 'x y/z.bin'"),
        ("see GET /v1/jobs/a/images; /docs; s3://bucket/a/b; http://host:80/a/b", None),
        ("4 images/s, 1/2 done", None),
    ],
)
def test_folders_of_this_machine_stay_here(text, clean):
    assert scrubbed(text, store="/srv/store") == (clean or text)


def test_what_a_client_wrote_is_repeated_as_it_was():
    assert told(errors.ManifestError("must lie below s3://a/, got '/etc/x/passwd'")) == (
        "must lie below s3://a/, got '/etc/x/passwd'"
    )
