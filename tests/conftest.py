"""Which tests may run side by side: `make test` runs several processes of pytest."""

import pytest

EACH_BY_ITSELF = ("test_farm.py", "test_up.py")
"""Files whose tests take long and start all that they need; of another file one process runs all, with its fixtures."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file together."""
    for item in items:
        if item.path.name not in EACH_BY_ITSELF:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
