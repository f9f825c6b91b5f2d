"""What both peers do alike: their flags, and drawing a batch of requests."""

import argparse
import base64
import io
from collections.abc import Sequence
from typing import Any

from farm.bench.peers import Stock

HOST = "127.0.0.1"


def flags() -> argparse.Namespace:
    """Read the flags of a peer."""
    parser = argparse.ArgumentParser()
    for name in ("port", "batch", "replicas", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def draw(stock: Stock, requests: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Draw the images of several requests as one batch; PNGs as Pillow writes them."""
    images = stock.draw([request["prompt"] for request in requests], [request["seed"] for request in requests])
    answers = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        answers.append({"b64_json": base64.b64encode(file.getvalue()).decode("ascii")})
    return answers
