"""Paths that stand in more than one place, and what is served in place of OpenAI's other paths."""

LIVENESS = "/livez"
PROBES = (LIVENESS, "/readyz", "/startupz", "/health")
DASHBOARD = "/dashboard/"  # its files hold nothing, and ask for the key themselves
DOCS = "/docs"

_WRITES_TEXT = (
    "not served: the models here write text; POST /v1/chat/completions or /v1/completions"
)
_KEEPS_NOTHING = (
    "not served: the gateway stores nothing; send each request in full to POST "
    "/v1/chat/completions or /v1/completions"
)
_ELSEWHERE = {
    "responses": "not served: send its input as messages to POST /v1/chat/completions",
    **dict.fromkeys(
        ("audio", "embeddings", "images", "moderations", "realtime", "rerank", "score", "videos"),
        _WRITES_TEXT,
    ),
    **dict.fromkeys(
        (
            *("assistants", "batches", "containers", "conversations", "evals", "files"),
            *("fine_tuning", "threads", "uploads", "vector_stores"),
        ),
        _KEEPS_NOTHING,
    ),
}


def is_open(path: str) -> bool:
    """Whether a path is answered without an API key."""
    return path in ("/", DOCS) or path in PROBES or path.startswith(DASHBOARD)


def in_place_of(path: str) -> str:
    """What to do in place of asking for a path of OpenAI's that is not served; else empty."""
    version, _, rest = path.removeprefix("/").partition("/")
    return _ELSEWHERE.get(rest.partition("/")[0], "") if version == "v1" else ""
