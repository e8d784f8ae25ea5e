"""`cast-serve roll` -> a Unix socket of the gateway's user alone -> the gateway's roller.

One line of JSON asks, ``{"variant": NAME, "model": DIR or null}``; lines of JSON answer: any number
of ``{"say": TEXT}``, then ``{"done": {...}}`` or ``{"error": TEXT, "is_wrong_use": BOOL}``. Whoever
may open the socket may roll: the folder has mode 0700 and the socket 0600.
"""

import asyncio
import json
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cast_serve.errors import FailedError, UsageError
from cast_serve.gateway.exchange import unless_left

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0
Say = Callable[[str], None]
Roll = Callable[[str, Path | None, Say], Awaitable[dict[str, Any]]]


def default_path(port: int) -> Path:
    """Of the gateway on a port, for all programs of a user with the same TMPDIR."""
    return Path(tempfile.gettempdir()) / f"cast-control-{os.getuid()}" / f"{port}.sock"


class Control:
    """The gateway's end of the socket.

    Args:
        path: where; None: `default_path`, whose folder is made.
        port: the gateway's.
        roll: `Roller.roll`.
    """

    def __init__(self, path: Path | None, port: int, roll: Roll) -> None:
        self.path = path or default_path(port)
        self._is_default = path is None
        self._roll = roll
        self._server: asyncio.Server | None = None
        self._answers: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listens.

        Raises:
            OSError: if the path is too long, in use, or in a folder that others may write to.
        """
        if self._is_default:
            _make_private(self.path.parent)
        self._server = await asyncio.start_unix_server(self._accept, sock=_bound(self.path))
        logger.info("gateway: `cast-serve roll` connects to %s", self.path)

    async def close(self) -> None:
        """Ends a roll under way: a new worker that does not serve yet is ended."""
        if self._server is not None:
            self._server.close()
            self.path.unlink(missing_ok=True)
        for answer in list(self._answers):
            answer.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answers.add(task)

        def tell(**message: Any) -> None:
            if not writer.is_closing():
                writer.write(json.dumps(message).encode() + b"\n")

        try:
            done = await self._answer(reader, lambda text: tell(say=text))
        except (UsageError, FailedError) as error:
            tell(error=str(error), is_wrong_use=isinstance(error, UsageError))
        except asyncio.CancelledError:
            tell(error="the gateway is stopping; the old worker serves until then")
        except Exception as error:
            logger.exception("gateway: a roll failed through a bug in the gateway")
            tell(error=f"a bug in the gateway, see its log: {error!r}")
        else:
            if done is not None:
                tell(done=done)
        finally:
            self._answers.discard(task)
            with suppress(OSError):
                writer.close()
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, say: Say) -> dict[str, Any] | None:
        """Rolls; None if the client left before the new worker served."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                asked = json.loads(await reader.readline())
            name, model = str(asked["variant"]), asked["model"]
        except (ValueError, KeyError, TypeError, TimeoutError) as error:
            raise UsageError(f"malformed roll request: {error!r}") from None
        roll = self._roll(name, Path(model) if model else None, say)
        done = await unless_left(roll, reader.read(1))
        if done is None:
            logger.warning("gateway: the client that asked to roll %s has disconnected", name)
        return done


def request_roll(path: Path, variant: str, model: str | None, say: Say) -> dict[str, Any]:
    """Asks a gateway to roll a variant, and waits for its end.

    Args:
        path: of the gateway's socket.
        variant: its name.
        model: a directory, or a model's name on a hub; None: reload what is served now.
        say: told what happens.

    Returns:
        what `Roller.roll` does.

    Raises:
        UsageError: if no gateway of this user's listens there, or it cannot do that.
        FailedError: if the new worker did not come up, or the gateway ended.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError as error:
            raise UsageError(
                f"no `cast-serve up` of this user answers at {path} ({error.strerror or error}); "
                "give its --port, or its control_socket as --socket"
            ) from None
        connection.sendall(json.dumps({"variant": variant, "model": model}).encode() + b"\n")
        with connection.makefile(encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "say" in message:
                    say(message["say"])
                elif "done" in message:
                    return dict(message["done"])
                else:
                    raise (UsageError if message.get("is_wrong_use") else FailedError)(
                        message["error"]
                    )
    raise FailedError("the gateway stopped before the roll was complete")


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} is open to other users; remove it, or set CAST_CONTROL_SOCKET")


def _bound(path: Path) -> socket.socket:
    """A socket at the path with mode 0600; one that a gateway left behind is replaced."""
    with (
        socket.socket(socket.AF_UNIX) as probe,
        suppress(FileNotFoundError, ConnectionRefusedError),
    ):
        probe.connect(str(path))
        raise OSError(f"another gateway listens at {path}; set CAST_CONTROL_SOCKET")
    if path.is_socket():
        path.unlink()
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    finally:
        os.umask(before)
    return bound
