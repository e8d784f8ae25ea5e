"""README's and docs/index.md's commands, as a newcomer types them one after the other.

    python -m tests.story.newcomer FOLDER     in a fresh clone, made in FOLDER
    python -m tests.story.newcomer            in this checkout
    python -m tests.story.newcomer FOLDER "README.md#Your own model"
                                              goes on there, in the clone that is in FOLDER already

Both train, serve and compare a real model, for about an hour, and write what was typed and what was
answered to stdout, and what commands say on stderr to stderr. Commands are read from their pages;
each must end with 0. A server runs until another is started or the section ends. CI follows only
docs/index.md, on a model that is there already, see test_newcomer.py.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import httpx

from tests.docs.pages import ROOT, Block, blocks

SERVERS = ("make serve", "cast-serve up", ".venv/bin/cast-serve up", "cast-serve vllm serve")
PAGES = ("README.md", "docs/index.md")
BEGIN = PAGES[0]
START_S = 900
PORT = 8000
MODEL, TEXT = "data/models/smollm2-135m-dense", "data/text/train.txt"
HELDOUT = "data/text/heldout-wiki.txt"


class Newcomer:
    """Types what pages say, in a folder. What fails is an AssertionError with its output.

    Args:
        folder: where commands are typed.
        port: on which what they start listens.
        scratch: an existing folder for scripts and logs.
    """

    def __init__(self, folder: Path, port: int, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self.url = f"http://127.0.0.1:{port}"
        programs = Path(sys.executable).parent if folder == ROOT else folder / ".venv/bin"
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        if folder != ROOT:
            self.environment.pop("PYTHONPATH", None)  # of this checkout
        self.served = ""
        self.process: subprocess.Popen[bytes] | None = None

    def follow(
        self, given: Iterable[Block], places: Mapping[str, object]
    ) -> Iterator[tuple[str, str]]:
        """Each command or script, once it has ended, with what it wrote.

        Args:
            given: blocks of one page.
            places: what stands for the page's words, such as DIR.
        """
        heading = ""
        try:
            for block in given:
                if block.heading != heading:
                    yield from self._stopped()
                heading = block.heading
                for code in block.filled(places).commands:
                    if code.startswith(SERVERS):
                        yield from self._stopped()
                        self._start(code)
                    else:
                        yield code, self._run(code, block.language)
            yield from self._stopped()
        finally:
            self._stop()

    def _run(self, code: str, language: str) -> str:
        words = ["bash", "-euo", "pipefail", "-c", code]
        if language == "python":
            script = self.scratch / "script.py"
            script.write_text(code)
            words = ["python", str(script)]
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        sys.stderr.write(done.stderr)  # what a person reads too
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr if language == "python" else done.stdout

    def _start(self, code: str) -> None:
        # In a shell's background SIGINT is ignored, and what is ignored no stub could trap.
        words = ["env", "--default-signal=INT", "bash", "-c", f"exec {code}"]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                words,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.served = code
        deadline = time.monotonic() + START_S
        while not is_healthy(self.url):
            assert self.process.poll() is None, f"{code}\n{self._log.read_text()}"
            assert time.monotonic() < deadline, f"{code} has not answered for {START_S} s"
            time.sleep(0.5)

    def _stopped(self) -> Iterator[tuple[str, str]]:
        if self.served:
            self._stop()
            yield self.served, self._log.read_text()
            self.served = ""

    def _stop(self) -> None:
        """As Ctrl-C does."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise
        self.process = None

    @property
    def _log(self) -> Path:
        return self.scratch / "server.log"


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def check(command: str, written: str) -> None:
    """That what a command wrote is what its page promises."""
    if "/v1/completions" in command and command.startswith("curl"):
        assert json.loads(written)["choices"][0]["text"], written
    elif command.endswith("/metrics"):
        assert "cast_speedup_ratio" in written
        assert "vllm:" in written
    elif re.match(r"make demo|(\.venv/bin/)?cast-(?!serve vllm)", command):
        assert json.loads(written.splitlines()[-1])
    elif "print(" in command:
        assert written.strip()


def main(folder: Path | None, start: str = BEGIN) -> None:
    with socket.socket() as probe:  # whose server is there would answer for ours
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", PORT))
    work = ROOT
    if folder is not None:
        work = folder.absolute() / "cast-serve"
        if start == BEGIN:
            subprocess.run(["git", "clone", "-q", str(ROOT), str(work)], check=True)
    (work / "runs").mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="newcomer-", dir=work / "runs"))
    newcomer = Newcomer(work, PORT, scratch)
    first_page, _, first_heading = start.partition("#")
    for page in PAGES[PAGES.index(first_page) :]:
        places = {
            **{"DENSE_DIR": MODEL, "DIR": scratch / "model"},
            **{"FILE...": TEXT, "TRAIN.txt": TEXT, "HELDOUT.txt": HELDOUT},
            "--out report": f"--out {scratch}/{Path(page).stem}",
            "make test": "true",  # which CI runs
        }
        # What the demo prints is not a command.
        given = [block for block in blocks(page) if block.language != "text"]
        if page == first_page and first_heading:
            headings = [block.heading for block in given]
            given = given[headings.index(first_heading) :]
        for command, written in newcomer.follow(given, places):
            print(f"$ {command}\n{written}", flush=True)
            check(command, written)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, *sys.argv[2:])
