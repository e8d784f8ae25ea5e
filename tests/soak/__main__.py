"""A seed and a length -> a gateway under hostile load and faults; the verdict is JSON on stdout.

    python -m tests.soak --minutes 10 --seed 1                       fake workers
    python -m tests.soak --minutes 60 --seed 1 --real DENSE SPARSE   vLLM's, of these directories

Exit 0: nothing was found, 1: something was, 2: wrong use.
"""

import argparse
import asyncio
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cast_serve.provenance import origin
from tests.soak.run import Soak


def parse() -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__, formatter_class=about)
    parser.add_argument("--minutes", type=float, default=10, help="at most; default 10")
    parser.add_argument("--requests", type=int, default=0, help="end sooner, after so many")
    parser.add_argument("--faults", type=int, default=100, help="over the run; default 100")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same requests and faults")
    parser.add_argument("--clients", type=int, default=32, help="at once; default 32")
    parser.add_argument("--real", type=Path, nargs="+", default=[], metavar="DIR")
    parser.add_argument("--keep", type=Path, help="new folder for the logs, which stay there")
    found = parser.parse_args()
    for path in found.real:
        if not (path / "config.json").is_file():
            parser.error(f"--real {path} holds no model (no config.json); name its directory")
    if found.keep is not None and found.keep.exists():
        parser.error(f"--keep {found.keep} is there already; name a new folder")
    found.real = [path.resolve() for path in found.real]
    if found.keep is not None:
        found.keep = found.keep.resolve()  # the gateway takes what its file says from there
    return found


async def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=1.0)

        def show(share: float, text: str) -> None:
            bar.update(task, completed=share, description=text)

        return await Soak(asked, folder, show).run()


def main() -> None:
    """Runs what was asked for; the folder of the logs stays if something was found."""
    asked = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: ended by SIGTERM"))  # it cleans up
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(exist_ok=True, parents=True)
    begun, begun_s = origin(), time.monotonic()
    figures = asyncio.run(run(asked, folder))
    command = shlex.join(["python", "-m", "tests.soak", *sys.argv[1:]])
    minutes = round((time.monotonic() - begun_s) / 60, 1)
    figures = {"command": command, **begun, "minutes": minutes, **figures}
    if figures["passed"] and asked.keep is None:
        shutil.rmtree(folder)
    else:
        print(f"soak: the logs are in {folder}", file=sys.stderr)
    print(json.dumps(figures))
    sys.exit(0 if figures["passed"] else 1)


if __name__ == "__main__":
    main()
