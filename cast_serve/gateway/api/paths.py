"""Paths that stand in more than one place: those of probes, and those that want no key."""

PROBES = ("/livez", "/readyz", "/startupz", "/health")
DASHBOARD = "/dashboard/"  # its files hold nothing, and ask for the key themselves


def is_open(path: str) -> bool:
    """Whether a path is answered without an API key."""
    return path == "/" or path in PROBES or path.startswith(DASHBOARD)
