"""Errors cross processes, and their codes are unique."""

import pickle

import pytest

from farm import errors

CLASSES = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, errors.FarmError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_survives_pickling(kind):
    copy = pickle.loads(pickle.dumps(kind("what, which, where; what next")))
    assert type(copy) is kind
    assert (copy.message, str(copy)) == ("what, which, where; what next",) * 2


def test_codes_are_unique_and_lead_back_to_their_class():
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)
    for kind in CLASSES:
        assert type(errors.error_of(kind.code, "m")) is kind
    assert type(errors.error_of("from a newer farm", "m")) is errors.RenderError
