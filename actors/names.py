"""What the farm's actors are called, and where."""

NAMESPACE = "farm"
DISPATCHER = "dispatcher"


def renderer_name(slot: int) -> str:
    """Name of the renderer in a slot: one slot a device, refilled when its renderer dies."""
    return f"renderer-{slot}"
