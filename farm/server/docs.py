"""`GET /docs`: the API on one page of plain HTML, made from the OpenAPI document; it loads nothing from anywhere."""

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse

from farm.server.errors import answers

OPEN = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
"""What is shown to anybody."""

router = APIRouter(tags=["health"])

_ERROR = "#/components/schemas/ErrorAnswer"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
section { border-top: 1px solid #ccc; padding: .5rem 0 }
h2 { font-size: 1rem; margin: .5rem 0 } h2 b { display: inline-block; min-width: 4rem; color: #06c }
table { border-collapse: collapse; width: 100% } td { vertical-align: top; padding: .15rem .8rem .15rem 0 }
td:first-child { white-space: nowrap } summary { cursor: pointer }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } h2 b { color: #6bf } }
"""


@router.get("/docs", summary="This API on a page", response_class=HTMLResponse, responses=answers())
async def docs(request: Request) -> HTMLResponse:
    """Every route with its fields."""
    page = getattr(request.app.state, "docs", None)
    if page is None:
        page = request.app.state.docs = _page(request.app.openapi())
    return HTMLResponse(page, headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"})


def document(app: FastAPI) -> dict[str, Any]:
    """The app's OpenAPI document, made once: with the key that it wants, and every error as it is answered."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, methods in made["paths"].items():
            for route in methods.values():
                route["responses"].pop("422", None)
                for status, answer in route["responses"].items():
                    if status >= "400":
                        answer["content"] = {"application/json": {"schema": {"$ref": _ERROR}}}
                if path in OPEN:
                    route["security"] = []
        parts = made.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "farm-<id>-<secret>"}}
        made["security"] = [{"key": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema


def _page(document: dict[str, Any]) -> str:
    info = document["info"]
    sections = "".join(_sections(document))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f'<p>{escape(info.get("description", ""))}</p><p><a href="/openapi.json">The OpenAPI document</a></p>{sections}</html>'
    )


def _sections(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            rows = [
                _row(one["name"], one.get("schema", {}), one.get("description", ""))
                for one in route.get("parameters", ())
            ]
            for kind, body in route.get("requestBody", {}).get("content", {}).items():
                schema = _resolved(body.get("schema", {}), document)
                rows.append(f"<tr><td colspan=3>{escape(kind)}</td></tr>")
                rows += [
                    _row(name, field, field.get("description", ""))
                    for name, field in schema.get("properties", {}).items()
                ]
            table = f"<details><summary>fields</summary><table>{''.join(rows)}</table></details>" if rows else ""
            yield (
                f"<section><h2><b>{escape(method.upper())}</b> <code>{escape(path)}</code></h2>"
                f"<p>{escape(route.get('description') or route.get('summary', ''))}</p>{table}</section>"
            )


def _row(name: str, schema: dict[str, Any], text: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(schema))}</td><td>{escape(text)}</td></tr>"


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    return str(schema.get("type", ""))


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    found: dict[str, Any] = document.get("components", {}).get("schemas", {}).get(name, schema)
    return found
