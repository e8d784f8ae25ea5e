"""What went wrong -> OpenAI's error object with its HTTP status."""

import json
from collections.abc import Mapping

from starlette.types import Send


class APIError(Exception):
    """An error that a client sees, in OpenAI's shape.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; never more than 1,000 characters are sent.
        type: OpenAI's error type.
        code: machine-readable code, or None.
        param: the field at fault, or None.
        headers: sent along, as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {
            "error": {"message": message[:1000], "type": type, "param": param, "code": code}
        }


class ShedError(APIError):
    """429 or 504 of a request that found no room; counted in `cast_requests_shed_total`."""


CUT_OFF = APIError(
    503,
    "the gateway is stopping and its grace period is over; try again shortly",
    "server_error",
    "shutting_down",
    headers={"Retry-After": "1"},
)


async def send_error(send: Send, error: APIError, *headers: tuple[bytes, bytes]) -> None:
    """Answers a request from a middleware, where no handler turns the error into a response."""
    own = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    start = {"type": "http.response.start", "status": error.status}
    await send({**start, "headers": [(b"content-type", b"application/json"), *own, *headers]})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, "invalid_request_error", code, param)


def unavailable(variant: str, status: str | None = None) -> APIError:
    """503 of a variant, by its name; status says why, as `Variant.status`."""
    state = f"is {status}" if status else "is not answering"
    return APIError(
        503,
        f"variant {variant!r} {state}; try again shortly",
        "server_error",
        "variant_unavailable",
        headers={"Retry-After": "1"},
    )


def timed_out(variant: str) -> APIError:
    return APIError(
        504,
        f"variant {variant!r} did not answer in time; allow more time with X-Request-Timeout, or "
        "ask for fewer tokens",
        "server_error",
        "timeout",
    )
