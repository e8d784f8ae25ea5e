"""Free ports: nothing listens there, and no connection is given one."""

import socket
from pathlib import Path

import pytest

from cast_serve import ports


def test_a_port_is_none_that_a_connection_may_get() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if lowest <= ports.PORTS[-1]:
        pytest.skip(f"this machine gives connections ports from {lowest} on")
    assert ports.free_port() < lowest


def test_ports_that_are_listened_on_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    used = ports.free_port()
    free = ports.free_port([used])
    monkeypatch.setattr(ports, "PORTS", [used, free])
    with socket.create_server(("127.0.0.1", used)):
        assert {ports.free_port() for _ in range(8)} == {free}
        with pytest.raises(OSError, match=f"none of ports {used} to {free} is free"):
            ports.free_port([free])
