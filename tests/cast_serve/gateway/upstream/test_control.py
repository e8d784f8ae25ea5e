"""The socket at which a roll is asked for: what is no request, who may ask, who leaves."""

import json
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import control
from cast_serve.gateway.upstream.control import Control
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway import fake_worker
from tests.cast_serve.gateway.stack import Servers, wait_until
from tests.cast_serve.gateway.upstream.rolled import (
    Rolled,
    processes,
    served,
)
from tests.cast_serve.gateway.upstream.scripted_worker import NUM_WORDS


def ask(stack: Rolled, content: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(stack.socket))
    connection.sendall(content)
    return connection


@pytest.mark.parametrize(
    "content", [b"\n", b"{}\n", b"[1]\n", b'{"variant": 1\n', b"\xff\n", b"5\n"]
)
def test_what_is_no_request_is_answered(stack: Rolled, content: bytes) -> None:
    with ask(stack, content) as connection, connection.makefile() as lines:
        (line,) = lines
    assert "malformed roll request" in json.loads(line)["error"]


def test_a_client_that_leaves_takes_its_roll_along(stack: Rolled) -> None:
    new = stack.model("new")
    (new / "unhealthy").touch()
    with ask(stack, json.dumps({"variant": "sparse", "model": str(new)}).encode() + b"\n"):
        wait_until(lambda: bool(processes(new)))
    wait_until(lambda: not processes(new))
    wait_until(lambda: stack.counter("failed") == 1)
    assert stack.complete() == "sparse"
    (new / "unhealthy").unlink()
    assert stack.roll("sparse", new)["model"] == str(new)


def test_a_client_that_leaves_while_the_old_worker_drains_changes_nothing(stack: Rolled) -> None:
    old, new = stack.folder / "sparse", stack.model("new")
    (old / "pause").touch()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(stack.stream)
        wait_until(lambda: stack.replica().num_outstanding == 1)
        with ask(stack, json.dumps({"variant": "sparse", "model": str(new)}).encode() + b"\n"):
            wait_until(lambda: stack.replica().model == new, 30)
        time.sleep(0.2)
        assert processes(old)
        (old / "pause").unlink()
        assert long.result() == ["sparse"] * NUM_WORDS + ["[DONE]"]
    wait_until(lambda: not processes(old))


def test_a_gateway_that_stops_ends_both_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with served(tmp_path, monkeypatch) as stack:
            new = stack.model("new")
            (new / "unhealthy").touch()
            roll = pool.submit(stack.roll, "sparse", new)
            wait_until(lambda: bool(processes(new)))
        # `served` has found no process left
        with pytest.raises(RuntimeError, match="the gateway is stopping"):
            roll.result()
        assert not stack.socket.exists()


def test_only_the_gateways_user_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served(tmp_path, monkeypatch, control_socket=None, port=12345) as stack:
        assert stack.socket == control.default_path(12345)
        assert stat.S_IMODE(stack.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(stack.socket.parent.stat().st_mode) == 0o700
        assert stack.roll()["variant"] == "sparse"


def test_a_folder_that_others_may_open_gets_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = control.default_path(1).parent
    folder.mkdir(mode=0o755)
    with served(tmp_path, monkeypatch, control_socket=None) as stack:
        assert stack.complete() == "sparse"
        assert not stack.socket.exists()
        with pytest.raises(ValueError, match="no `cast-serve up` of this user answers at"):
            stack.roll()
    assert f"{folder} is open to other users; remove it, or set CAST_CONTROL_SOCKET" in caplog.text


@pytest.mark.anyio
async def test_a_socket_that_another_gateway_has_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # and its file stays
    first, second = (Control(path, 1, None) for _ in range(2))  # type: ignore[arg-type]
    await first.open()
    with pytest.raises(OSError, match="another gateway listens at"):
        await second.open()
    assert path.is_socket()
    await first.close()


def test_servers_that_run_elsewhere_are_not_ours_to_roll(tmp_path: Path) -> None:
    with Servers() as servers:
        urls = {"dense": [servers.start(fake_worker.create_app("dense"))]}
        settings = GatewaySettings(control_socket=tmp_path / "s")
        servers.start(create_app(remote_variants(urls), settings))
        assert not (tmp_path / "s").exists()
