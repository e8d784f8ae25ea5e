"""A gateway's port and a seed -> clients of every kind, and a tally of what they saw.

Each client sends one request after the other, for each drawing what it is: one that waits for its
answer, leaves, reads slowly, allows too little time, sends something hostile, or is a crowd.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests import hostile
from tests.soak.clients import oracle
from tests.soak.clients.connection import ClosedError, Connection
from tests.soak.clients.oracle import WrongError
from tests.soak.clients.request import CHAT, COMPARE, COMPLETIONS, VARIANTS, Ask, Asks
from tests.soak.clients.tally import ROUTES, Tally

HUNG_S = 60.0  # the gateway's own limit is far below
PAUSE_S = 0.2  # after a connection was refused, or a variant is down
MAX_HOSTILE_BYTES = 1 << 20
SMALL_BUFFER = 4096
FAT: dict[str, Any] = {"num_tokens": 50, "width": 20_000, "num_choices": 1}  # an answer of 1 MB
HOSTILE_STATUSES = {400, 401, 404, 405, 408, 413, 429, 431, 503, 504}


class Clients:
    """All clients.

    Args:
        port: the gateway's.
        seed: of what they send.
        num_clients: at once.
        num_flood: requests of a flood, all at once; more than places and queue hold.
        num_crowd: connections of a crowd, more than the gateway's limit; 0: none.
        is_real: whether workers are vLLM's.
        has_chat: whether they can answer chats.
    """

    def __init__(
        self,
        port: int,
        seed: str,
        num_clients: int,
        num_flood: int,
        num_crowd: int,
        is_real: bool,
        has_chat: bool,
    ) -> None:
        self.port = port
        self.num_clients = num_clients
        self.num_flood = num_flood
        self.num_crowd = num_crowd
        self.is_real = is_real
        self.tally = Tally()
        self.asks = Asks(seed, is_real)
        self.is_over = False
        self._random = random.Random(f"{seed} kinds")
        self._hostile = [
            each for each in hostile.requests(VARIANTS) if len(each[4]) <= MAX_HOSTILE_BYTES
        ]
        self._alone = asyncio.Lock()  # one flood or crowd at a time
        kinds: dict[Callable[[], Awaitable[None]], float] = {
            self.stream: 40,
            self.whole: 14,
            self.compare: 3,
            self.leave: 8,
            self.leave_in_body: 2,
            self.hurry: 3,
            self.attack: 10,
            self.flood: 0.2,
        }
        if has_chat:
            kinds |= {self.chat: 12, self.whole_chat: 4}
        if not is_real:
            kinds |= {self.read_slowly: 1}
        if num_crowd:
            kinds |= {self.crowd: 0.05}
        self._kinds = kinds

    async def run(self) -> None:
        """Sends until `is_over`."""
        await asyncio.gather(*(self._client() for _ in range(self.num_clients)))

    async def _client(self) -> None:
        while not self.is_over:
            (kind,) = self._random.choices([*self._kinds], [*self._kinds.values()])
            self.tally.kinds[kind.__name__] += 1
            try:
                await kind()
            except Exception as error:  # an answer that even the client could not read
                self.tally.note_wrong(f"{kind.__name__}: {error!r}")

    async def stream(self) -> None:
        await self._ask(self.asks.next(COMPLETIONS))

    async def whole(self) -> None:
        await self._ask(self.asks.next(COMPLETIONS, is_stream=False))

    async def chat(self) -> None:
        await self._ask(self.asks.next(CHAT))

    async def whole_chat(self) -> None:
        await self._ask(self.asks.next(CHAT, is_stream=False))

    async def compare(self) -> None:
        await self._ask(self.asks.next(COMPARE))

    async def hurry(self) -> None:
        await self._ask(self.asks.next(COMPLETIONS, headers={"X-Request-Timeout": "0.1"}))

    async def read_slowly(self) -> None:
        await self._ask(self.asks.next(COMPLETIONS, **FAT), is_slow=True)

    async def flood(self) -> None:
        if self._alone.locked():
            return
        async with self._alone:
            asks = [self.asks.next(COMPLETIONS, num_tokens=4) for _ in range(self.num_flood)]
            await asyncio.gather(*(self._ask(ask) for ask in asks))

    async def crowd(self) -> None:
        """Connections that only wait, beyond the gateway's limit, and ten that ask."""
        if self._alone.locked():
            return
        async with self._alone:
            idle = []
            try:
                for _ in range(self.num_crowd):
                    idle.append(await Connection.open(self.port))
                await asyncio.gather(*(self.stream() for _ in range(10)))
            except OSError:
                pass
            finally:
                for connection in idle:
                    connection.close()

    async def leave(self) -> None:
        """Leaves before, in or after the answer's first events."""
        ask = self.asks.next(COMPLETIONS, num_tokens=24)
        connection = await self._open()
        if connection is None:
            return
        content, has_begun = b"", False
        try:
            await self._send(connection, ask)
            num_events = self._random.choice((0, 0, 1, 3, 8))
            if num_events == 0:
                await asyncio.sleep(self._random.choice((0, 0.001, 0.02)))
                return
            async with asyncio.timeout(HUNG_S):
                status, headers = await connection.head()
                has_begun = not oracle.is_plain(status, headers)
                async for piece in connection.pieces():
                    content += piece
                    if content.count(b"\n\n") >= num_events:
                        break
            if status == 200:
                oracle.judge_part(ask, headers, content)
        except ClosedError:
            pass
        except (TimeoutError, WrongError) as error:
            self.tally.note_wrong(f"{ask}: leaving: {error!r}")
        finally:
            self.tally.note_left(ask, has_begun)
            connection.close()

    async def leave_in_body(self) -> None:
        ask = self.asks.next(COMPLETIONS)
        connection = await self._open()
        if connection is None:
            return
        await self._send(connection, ask, missing=50)
        self.tally.note_left(ask, has_begun=False)
        await asyncio.sleep(self._random.choice((0, 0.01)))
        connection.close()

    async def attack(self) -> None:
        """Something out of tests/hostile.py: refused, or answered, by a status of the table."""
        name, method, path, more, content = self._random.choice(self._hostile)
        connection = await self._open()
        if connection is None:
            return
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(HUNG_S):
                await connection.send(method, path, {"Connection": "close", **more}, content)
                status, headers = await connection.head()
                is_head = method == "HEAD"
                body = b"" if is_head else b"".join([p async for p in connection.pieces()])
            is_plain = oracle.is_plain(status, headers)
            self._note_attack(method, path, status, body, is_plain)
            if status >= 400 and not is_plain and not is_head:
                oracle.judge_error(status, headers, body, HOSTILE_STATUSES)
        except ClosedError:
            self.tally.lost.append((begun_s, path))
        except (TimeoutError, WrongError) as error:
            self.tally.note_wrong(f"hostile, {name}: {error!r}")
        finally:
            connection.close()

    def _note_attack(
        self, method: str, path: str, status: int, body: bytes, is_plain: bool
    ) -> None:
        if is_plain:
            self.tally.num_plain += 1
        elif method == "POST" and path in ROUTES and status not in (401, 431):
            self.tally.seen[path, status] += 1
            if status == 200 and path != COMPARE and b"usage" in body:
                usage = json.loads(body)["usage"]
                name = json.loads(body)["model"]
                self.tally.tokens[name] += usage["completion_tokens"]
        else:
            self.tally.kinds["attack beside the routes"] += 1

    async def _ask(self, ask: Ask, is_slow: bool = False) -> None:
        """Sends a request, waits for the whole answer and judges it."""
        connection = await self._open(SMALL_BUFFER if is_slow else None)
        if connection is None:
            return
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(HUNG_S):
                await self._send(connection, ask)
                status, headers = await connection.head()
                content = bytearray()
                async for piece in connection.pieces():
                    content += piece
                    if is_slow:
                        await asyncio.sleep(0.005)
            seen = oracle.judge(ask, status, headers, bytes(content))
            self.tally.note(ask, seen)
            if self.is_real and seen.code in (429, 503):  # as Retry-After asks, at least
                await asyncio.sleep(1.0)
            elif seen.code == 503:  # a fake is back sooner
                await asyncio.sleep(PAUSE_S)
        except ClosedError as error:
            if error.has_begun:
                self.tally.note_wrong(f"{ask}: {error}")
            self.tally.lost.append((begun_s, ask.route))
        except TimeoutError:
            self.tally.num_hung += 1
            self.tally.note_wrong(f"{ask}: hung for {HUNG_S:.0f} s")
        except (WrongError, KeyError, TypeError) as error:
            self.tally.note_wrong(f"{ask}: {error!r}")
        finally:
            connection.close()

    async def _send(self, connection: Connection, ask: Ask, missing: int = 0) -> None:
        headers = {"X-Request-Id": ask.key, **ask.headers}
        content = json.dumps(ask.body).encode()
        await connection.send("POST", ask.route, headers, content, missing)

    async def _open(self, receive_buffer: int | None = None) -> Connection | None:
        """A connection; None if the gateway does not take one now."""
        try:
            return await Connection.open(self.port, receive_buffer)
        except OSError:
            self.tally.kinds["not connected"] += 1
            await asyncio.sleep(PAUSE_S)
            return None
