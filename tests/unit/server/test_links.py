"""What the endpoint's own links begin with."""

from typing import Any

import pytest
from starlette.requests import Request

from farm.server.links import base_url
from farm.settings import Settings


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({}, "http://farm.example:8000"),
        ({"tls_cert": "/a.pem", "tls_key": "/b.pem"}, "https://farm.example:8000"),
        ({"tls_proxy": "10.0.0.5"}, "https://farm.example:8000"),
        ({"public_url": "https://pictures.example/"}, "https://pictures.example"),
    ],
)
def test_links_are_https_where_tls_is_spoken_whatever_the_request_says(settings: dict[str, Any], base: str) -> None:
    for said in ("http", "https"):
        scope = {"type": "http", "scheme": said, "path": "/v1/images", "query_string": b"",
                 "headers": [(b"host", b"farm.example:8000")], "server": ("127.0.0.1", 1)}  # fmt: skip
        assert base_url(Request(scope), Settings(**settings)) == base
