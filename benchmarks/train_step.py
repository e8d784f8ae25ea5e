"""A dense model + text -> seconds and bytes of a training step: plain, soft gates, exact mask.

    .venv/bin/python -m benchmarks.train_step MODEL TEXT [--sparsity 2:4 32:64] [--rounds 6]

The ways, plain and two for each pattern, take turns in one process, each on a model of its own,
without distillation and with the defaults of ``--method gates``, from Wanda's scores. Ratios are
taken round by round.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cast_serve.provenance import origin
from cast_serve.sparsity.targets import find_targets
from cast_train import attention, losses, memory, precision
from cast_train.checkpoint.models import load_dense, load_tokenizer
from cast_train.config import Gates, TrainConfig
from cast_train.gates import gating
from cast_train.gates.schedules import phase_at
from cast_train.pruning.scores import wanda_scores
from cast_train.tokens import read_tokens, to_blocks

CONFIG = Gates(steps=1000)
PHASES = {"soft": 30, "exact": 500}  # the step of CONFIG's plan whose phase is measured


class Way:
    """A model that learns in one way.

    Args:
        directory: dense HF directory.
        step: whose phase the gates are in; None: no gates.
        blocks: int64 [num_blocks, block_size].
        config: of the run.
    """

    def __init__(
        self, directory: Path, step: int | None, blocks: Tensor, config: TrainConfig
    ) -> None:
        self.max_grad_norm = config.max_grad_norm
        self.model = load_dense(directory, torch.float32).train()
        attention.use_blocks(self.model)
        for embedding in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            embedding.requires_grad_(False)
        self.gates: dict[str, gating.Gate] = {}
        if step is not None:
            targets, _ = find_targets(self.model, config.pattern)
            scores = wanda_scores(self.model, targets, blocks)
            self.gates = gating.attach(targets, dict.fromkeys(targets, config.pattern), scores)
            self.phase = phase_at(step, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameter_bytes = sum(p.nbytes for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def loss(self, batch: Tensor) -> Tensor:
        """Of int64 [batch, block_size], with the penalty on the gates if there are any."""
        if self.gates:
            gating.set_phase(self.gates, self.phase)
        with precision.autocast("auto", "cpu"):
            logits = self.model(input_ids=batch, use_cache=False).logits
            loss = losses.losses(logits, batch)[0]
        if self.gates and (penalty := gating.penalty(self.gates)) is not None:
            loss = loss + self.phase.penalty_weight * penalty
        return loss

    def step_s(self, batch: Tensor) -> float:
        """Takes one step."""
        began = time.perf_counter()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def kept_bytes(self, batch: Tensor) -> int:
        """Bytes that a forward keeps for its backward, without the parameters."""
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss(batch)
        return sum(kept.values())


def measure(
    model_dir: Path,
    text: Path,
    rounds: int,
    config: Gates = CONFIG,
    patterns: Sequence[str] = ("2:4",),
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measures with torch's number of threads.

    Args:
        model_dir: dense HF directory.
        text: UTF-8; as much of it as one step takes is used.
        rounds: steps of each way, after a first that is not counted.
        config: block size, blocks of a batch and the phases' plan.
        patterns: N:M.
        on_round: called after each round, the first too.

    Returns:
        What `origin` says; num_tokens and num_threads; ways: by ``plain`` and names such as
        ``soft 2:4``, step_s (median), over_plain (median of the rounds' ratios) with its range,
        over_first (the same, over the first pattern in that phase), trained_parameter_bytes,
        kept_bytes.

    Raises:
        ValueError: if the model or the text cannot be read, the text is too short, or there is no
            round.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing; ask for 1 or more")
    begun = origin()
    num_tokens = config.batch_blocks * config.block_size
    tokens = read_tokens([text], load_tokenizer(model_dir), num_tokens)
    batch = to_blocks(tokens, config.block_size)
    ways = {"plain": Way(model_dir, None, batch, config)}
    first = {"plain": "plain"}
    for pattern in patterns:
        of_pattern = config.model_copy(update={"sparsity": pattern})
        for phase, step in PHASES.items():
            ways[f"{phase} {pattern}"] = Way(model_dir, step, batch, of_pattern)
            first[f"{phase} {pattern}"] = f"{phase} {patterns[0]}"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in sorted(ways, reverse=number % 2 == 0):
            seconds[name].append(ways[name].step_s(batch))
        on_round()
    found: dict[str, Any] = {
        **begun,
        "num_launches": 1,
        "num_tokens": num_tokens,
        "num_threads": torch.get_num_threads(),
        "ways": {},
    }
    for name, way in ways.items():
        found["ways"][name] = {
            "step_s": statistics.median(seconds[name][1:]),
            **_ratios("over_plain", seconds[name][1:], seconds["plain"][1:]),
            **_ratios("over_first", seconds[name][1:], seconds[first[name]][1:]),
            "trained_parameter_bytes": way.parameter_bytes,
            "kept_bytes": way.kept_bytes(batch),
        }
    return found


def _ratios(name: str, own: list[float], others: list[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and their range."""
    ratios = [one / other for one, other in zip(own, others, strict=True)]
    return {
        name: statistics.median(ratios),
        f"{name}_min": min(ratios),
        f"{name}_max": max(ratios),
    }


def text_of(found: dict[str, Any]) -> str:
    """The result for people, a line each way."""
    lines = []
    for name, way in found["ways"].items():
        ratios = [
            f"{way[over]:.2f} ({way[f'{over}_min']:.2f} to {way[f'{over}_max']:.2f}) times {what}"
            for over, what in (("over_plain", "plain"), ("over_first", "the first pattern"))
        ]
        kept = f"keeps {way['kept_bytes'] / 1e6:.0f} MB"
        lines.append(f"{name}: {way['step_s']:.2f} s, {', '.join(ratios)}, {kept}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="dense HF directory")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--sparsity", nargs="+", default=["2:4"], help="patterns N:M")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each way, after a first")
    args = parser.parse_args()
    memory.keep_freed()
    precision.flush_denormals()
    try:
        with tqdm(total=args.rounds + 1, desc="rounds") as bar:
            found = measure(
                args.model, args.text, args.rounds, patterns=args.sparsity, on_round=bar.update
            )
    except ValueError as error:
        sys.exit(f"benchmarks.train_step: {error}")
    print(text_of(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
