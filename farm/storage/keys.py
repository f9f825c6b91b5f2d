"""Which keys every store takes: those that both a bucket and a folder can hold."""

from farm.errors import StoreError

TEMPORARY = ".tmp"
MAX_KEY_BYTES = 1024
MAX_PART_BYTES = 255


def check_key(key: str) -> str:
    """Return `key` if every store can hold it. Raises StoreError saying what is wrong with it."""
    _refuse(key, _fault(key, whole=True))
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if keys may start with it: empty, a key, or a key cut short anywhere."""
    _refuse(prefix, _fault(prefix, whole=False) if prefix else None)
    return prefix


def _refuse(key: str, fault: str | None) -> None:
    if fault is not None:
        shown = key if len(key) <= 120 else key[:120] + "…"
        raise StoreError(f"key {shown!r} {fault}; keys are names joined by '/', relative to the store")


def _fault(key: str, *, whole: bool) -> str | None:
    if not key:
        return "is empty"
    if "\0" in key:
        return "has a NUL character"
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "has half of a surrogate pair, which UTF-8 cannot carry"
    if size > MAX_KEY_BYTES:
        return f"is {size} bytes long, the limit is {MAX_KEY_BYTES}"
    if key.startswith("/"):
        return "starts with '/'"
    parts = key.split("/")
    if parts[0] == TEMPORARY:
        return f"starts with {TEMPORARY}, which stores keep for themselves"
    if not whole:
        parts = parts[:-1]
    for part in parts:
        if part in ("", ".", ".."):
            return f"has the part {part!r}"
        if len(part.encode()) > MAX_PART_BYTES:
            return f"has a part of {len(part.encode())} bytes, the limit is {MAX_PART_BYTES}"
    return None
