"""The application -> its OpenAPI description: every route, body and status; and a page of it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cast_serve.gateway.api.paths import PROBES, is_open
from cast_serve.gateway.api.schemas import BODIES

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
FAILURES = {
    "400": "the body is not valid; the message names the field, the value and the limit",
    "401": "no API key, or an unknown one",
    "404": "the model does not exist",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "431": "the head is too large",
    "429": "too many requests are waiting, or their bodies are too large in total; try again after "
    "Retry-After seconds",
    "500": "the gateway failed; its log has the cause",
    "502": "the answer is larger than the gateway accepts",
    "503": "the variant does not answer; try again after Retry-After seconds",
    "504": "the deadline has passed",
}


def describe(app: FastAPI, models: Sequence[str]) -> dict[str, Any]:
    """OpenAPI 3.1, made once; models are what ``model`` may be."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title="cast-serve gateway",
            version=app.version,
            description="OpenAI-compatible completions by variants of one model.",
            routes=app.routes,
        )
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas |= {"Error": ERROR}
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                _complete(operation, path, schemas)
        for body in BODIES.values():
            fields = schemas[body.__name__]["properties"]
            if "model" in fields:
                fields["model"]["enum"] = list(models)
        app.openapi_schema = schema
    return app.openapi_schema


def page(schema: dict[str, Any]) -> str:
    """GET /docs, of `describe`: each route and its body's fields, as HTML that loads nothing."""
    parts = []
    for path, methods in schema["paths"].items():
        for method in methods:
            fields = BODIES[path].model_fields if path in BODIES else ()
            names = ", ".join(f"<code>{escape(name)}</code>" for name in fields)
            parts.append(
                f"<dt><code>{method.upper()} {escape(path)}</code></dt><dd>{names or '-'}</dd>"
            )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>cast-serve API</title>
<meta name="viewport" content="width=device-width"></head>
<body>
<h1>cast-serve API</h1>
<p>OpenAI's completions and chat completions, served by variants of one model. Types, limits and
statuses are in <a href="/openapi.json">/openapi.json</a>, which any OpenAPI tool reads. If the
gateway has API keys, send one: <code>curl -H "Authorization: Bearer KEY" .../openapi.json</code>.
<a href="/">The dashboard</a> sends a prompt to every variant.</p>
<h2>Routes, and the fields of their bodies</h2>
<dl>{"".join(parts)}</dl>
</body>
</html>
"""


def _complete(operation: dict[str, Any], path: str, schemas: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # never sent: a wrong body is a 400
    statuses = ["431", "500"]
    if path in BODIES:
        model = BODIES[path].model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= model.pop("$defs", {})
        schemas[BODIES[path].__name__] = model
        content = {"schema": {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        statuses = list(FAILURES)
        if path.endswith("completions"):
            responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    elif path == "/v1/models/{name}":
        statuses.append("404")
    elif path in PROBES and path != "/livez":  # which is never 503
        responses["503"] = {**responses["200"], "description": "not yet, or no longer"}
    if not is_open(path):
        operation["security"] = [{"key": []}, {}]
        statuses.append("401")
    failure = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in statuses:
        responses[status] = {"description": FAILURES[status], "content": failure}
