"""Ports that are taken -> a free one, for a server that is about to start."""

import socket
from collections.abc import Collection
from contextlib import suppress
from random import SystemRandom

# Linux gives outgoing connections ports from 32768 on.
PORTS = range(20_000, 30_000)


def free_port(taken: Collection[int | None] = ()) -> int:
    """A port of 127.0.0.1 on which nothing listens now.

    A server loads its model for minutes before it listens, so it is none of the ports that the
    kernel may give to a connection meanwhile.

    Args:
        taken: ports that it must not be.

    Raises:
        OSError: if there is none.
    """
    for port in SystemRandom().sample(PORTS, len(PORTS)):
        if port not in taken:
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                return port
    raise OSError(f"none of ports {PORTS[0]} to {PORTS[-1]} is free; end a server that has one")
