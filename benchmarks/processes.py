"""A dense model + text -> what one, two and four processes make of the same run, method by method.

    .venv/bin/python -m benchmarks.processes MODEL TEXT [--steps 20] [--out FILE]

Each method trains in one process, then in two and four with copies of the model or shares of it,
and a sharded run of four is stopped halfway and gone on with by two. All take steps of the same
sequences in fp32, and are measured on held-out text after each quarter. How far rounding alone
carries a method shows in one process that takes a step's sequences one by one. Keep the model
small: four copies of its training state must fit. `scripts/random-llama OUT --shape small`, trained
with `cast-train run --method dense`, is one.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.tables import benches
from cast_serve.checkpoint.record import verify
from cast_serve.provenance import origin

METHODS = {  # and the settings that differ from the defaults
    "gates": {},
    "fixed": {},
    "ste": {},
    "adams": {"learning_rate": 0.01},  # with less, no weight could reach 0 in so few steps
}
SEQUENCES = 4  # a step


@dataclass(frozen=True)
class Way:
    """How a run is cut.

    Attributes:
        number: of processes.
        is_sharded: whether they share the model.
        number_after: of processes that go on after half of the steps, if any do.
        is_one_by_one: whether a process takes its sequences of a step one by one.
    """

    number: int
    is_sharded: bool = False
    number_after: int | None = None
    is_one_by_one: bool = False


WAYS = {
    "1": Way(1),
    "1, one by one": Way(1, is_one_by_one=True),
    "2": Way(2),
    "4": Way(4),
    "2, sharded": Way(2, is_sharded=True),
    "4, sharded": Way(4, is_sharded=True),
    "4, then 2, sharded": Way(4, is_sharded=True, number_after=2),
}


def command(model: Path, text: Path, out: Path, method: str, steps: int, way: Way) -> list[str]:
    """Of the run under torchrun."""
    num_sequences = SEQUENCES // way.number
    settings = {
        "steps": steps,
        "sparsity": "32:64",
        "block_size": 256,
        "batch_blocks": 1 if way.is_one_by_one else num_sequences,
        "accumulation": num_sequences if way.is_one_by_one else 1,
        "precision": "fp32",
        "evaluate_every": steps // 4,
        "checkpoint_every": steps // 2,
        "is_sharded": str(way.is_sharded).lower(),
        **METHODS[method],
    }
    of_settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", str(way.number), "-m", "cast_train", "run", "--resume"]
    files = ["--model", str(model), "--text", str(text), "--out", str(out), "--method", method]
    return [*program, *files, *of_settings]


def run(arguments: list[str], until: Path | None = None) -> None:
    """Runs a command to its end, or tells it to stop as soon as a file is there.

    Raises:
        RuntimeError: if it fails, with the end of what it wrote.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, env=env, stdout=log, stderr=log)
        while process.poll() is None:
            if until is not None and until.exists():
                process.send_signal(signal.SIGTERM)
                process.wait()
                return
            time.sleep(0.1)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{log.read()[-6000:]}")


def measure(
    model: Path, text: Path, steps: int, on_run: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Trains once for each method and way.

    Args:
        model: dense HF directory.
        text: UTF-8.
        steps: a multiple of 4.
        on_run: called after each run.

    Returns:
        What `origin` says; steps; methods: by method and way, nats: the losses on held-out text
        at each quarter, of the exact mask last, and launches: the steps at which processes began.

    Raises:
        ValueError: if an input is wrong.
        RuntimeError: if a run fails.
    """
    if steps < 4 or steps % 4:
        raise ValueError(f"{steps} steps have no four quarters; ask for a multiple of 4")
    found: dict[str, Any] = {**origin(), "num_launches": 1, "steps": steps, "methods": {}}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            found["methods"][method] = {}
            for name, way in WAYS.items():
                out = Path(folder, method, name.replace(", ", "-").replace(" ", "-"))
                half = out.with_name(f"{out.name}.partial") / f"checkpoint-{steps // 2}/complete"
                first = command(model, text, out, method, steps, way)
                run(first, until=half if way.number_after else None)
                if way.number_after:
                    after = replace(way, number=way.number_after)
                    run(command(model, text, out, method, steps, after))
                record = verify(out)
                perplexities = [each["perplexity"] for each in record["curve"]]
                perplexities.append(record["quality"]["perplexity_hard"])
                found["methods"][method][name] = {
                    "nats": [math.log(each) for each in perplexities],
                    "launches": [launch["step"] for launch in record["origins"]],
                }
                on_run()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="dense HF directory")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--steps", type=int, default=20, help="of training, a multiple of 4")
    parser.add_argument("--out", type=Path, help="a record")
    args = parser.parse_args()
    try:
        with tqdm(total=len(METHODS) * len(WAYS), desc="runs") as bar:
            found = measure(args.model, args.text, args.steps, on_run=bar.update)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmarks.processes: {error}")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(benches.processes([found])))


if __name__ == "__main__":
    main()
