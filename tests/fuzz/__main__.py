"""CPU minutes -> every target with ever new inputs; the findings are JSON on stdout.

    python -m tests.fuzz --minutes 10 --seed 1 [--target bodies]
        [--record benchmarks/records/fuzz.json]

Each target gets so many CPU minutes. Exit 0: nothing was found, 1: something was.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cast_serve.provenance import machine, versions
from tests.fuzz import bodies, directories, streams, weights
from tests.fuzz.target import Target

TARGETS = [*bodies.TARGETS, *streams.TARGETS, *weights.TARGETS, *directories.TARGETS]
ROUND = 200  # examples of one seed


def fuzz(target: Target, minutes: float, number: int, show: Any) -> dict[str, Any]:
    """Rounds until the CPU time is spent; each finding by its last line and where it arose."""
    begun_s = time.process_time()
    found: dict[str, str] = {}
    num_rounds = 0
    while (spent_s := time.process_time() - begun_s) < 60 * minutes:
        try:
            target.run(ROUND, number + num_rounds)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {place.filename}:{place.lineno}"
            if where not in found:
                found[where] = "".join(traceback.format_exception(error))[-3000:]
                print(found[where], file=sys.stderr)
        num_rounds += 1
        show(spent_s / 60 / minutes)
    return {
        "target": target.name,
        "cpu_minutes": round((time.process_time() - begun_s) / 60, 2),
        "num_examples_at_most": num_rounds * ROUND,
        "findings": sorted(found),
    }


def add_to(record: Path, found: dict[str, Any]) -> None:
    """Adds a run to those that the record has, with the machine and the commit."""
    runs = json.loads(record.read_text())["runs"] if record.exists() else []
    cpu = {name: machine()[name] for name in ("cpu", "family", "model")}
    runs.append({**found, "machine": cpu, "commit": versions().get("commit")})
    partial = record.with_name(record.name + ".writing")
    partial.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    partial.rename(record)


def main() -> None:
    """All targets, or one."""
    parser = argparse.ArgumentParser(
        prog="tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [target.name for target in TARGETS]
    parser.add_argument("--minutes", type=float, default=2, help="CPU minutes a target; default 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=names, help="only this one")
    parser.add_argument("--record", type=Path, help="JSON file; this run is added to its runs")
    asked = parser.parse_args()
    results = []
    with Progress(console=Console(stderr=True)) as bar:
        for target in TARGETS:
            if asked.target in (None, target.name):
                task = bar.add_task(target.name, total=1.0)
                results.append(
                    fuzz(
                        target,
                        asked.minutes,
                        asked.seed * 1_000_000,
                        lambda share, task=task: bar.update(task, completed=share),
                    )
                )
    passed = not any(result["findings"] for result in results)
    found = {"seed": asked.seed, "targets": results, "passed": passed}
    if asked.record:
        add_to(asked.record, found)
    print(json.dumps(found))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
