"""Sources -> podman, tiny models, a base image and both images."""

import fcntl
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import yaml

from deploy.check.image.containers import PREFIX, ROOT, WORK, Problem, podman, run, succeeds

IMAGES = {"cast-serve": "worker-dense", "cast-serve-gateway": "gateway"}  # by compose's services
FREE_BYTES = 15 << 30
LOCK = Path("/run/lock/cast-check-image")


def prepare() -> None:
    """podman is there, this process has cgroups that it takes, and there is room."""
    if os.geteuid() != 0:
        sys.exit("check-image: needs root, for podman's networks; run it as root")
    if subprocess.run([ROOT / "deploy/check/podman"]).returncode:
        sys.exit("check-image: deploy/check/podman failed, see above")
    if Path("/sys/fs/cgroup/unified").is_mount():  # crun refuses such a mixture of v1 and v2
        hide = 'umount /sys/fs/cgroup/unified; exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, *sys.argv]
        os.execvp("unshare", command)
    os.environ["PODMAN_IGNORE_CGROUPSV1_WARNING"] = "1"
    WORK.mkdir(parents=True, exist_ok=True)
    storage = Path(podman("info", "--format", "{{.Store.GraphRoot}}").strip())
    storage.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(storage).free) < FREE_BYTES:
        sys.exit(f"check-image: {free >> 30} GiB free at {storage}; the images need 15")


def lock() -> IO[str]:
    """Held while it is open: what two runs make has the same names, and each clears them."""
    file = LOCK.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        sys.exit(
            "check-image: another one runs on this machine; start it again when that has ended"
        )
    return file


def models() -> Path:
    """A directory with dense/, sparse/ and canary/: random weights, 2.8 million, pruned to 2:4."""
    out = WORK / "models"
    if out.is_dir():
        return out
    partial = WORK / "models.partial"
    for folder in (partial, WORK / "random"):
        shutil.rmtree(folder, ignore_errors=True)
    bin_folder = Path(sys.executable).parent
    run(sys.executable, ROOT / "scripts/random-llama", WORK / "random", "--shape", "small")
    prune = ("oneshot", "--method", "magnitude", "--model", WORK / "random/dense")
    run(bin_folder / "cast-train", *prune, "--out", partial / "dense")
    run(bin_folder / "cast-serve", "convert", partial / "dense", partial / "sparse")
    shutil.copytree(partial / "sparse", partial / "canary")
    run("chmod", "--recursive", "a+rX", partial)
    partial.rename(out)
    return out


def find_base(asked: str | None) -> str:
    """The image to build on: what is asked for, the Dockerfile's own, or one made here."""
    (default,) = re.findall(r"^ARG BASE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    wanted = asked or default
    if succeeds("image", "exists", wanted) or succeeds("pull", "--quiet", wanted):
        return wanted
    if asked is not None:
        raise Problem(f"{asked} is not here and cannot be pulled; name another, or leave it out")
    script = ROOT / "deploy/check/base"
    made = f"localhost/{PREFIX}-base:{hashlib.sha256(script.read_bytes()).hexdigest()[:12]}"
    if not succeeds("image", "exists", made):
        run(script, made, sys.executable)
    return made


def pip_flags() -> Iterator[str]:
    """This machine's pip configuration and the files that it names, for the build alone."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    options = dict(re.findall(r"^\S*\.([\w-]+)='(.*)'$", listed, flags=re.MULTILINE))
    config = WORK / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in options.items()))
    yield from ("--volume", f"{config}:/etc/pip.conf:ro")
    for value in options.values():
        if value.startswith("/") and Path(value).exists():
            yield from ("--volume", f"{value}:{value}:ro")
    found = options.get("find-links", "")
    if found.startswith("/") and list(Path(found).glob("torch-*+cpu-*.whl")):
        yield from ("--build-arg", f"TORCH_INDEX=file://{found}")


def build(base: str) -> dict[str, int]:
    """Builds both images.

    Returns:
        each one's bytes.
    """
    flags = ["--format=docker", "--network=host", "--build-arg", f"BASE={base}", *pip_flags()]
    for name in ("nofile", "nproc"):  # podman's own may be more than this machine allows
        limit = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        flags += ["--ulimit", f"{name}={limit}:{limit}"]
    sizes = {}
    for image in IMAGES:
        target = ["--target", "gateway"] if image == "cast-serve-gateway" else []
        podman("build", *flags, *target, "--tag", tag(image), ROOT)
        size = podman("image", "inspect", "--format", "{{.Size}}", tag(image))
        sizes[image] = int(size)
    return sizes


def tag(image: str) -> str:
    """The image's name and version in compose."""
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    return str(services[IMAGES[image]]["image"])
