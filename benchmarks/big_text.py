"""A model + text -> memory of tokenising many gigabytes of it, and how long steps wait for tokens.

    .venv/bin/python -m benchmarks.big_text MODEL TEXT DIR [--gigabytes 10] [--steps 60] [--out F]

DIR gets a text of that size, its tokens and a trained model, and is left there. A line is eight
paragraphs of TEXT drawn at random, with its digits moved on by a number, so few repeat. The model
trains with `--method dense`, whose step is the shortest.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.tables import benches
from cast_serve.provenance import origin
from cast_train import memory
from cast_train.config import Dense
from cast_train.tokens import write_tokens
from cast_train.training.run import train
from cast_train.training.trainer import CastTrainer

DIGITS = "0123456789"
PARAGRAPHS = 8
EVERY_S = 5.0


def write(text: Path, out: Path, num_bytes: int) -> None:
    """Writes a text of about so many bytes."""
    paragraphs = [line for line in text.read_text("utf-8").split("\n") if len(line) > 100]
    drawn = random.Random(0)
    with (
        out.open("w", encoding="utf-8") as file,
        tqdm(total=num_bytes, unit="B", unit_scale=True) as bar,
    ):
        while bar.n < num_bytes:
            shift = drawn.randrange(10)
            moved = str.maketrans(DIGITS, DIGITS[shift:] + DIGITS[:shift])
            line = " ".join(drawn.choices(paragraphs, k=PARAGRAPHS)).translate(moved)
            bar.update(file.write(line + "\n"))


@contextmanager
def sampled() -> Iterator[list[dict[str, float]]]:
    """This process's memory over time: seconds, bytes of its own, and of files that it maps."""
    samples: list[dict[str, float]] = []
    is_over = threading.Event()
    began = time.perf_counter()

    def sample() -> None:
        while True:
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            of = {name: 1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssFile")}
            now = round(time.perf_counter() - began, 1)
            samples.append({"s": now, "own_bytes": of["RssAnon"], "file_bytes": of["RssFile"]})
            if is_over.wait(EVERY_S):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


@contextmanager
def timed(name: str) -> Iterator[list[float]]:
    """The seconds of each call of a method of CastTrainer."""
    seconds: list[float] = []
    method: Callable[..., Any] = getattr(CastTrainer, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(CastTrainer, name, call)
    try:
        yield seconds
    finally:
        setattr(CastTrainer, name, method)


def measure(model: Path, text: Path, folder: Path, num_bytes: int, steps: int) -> dict[str, Any]:
    """Writes the text, tokenises it and trains on the tokens.

    Args:
        model: dense HF directory.
        text: UTF-8, with paragraphs of over 100 characters.
        folder: new.
        num_bytes: of the text to write.
        steps: of training.

    Returns:
        What `origin` says; text_bytes, num_tokens, tokenize_s; tokenize_memory: samples; of the
        training wait_s and step_s, lists by step, wait_share, their sums' ratio, and train_memory.

    Raises:
        ValueError: if an input is wrong.
    """
    begun = origin()
    folder.mkdir(parents=True)
    data, tokens = folder / "text.txt", folder / "tokens"
    write(text, data, num_bytes)
    began = time.perf_counter()
    with sampled() as of_tokenizing:
        record = write_tokens(model, [data], tokens)
    tokenize_s = time.perf_counter() - began
    with (
        sampled() as of_training,
        timed("get_batch_samples") as wait_s,
        timed("training_step") as step_s,
    ):
        train(model, [tokens], folder / "trained", Dense(steps=steps))
    return {
        **begun,
        "num_launches": 1,
        "text_bytes": data.stat().st_size,
        "num_tokens": record["num_tokens"],
        "tokenize_s": tokenize_s,
        "tokenize_memory": of_tokenizing,
        "wait_s": wait_s,
        "step_s": step_s,
        "wait_share": sum(wait_s) / (sum(wait_s) + sum(step_s)),
        "train_memory": of_training,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="dense HF directory")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("folder", type=Path, help="a new folder for all that is written")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of the text to write")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--out", type=Path, help="a record")
    args = parser.parse_args()
    memory.keep_freed()
    try:
        found = measure(args.model, args.text, args.folder, int(args.gigabytes * 1e9), args.steps)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.big_text: {error}")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(benches.big_text([found])))


if __name__ == "__main__":
    main()
