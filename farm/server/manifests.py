"""A manifest as it comes over HTTP: JSON or YAML in a body, reading nothing but what the farm's keeper allows.

A prompt file, a file of values or an included file must lie below one of the `http_sources`, which are `s3://` URLs; this
machine's own files are out of reach whatever is written.
"""

import re
from collections.abc import Sequence

from fastapi import HTTPException, Request

from farm.errors import ManifestError
from farm.manifest import LoadedManifest, manifest_of, named_files
from farm.scenefile import ReadUrl, included
from farm.yamlfile import MAX_BYTES, Document, Loc, parse_json, parse_yaml, shown

JSON_TYPES = ("application/json",)
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
MAX_YAML_BYTES = 2 * 2**20
"""YAML is read at about 0.7 MB a second; more than this is better sent as JSON."""
WHERE = "manifest"
"""What stands for the file's name in messages."""

_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
_GLOB = re.compile(r"[*?\[]")


async def read_body(request: Request) -> tuple[bytes, bool]:
    """Read a manifest's body, and whether it is YAML. Raises HTTPException of 413 or 415."""
    kind, charset = _content_type(request.headers.get("content-type", ""))
    if kind not in (*JSON_TYPES, *YAML_TYPES):
        raise HTTPException(
            415, f"a manifest is sent as {JSON_TYPES[0]} or {YAML_TYPES[0]}, got {shown(kind)}; say so in content-type"
        )
    if charset not in _CHARSETS:
        raise HTTPException(
            415, f"a manifest is sent in UTF-8, got {shown(charset)}; save it so, and leave charset out"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HTTPException(415, f"a manifest is sent as it is, got it in {shown(encoding)}; do not compress it")
    is_yaml = kind in YAML_TYPES
    most = MAX_YAML_BYTES if is_yaml else MAX_BYTES
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            advice = "send it as JSON" if is_yaml else "keep long lists in files of their own"
            raise HTTPException(413, f"a manifest has at most {most // 2**20} MiB in {kind}; {advice}")
        parts.append(part)
    return b"".join(parts), is_yaml


def manifest_from(
    data: bytes, *, is_yaml: bool, sources: Sequence[str], name: str | None = None, read_url: ReadUrl | None = None
) -> LoadedManifest:
    """Parse and check a manifest. Raises ManifestError.

    `sources`: prefixes that its files may lie below. `name`: the job's, which the manifest may then leave out. `read_url`: reads
    what it includes, once that is allowed.
    """
    parse = parse_yaml if is_yaml else parse_json
    if not data.strip():
        raise ManifestError("the body is empty; send a manifest in it")
    document = parse(data, WHERE, ManifestError, what="manifest")
    if name is not None:
        document.data.setdefault("name", name)

    def read_included(file: str, loc: Loc) -> Document:
        fault = source_fault(file, sources)
        if fault is not None:
            raise ManifestError(f"{document.where(loc)}: {'.'.join(map(str, loc))}: {fault}")
        return included(file, document.where(loc), read_url)

    loaded = manifest_of(document, read_included=read_included)
    if name not in (None, loaded.manifest.name):
        raise ManifestError(
            f"{document.where(('name',))}: name: is {shown(loaded.manifest.name)}, and the address says {shown(name)}; "
            "make them one, or leave the name out"
        )
    for loc, file in named_files(loaded.manifest):
        fault = source_fault(file, sources)
        if fault is not None:
            raise ManifestError(f"{document.where(loc)}: {'.'.join(map(str, loc))}: {fault}")
    return loaded


def source_fault(file: str, sources: Sequence[str]) -> str | None:
    """Say why a manifest sent over HTTP may not read `file`, or None where it may.

    A prefix allows what lies in that folder: `s3://captions/public` allows `s3://captions/public/a.txt`, and not
    `s3://captions/public-not/a.txt`.
    """
    if not sources:
        return f"a manifest sent over HTTP reads no files here, got {shown(file)}; write the prompts into it"
    allowed = f"must lie below {' or '.join(sources)}, got {shown(file)}; move it there, or write the prompts out"
    if not file.startswith("s3://") or not file.isprintable() or "\\" in file:
        return allowed
    fixed = _GLOB.split(file, maxsplit=1)[0]
    if any(part in ("", ".", "..") for part in file.removeprefix("s3://").split("/")):
        return f"must be a whole address without empty parts, . or .., got {shown(file)}; write it out"
    below = any(source.startswith("s3://") and fixed.startswith(f"{source.rstrip('/')}/") for source in sources)
    return None if below else allowed


def _content_type(header: str) -> tuple[str, str]:
    kind, *parameters = (part.strip().lower() for part in header.split(";"))
    pairs = [parameter.partition("=") for parameter in parameters]
    return kind, next((value.strip().strip('"') for name, _, value in pairs if name.strip() == "charset"), "utf-8")
