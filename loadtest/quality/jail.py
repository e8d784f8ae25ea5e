"""A program on stdin and its limits -> a child that runs it, isolated from everything else.

sandbox.py runs this file as a script in a bare interpreter, with the standard library alone:

    python -I -S -B jail.py ROOT LIMITS TOKEN < PROGRAM

1. Enter new network, mount, PID and IPC namespaces. A user other than root also needs a new user
   namespace, which grants the rights for step 2 and none outside.
2. Mount an empty in-memory file system on ROOT, and in it, read-only, Python and the system's
   libraries. Only /work is writable. `chroot` there: no other file can be opened, and the kernel
   refuses a user namespace to a chrooted process, so it cannot regain rights.
3. If root, switch to a user id that owns no files and runs no processes, because the kernel does
   not limit the number of root's processes.
4. Fork. The child is process 1 of its PID namespace, so all its descendants die with it. It sets
   its own limits and executes Python, which drops the rights of step 1.
5. The parent kills the child when its time is up.

Exit code: 0: the program exited with 0; 1: with another code; 2: a signal killed it; 3: it ran out
of time; 70: the isolation failed, with the reason on stderr.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from types import FrameType

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR = 442  # on every architecture; Linux 5.12
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38  # of prctl
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
UNUSED_UIDS = range(70_000, 80_000)  # no distribution assigns these
CANNOT = 70
DRIVER = """\
import os, sys
token = sys.argv.pop()
sys.path.append("/program")
import answer
os.write(1, token.encode())
"""  # an import, so code under `if __name__ == "__main__":` does not run

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    """Calls a libc function; raises OSError if it fails."""
    if getattr(_libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = (source.encode(), target.encode(), kind.encode())
    _call("mount", *texts, ctypes.c_ulong(flags), data.encode())


def _unshare() -> None:
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if uid else 0))
    if uid:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def _build(root: str, program: bytes, room_bytes: int) -> None:
    """Fills ROOT with Python, the program and /work, and nothing else."""
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64m")
    for path in (*SYSTEM, os.path.realpath(sys.base_prefix)):
        target = root + path
        if os.path.lexists(target) or not os.path.lexists(path):
            continue  # Python may lie in /usr
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):  # as /lib, to usr/lib
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            open(target, "w").close()
        _mount(path, target, "", MS_BIND | MS_REC)
    os.mkdir(f"{root}/program")
    with open(f"{root}/program/answer.py", "wb") as file:
        file.write(program)
    os.mkdir(f"{root}/work")
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    where = (ctypes.c_int(AT_FDCWD), root.encode(), ctypes.c_uint(AT_RECURSIVE))
    _call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), *where, attributes, ctypes.c_size_t(32))
    data = f"mode=777,size={room_bytes},nr_inodes=1000"
    _mount("tmpfs", f"{root}/work", "tmpfs", MS_NOSUID | MS_NODEV, data)


def _enter(root: str) -> None:
    os.chroot(root)
    os.chdir("/work")
    if os.getuid() == 0:
        unused = UNUSED_UIDS[os.getpid() % len(UNUSED_UIDS)]
        os.setgroups([])
        os.setgid(unused)
        os.setuid(unused)
    _call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # again: setuid clears it


def _become(python: str, limits: dict[str, int], token: str) -> None:
    """Replaces the child by the program; returns only by an exception."""
    _call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for name, most in (
        ("CORE", 0),
        ("CPU", limits["cpu_s"]),
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("NOFILE", limits["num_files"]),
        ("NPROC", limits["num_processes"]),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    os.execve(python, [python, "-I", "-S", "-B", "-X", "utf8", "-c", DRIVER, token], {})


def main(root: str, limits_json: str, token: str) -> int:
    """Runs the program; returns the exit code."""
    try:
        limits, python = json.loads(limits_json), os.path.realpath(sys.executable)
        _call("prctl", SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        program = sys.stdin.buffer.read()
        _unshare()
        _build(root, program, limits["file_bytes"])
        _enter(root)
        child = os.fork()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return CANNOT
    if child == 0:
        try:
            _become(python, limits, token)
        except OSError as error:
            print(f"{python}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(CANNOT)

    is_late = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_late
        is_late = True
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limits["wall_s"])
    _, status = os.waitpid(child, 0)  # continues after `stop`
    if is_late:
        return 3
    return 2 if os.WIFSIGNALED(status) else int(os.WEXITSTATUS(status) != 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
