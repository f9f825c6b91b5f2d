"""The two peers of `farm.bench.endpoint`, written as their own documentation would have a user write them.

    python -m farm.bench.servers.{ray_serve|lit_serve} --port N --batch N --replicas N --threads N

Both answer POST /draw with `{"prompt": ..., "seed": N}` by `{"b64_json": a PNG}`, from the stock pipeline with the card's
steps and guidance, several requests at a time as one batch, and end with SIGTERM.
"""
