"""An untrusted Python program -> its outcome, run in an isolated process.

Each program runs in its own process (jail.py) with a bare Python: no site-packages, no environment
variables, nothing on stdin, and an empty in-memory directory to work in. It has no network
interface, not even 127.0.0.1, and limits on time, memory, files and processes. It sees only Python,
the system's libraries and its own files, and can write only to its directory. Nothing runs in the
caller's process.

A program passes only if it reaches its end, where a random token is printed. `sys.exit(0)` before
the checks therefore fails.

This does not protect against kernel bugs or a program written to deceive: one that searches its
interpreter for the token passes without being right. A program can read /usr and the directory in
which Python is installed, so keep no secrets there. Run deliberately harmful programs in a virtual
machine instead.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from loadtest.errors import FailedError, UsageError

JAIL = Path(__file__).with_name("jail.py")
OUTCOMES = {0: "left_early", 1: "failed", 2: "killed", 3: "timed_out"}  # by jail.py's exit code
GRACE_S = 30  # jail.py enforces wall_s; this covers a jail.py that hangs
TAIL_BYTES = 4096  # of stderr, searched for the last line


@dataclass(frozen=True)
class Limits:
    """The resources that a program may use.

    Attributes:
        wall_s: wall-clock time of the whole program.
        cpu_s: CPU time per process.
        memory_bytes: address space per process.
        file_bytes: size of one file, of stdout, of stderr, and of the working directory.
        num_files: open files per process.
        num_processes: processes and threads, including jail.py's own.
    """

    wall_s: int = 10
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    num_files: int = 64
    num_processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        name: `passed`, `failed` (an exception, or an exit code that is not 0), `left_early` (exit
            code 0 before the end), `killed` (by a signal) or `timed_out`.
        error: the last line on its stderr; empty if there is none.
    """

    name: str
    error: str


def check_sandbox() -> None:
    """Finds out before anything is asked whether programs can be run.

    Raises:
        UsageError: if this is not Linux, or the kernel or a container denies the walls.
    """
    if sys.platform != "linux":
        raise UsageError(
            f"programs that a model wrote run only in Linux namespaces, and this is "
            f"{sys.platform}; run the command on Linux, with the same --url"
        )
    try:
        found = run("")
    except FailedError as error:
        raise UsageError(
            f"{error}; programs that a model wrote do not run without one. It needs Linux 5.12 or "
            "later, and either root with CAP_SYS_ADMIN or unprivileged user namespaces (sysctl "
            "user.max_user_namespaces above 0 and, on Ubuntu, "
            "kernel.apparmor_restrict_unprivileged_userns 0); a container must allow unshare and "
            "mount (seccomp, AppArmor)"
        ) from error
    if found.name != "passed":
        raise UsageError(
            f"an empty program {found.name} in the sandbox: {found.error or 'no message'}; "
            f"check that {os.path.realpath(sys.executable)} runs with the environment emptied"
        )


def run(program: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008
    """Runs a program to its end, or to a limit.

    Raises:
        FailedError: if the walls cannot be built.
    """
    token = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", "-B", str(JAIL)]
    with (
        tempfile.TemporaryDirectory(prefix="cast-jail-") as root,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        try:
            done = subprocess.run(
                [*command, os.path.realpath(root), json.dumps(asdict(limits)), token],
                input=program.encode("utf-8", "replace"),
                stdout=out,
                stderr=err,
                cwd=root,
                env={},
                start_new_session=True,
                timeout=limits.wall_s + GRACE_S,
            )
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"a program could not be stopped within {error.timeout} s") from error
        out.seek(0)
        is_whole = token.encode() in out.read()  # at most file_bytes
        error_line = _last_line(err)
    if done.returncode not in OUTCOMES:
        raise FailedError(f"a sandbox cannot be built: {error_line or done.returncode}")
    name = OUTCOMES[done.returncode]
    if name == "left_early" and is_whole:
        return Outcome("passed", "")
    return Outcome(name, error_line)


def _last_line(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
