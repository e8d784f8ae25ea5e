"""A dense model + text -> what one, two and four processes make of the same run, method by method.

    .venv/bin/python -m benchmarks.processes MODEL TEXT [--steps 20] [--out FILE]

Each method trains in one process, then in two and four with copies of the model or shares of it,
and a sharded run of four is stopped halfway and gone on with by two. All take steps of the same
sequences in fp32, and are measured on held-out text after each quarter. Keep the model small: four
copies of its training state must fit. `scripts/random-llama OUT --shape small`, trained with
`cast-train run --method dense`, is one.
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
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cast_serve.checkpoint.record import verify
from cast_serve.provenance import origin
from loadtest.report.words import markdown_table

METHODS = {  # and the settings that differ from the defaults
    "gates": {},
    "fixed": {},
    "ste": {},
    "adams": {"learning_rate": 0.01},  # with less, no weight could reach 0 in so few steps
}
SEQUENCES = 4  # a step
# Name: processes, whether they share the model, and how many go on after half of the steps.
WAYS = {
    "1": (1, False, None),
    "2": (2, False, None),
    "4": (4, False, None),
    "2, sharded": (2, True, None),
    "4, sharded": (4, True, None),
    "4, then 2, sharded": (4, True, 2),
}


def command(
    model: Path, text: Path, out: Path, method: str, steps: int, number: int, is_sharded: bool
) -> list[str]:
    """Of the run under torchrun."""
    settings = {
        "steps": steps,
        "sparsity": "32:64",
        "block_size": 256,
        "batch_blocks": SEQUENCES // number,
        "precision": "fp32",
        "evaluate_every": steps // 4,
        "checkpoint_every": steps // 2,
        "is_sharded": str(is_sharded).lower(),
        **METHODS[method],
    }
    of_settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", str(number), "-m", "cast_train", "run", "--resume"]
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
            for name, (number, is_sharded, number_after) in WAYS.items():
                out = Path(folder, method, name.replace(", ", "-").replace(" ", "-"))
                half = out.with_name(f"{out.name}.partial") / f"checkpoint-{steps // 2}/complete"
                first = command(model, text, out, method, steps, number, is_sharded)
                run(first, until=half if number_after else None)
                if number_after:
                    run(command(model, text, out, method, steps, number_after, is_sharded))
                record = verify(out)
                perplexities = [each["perplexity"] for each in record["curve"]]
                perplexities.append(record["quality"]["perplexity_hard"])
                found["methods"][method][name] = {
                    "nats": [math.log(each) for each in perplexities],
                    "launches": [launch["step"] for launch in record["origins"]],
                }
                on_run()
    return found


def text_of(found: dict[str, Any]) -> str:
    """The last loss of one process, and how far the others' losses are from its own at most."""
    lines = []
    for method, ways in found["methods"].items():
        alone = ways["1"]["nats"]
        line = [method, f"{alone[-1]:.4f}"]
        for name in list(ways)[1:]:
            pairs = zip(ways[name]["nats"], alone, strict=True)
            line.append(f"{max(abs(ours - theirs) for ours, theirs in pairs):.6f}")
        lines.append(line)
    return "\n".join(markdown_table(["method", "nats of 1", *list(WAYS)[1:]], lines))


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
    print(text_of(found))


if __name__ == "__main__":
    main()
