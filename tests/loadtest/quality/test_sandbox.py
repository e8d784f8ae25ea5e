"""Programs that loop, hog, fork, write, call out, spy or leave early are contained and fail."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.errors import FailedError, UsageError
from loadtest.quality import sandbox
from loadtest.quality.sandbox import Limits, Outcome, check_sandbox, run
from tests.programs import lack

SHORT = Limits(wall_s=3, memory_bytes=256 << 20)
LONG = replace(SHORT, wall_s=60)  # for what ends by itself
FORKS = """\
import os, time
num = 0
for _ in range(100):  # bounded, should the limit not hold
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        os.setsid()  # out of the process group
        time.sleep(60)
        os._exit(0)
    num += 1
assert num == 100, num
"""


@pytest.fixture(autouse=True)
def _walls(request: pytest.FixtureRequest) -> None:
    if "refus" in request.node.name:
        return
    try:
        check_sandbox()
    except UsageError as error:
        lack(f"no sandbox here: {error}")


def processes_with(word: str) -> list[int]:
    """The processes that have it as an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it is gone
            continue
        if word.encode() in words:
            found.append(int(path.parent.name))
    return found


def test_a_right_program_passes_whatever_it_prints() -> None:
    assert run("print('x' * 100_000)\nassert 1 + 1 == 2") == Outcome("passed", "")


def test_code_for_a_script_is_not_run() -> None:
    assert run('if __name__ == "__main__":\n    1 / 0').name == "passed"


@pytest.mark.parametrize(
    ("program", "name", "error"),
    [
        ("assert 1 == 2, 'not so'", "failed", "AssertionError: not so"),
        ("def f(:", "failed", "SyntaxError: invalid syntax"),
        ("while True: pass", "timed_out", ""),
        ("import time\ntime.sleep(60)", "timed_out", ""),
        ("try:\n    while True: pass\nexcept BaseException: pass", "timed_out", ""),
        ("import os, signal\nos.setsid()\nwhile True: pass", "timed_out", ""),
        ("x = bytearray(2 << 30)", "failed", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "failed", "MemoryError"),
        (
            "with open('big', 'wb') as file:\n    for _ in range(64): file.write(bytes(1 << 20))",
            "failed",
            "OSError: [Errno 27] File too large",
        ),
        (
            "for n in range(64):\n    with open(str(n), 'wb') as file: file.write(bytes(1 << 20))",
            "failed",
            "OSError: [Errno 28] No space left on device",
        ),
        (
            "files = [open(str(n), 'w') for n in range(100)]",
            "failed",
            "OSError: [Errno 24] Too many open files: '61'",
        ),
        ("while True: print('x' * 1000)", "failed", "OSError: [Errno 27] File too large"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("import sys\nsys.exit(0)", "left_early", ""),
        ("import os\nos._exit(0)", "left_early", ""),
        ("raise SystemExit", "left_early", ""),
        ("import os\nos._exit(7)", "failed", ""),
        ("import ctypes\nctypes.string_at(0)", "killed", ""),
        ("import os\nos.abort()", "killed", ""),
    ],
)
def test_what_is_counted_as_failed(program: str, name: str, error: str) -> None:
    limits = SHORT if name == "timed_out" else LONG
    assert run(program, limits) == Outcome(name, error)


def test_cpu_time_ends_a_program_too() -> None:
    limits = Limits(wall_s=30, cpu_s=1)
    assert run("while True: pass", limits).name == "killed"


def test_forks_are_limited_and_die_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    token = secrets.token_hex(16)
    monkeypatch.setattr(secrets, "token_hex", lambda _: token)
    found = run(FORKS)
    assert found.name == "failed"
    assert int(found.error.removeprefix("AssertionError: ")) < Limits().num_processes
    assert processes_with(token) == []


def test_a_program_dies_with_the_load_test(tmp_path: Path) -> None:
    token = secrets.token_hex(16)
    script = f"""\
import secrets
from loadtest.quality import sandbox
secrets.token_hex = lambda _: {token!r}
sandbox.run("import os\\nos.setsid()\\nwhile True: pass", sandbox.Limits(wall_s=60, cpu_s=60))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # it cannot clean up after itself
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as load_test:
        end_s = time.monotonic() + 20
        while len(processes_with(token)) < 2:  # jail.py and the program
            assert time.monotonic() < end_s
            time.sleep(0.05)
        os.kill(load_test.pid, signal.SIGKILL)
    while processes_with(token):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_no_network_not_even_on_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        found = run(program)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (found.name, found.error) == ("failed", "OSError: [Errno 101] Network is unreachable")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST_LOADTEST_API_KEY", "hush")
    found = run("import os\nos.environ['CAST_LOADTEST_API_KEY']")
    assert (found.name, found.error) == ("failed", "KeyError: 'CAST_LOADTEST_API_KEY'")
    assert run("import os\nassert not set(os.environ) - {'LC_CTYPE'}").name == "passed"


def test_other_files_can_be_neither_read_nor_written(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("hush")
    for program in (f"open({str(path)!r}).read()", f"open({str(path)!r}, 'w')"):
        assert run(program).error.startswith("FileNotFoundError")
    assert path.read_text() == "hush"
    assert run("import os\nassert os.listdir('.') == []\nopen('mine', 'w').write('x')") == Outcome(
        "passed", ""
    )
    for place in ("/mine", "/program/answer.py", "/usr/mine", f"{sys.base_prefix}/mine"):
        assert run(f"open({place!r}, 'w')").error.endswith(f"Read-only file system: {place!r}")


def test_walls_cannot_be_taken_down() -> None:
    program = """\
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for call in (
    lambda: libc.unshare(0x10000000),  # a user namespace, with rights in it
    lambda: libc.unshare(0x20000),
    lambda: libc.umount2(b"/usr", 2),
    lambda: libc.mount(b"none", b"/work", b"proc", ctypes.c_ulong(0), None),
    lambda: libc.chroot(b"."),
):
    assert call() == -1
    assert ctypes.get_errno() == 1, ctypes.get_errno()
import resource
for name in ("AS", "CPU", "NPROC", "FSIZE"):
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (1 << 40, 1 << 40))
    except ValueError:
        continue
    raise AssertionError(name)
assert os.getpid() == 1
assert os.getuid() != 0
"""
    assert run(program) == Outcome("passed", "")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("open('x', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


def test_refused_outside_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"this is darwin; run the command on Linux"):
        check_sandbox()


def test_refused_without_walls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jail = tmp_path / "jail.py"
    lines = ("import sys", "print('unshare: not permitted', file=sys.stderr)", "sys.exit(70)")
    jail.write_text("\n".join(lines))
    monkeypatch.setattr(sandbox, "JAIL", jail)
    with pytest.raises(UsageError, match=r"unshare: not permitted; .*namespaces"):
        check_sandbox()
    with pytest.raises(FailedError, match="cannot be built"):
        run("", replace(SHORT, wall_s=1))
