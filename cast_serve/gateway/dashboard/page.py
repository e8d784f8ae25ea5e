"""The files of static/ -> a router that serves the page at / under a strict content policy.

The files hold nothing secret: a gateway with API keys leaves them open, and the page asks for a key
once a request of its own is answered with 401.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("index.html", "text/html"),
    "/dashboard/dashboard.js": ("dashboard.js", "text/javascript"),
    "/dashboard/client.js": ("client.js", "text/javascript"),
    "/dashboard/served.js": ("served.js", "text/javascript"),
    "/dashboard/elements.js": ("elements.js", "text/javascript"),
    "/dashboard/dashboard.css": ("dashboard.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """GET and HEAD of `FILES`, which are read once, now."""
    found = APIRouter()
    for path, (name, media_type) in FILES.items():
        content = (STATIC / name).read_bytes()
        found.add_route(path, _serve(content, media_type), include_in_schema=False)
    return found


def _serve(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return serve
