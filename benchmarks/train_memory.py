"""A dense model + text -> the memory that training it took at most, beside what was planned.

    .venv/bin/python -m benchmarks.train_memory MODEL TEXT [--set method=fixed ...] [--out FILE]

All is counted, from reading the model to writing the gated checkpoint, which is removed. Three
steps unless `--set steps=N` says more. Gates need the most in their second soft step, after whose
first the moments are there: `--set steps=4 --set hard_fraction=0.9`.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import benches
from cast_serve.provenance import origin
from cast_train import memory
from cast_train.config import TrainConfig
from cast_train.training.plan import plan
from cast_train.training.run import train


def peak_bytes() -> int:
    """The most memory that this process has held at once; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return 1024 * int(found["VmHWM"].split()[0])


def measure(model: Path, text: Path, config: TrainConfig) -> dict[str, Any]:
    """Plans a run and trains it; the process should have done nothing else.

    Args:
        model: dense HF directory.
        text: UTF-8.
        config: of the run.

    Returns:
        What `origin` says; model, its directory's name; settings that differ from the defaults;
        num_weights and num_sparse; planned_step_bytes, planned_start_bytes, peak_bytes; step_s,
        the median, and run_s.

    Raises:
        ValueError: if an input is wrong.
    """
    begun = origin()
    planned = plan(model, config)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = train(model, [text], Path(folder, "out"), config)
    settings = config.as_dict()
    defaults = TrainConfig.from_dict({"method": config.method}).as_dict()
    return {
        **begun,
        "num_launches": 1,
        "model": model.name,
        "settings": {
            key: value
            for key, value in settings.items()
            if key == "method" or value != defaults.get(key)
        },
        "num_weights": planned.num_weights,
        "num_sparse": planned.num_sparse,
        "planned_step_bytes": planned.step_bytes,
        "planned_start_bytes": planned.start_bytes,
        "peak_bytes": peak_bytes(),
        "step_s": record["step_s"],
        "run_s": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="dense HF directory")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as in `run`")
    parser.add_argument("--out", type=Path, help="a record")
    args = parser.parse_args()
    memory.keep_freed()
    try:
        config = TrainConfig.from_toml(None, ["steps=3", *args.set])
        found = measure(args.model, args.text, config)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.train_memory: {error}")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(benches.train_memory([found])))


if __name__ == "__main__":
    main()
