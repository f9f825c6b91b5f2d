"""What the farm's actors are called, and where."""

NAMESPACE = "farm"
DISPATCHER = "dispatcher"
ON_HEAD = {"node:__internal_head__": 0.001}
"""A resource that Ray gives to the head node alone, which stays when GPU nodes come and go."""


def renderer_name(slot: int) -> str:
    """Name of the renderer in a slot: one slot a device, refilled when its renderer dies."""
    return f"renderer-{slot}"
