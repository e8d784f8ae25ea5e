"""The command line `cast-train`: train gates, measure quality, prune in one shot, reorder channels.

Speaks to people while it works and ends stdout with one line of JSON. Exit 0: done. 1: training
diverged. 2: wrong use; then one line on stderr says what is wrong and nothing is left behind. 130:
stopped by Ctrl-C or SIGTERM; stderr says whether something was saved.
"""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from cast_train import memory

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

STOPPED = 130  # as a shell says of a process that Ctrl-C ended
Text = Annotated[list[Path], typer.Option("--text", help="UTF-8 text; repeat for more files.")]
MODEL = typer.Option(
    help="Dense Hugging Face model: its directory, or ORG/NAME[@REVISION] of a hub."
)
ZEROS = typer.Option(
    help="Share of zeros, such as 0.45: if --sparsity has more, the linears whose pruning would "
    "hurt most for their size stay dense."
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(version("cast-serve"))
        raise typer.Exit


VERSION = typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version.")


@app.callback()
def cast_train(show_version: Annotated[bool, VERSION] = False) -> None:
    """Teaches a dense language model an N:M pattern, and measures what that costs."""


@app.command()
def run(
    model: Annotated[Path, MODEL],
    text: Text,
    out: Annotated[Path, typer.Option(help="Gated checkpoint to write.")],
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How the pattern is learnt: gates, ste, adams; or dense.")
    ] = None,
    selector: Annotated[
        str | None, typer.Option(help="Gates to soft mask: soft_topk, gumbel, penalty, generator.")
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="N:M, for instance 2:4.")] = None,
    zeros: Annotated[float | None, ZEROS] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Order of the gates at first: auto, ones, magnitude, wanda, sparsegpt."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Text to measure on; default: blocks kept out of --text.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Directory for TensorBoard's files of this run.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Dense model to distil from, as --model; default: that one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT.partial if it is there.")
    ] = False,
) -> None:
    """Trains a dense model with gates into a gated checkpoint."""
    with _working():
        from cast_train.config import TrainConfig

        settings = TrainConfig.from_toml(
            config,
            method=method,
            selector=selector,
            sparsity=sparsity,
            zeros=zeros,
            start=start,
            steps=steps,
        )
        from cast_train.training.run import train

        began = time.monotonic()
        record = train(
            *(model, text, out, settings),
            is_resume=resume,
            heldout_file=heldout,
            tensorboard_dir=tensorboard,
            teacher_dir=teacher,
        )
        found = record["quality"]
        print(
            f"{out}: {record['n']}:{record['m']} over {len(record['targets'])} linears after "
            f"{record['steps']} steps; perplexity {found['perplexity_soft']:.2f} soft, "
            f"{found['perplexity_hard']:.2f} hard on {found['text']}"
        )
        _finish(
            out=str(out),
            steps=record["steps"],
            tokens_seen=record["tokens_seen"],
            num_targets=len(record["targets"]),
            **{key: value for key, value in found.items() if key != "text"},
            **record["gates"],
            elapsed_s=round(time.monotonic() - began, 1),
        )


@app.command("eval")
def evaluate(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Dense, gated, pruned or compressed model, as --model of run."
        ),
    ],
    text: Text,
    context: Annotated[int, typer.Option(help="Tokens of one sequence.", min=2)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to read from the text.", min=2)] = 16384,
    reference: Annotated[
        Path | None,
        typer.Option(help="Directory that KL and perplexity are measured against, paired."),
    ] = None,
    losses: Annotated[
        Path | None, typer.Option(help="JSON file to write, with the loss of every block.")
    ] = None,
    choices: Annotated[
        list[Path] | None, typer.Option(help="Questions, JSONL; repeat for more files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions from each file's beginning; default: all.", min=2)
    ] = None,
) -> None:
    """Measures perplexity (of a gated checkpoint, soft and hard), KL and accuracy (hard)."""
    with _working():
        from cast_serve.checkpoint import hub
        from cast_serve.questions import read_questions
        from cast_train.checkpoint import models
        from cast_train.evaluate.choices import choice_accuracy
        from cast_train.evaluate.choices import paired_difference as choices_difference
        from cast_train.evaluate.perplexity import (
            mean_divergence,
            paired_difference,
            perplexity,
            soft_and_hard,
        )
        from cast_train.evaluate.precision import arithmetic
        from cast_train.text import read_texts, to_blocks, tokenize

        if losses is not None:
            _check_losses(losses)
        folder = hub.fetch(directory)
        dense_folder = hub.fetch(reference) if reference is not None else None
        if dense_folder is not None and models.kind_of(dense_folder) == "gated":
            raise ValueError(
                f"--reference {reference} is a gated checkpoint; give the dense model, or what "
                "cast-serve convert makes of the checkpoint"
            )
        kind = models.kind_of(folder)
        tokenizer = models.load_tokenizer(folder)
        blocks = to_blocks(tokenize(read_texts(text), tokenizer, tokens), context)
        questions = {path.stem: read_questions(path, limit) for path in choices or []}
        figures: dict[str, Any] = {}
        if kind == "gated":
            model, gate_map, last = models.load_gated(folder, arithmetic())
            soft, hard = soft_and_hard(model, gate_map, last, blocks)
            print(f"{directory}: perplexity {soft.perplexity:.2f} soft, {hard.perplexity:.2f} hard")
            figures = {"perplexity_soft": soft.perplexity, "perplexity_hard": hard.perplexity}
        else:
            model = models.load_any(folder, arithmetic())
            hard = perplexity(model, blocks)
            print(f"{directory}: perplexity {hard.perplexity:.2f}")
            figures = {"perplexity": hard.perplexity}
        figures["stderr_nats"] = hard.stderr_nats
        if dense_folder is not None:
            dense = models.load_any(dense_folder, arithmetic())
            figures["kl_nats_per_token"] = mean_divergence(model, dense, blocks)
            print(
                f"KL({reference} || {directory}): {figures['kl_nats_per_token']:.4f} nats a token"
            )
            difference, stderr = paired_difference(hard, perplexity(dense, blocks))
            figures["nats_above_reference"] = difference
            figures["nats_above_reference_stderr"] = stderr
            error = "" if stderr is None else f" +- {stderr:.4f}"
            print(
                f"log perplexity above {reference}'s: {difference:.4f}{error} nats a token, that "
                f"is {math.exp(difference):.3f} times its perplexity"
            )
        for name, asked in questions.items():
            accuracy = choice_accuracy(model, tokenizer, asked)
            figures[name] = accuracy.about()
            print(
                f"{name}: acc {accuracy.acc:.3f} +- {accuracy.acc_stderr:.3f}, acc_norm "
                f"{accuracy.acc_norm:.3f} +- {accuracy.acc_norm_stderr:.3f}, chance "
                f"{accuracy.chance:.3f}, n={accuracy.num_questions}"
            )
            if reference is not None:
                of_reference = choice_accuracy(dense, tokenizer, asked)
                difference, error_of_it = choices_difference(accuracy, of_reference)
                figures[name] |= {
                    "acc_norm_reference": of_reference.acc_norm,
                    "acc_norm_above_reference": difference,
                    "acc_norm_above_reference_stderr": error_of_it,
                }
                print(
                    f"{name}: acc_norm above {reference}'s ({of_reference.acc_norm:.3f}), paired: "
                    f"{difference:+.3f} +- {error_of_it:.3f}"
                )
        found = {
            "directory": str(directory),
            "kind": kind,
            **figures,
            "num_tokens": hard.num_tokens,
            "context_tokens": hard.context_tokens,
        }
        if losses is not None:
            written = {**found, "text": [str(path) for path in text], "losses": hard.block_losses}
            losses.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        _finish(**found)


@app.command()
def oneshot(
    model: Annotated[Path, MODEL],
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt, or mask: that of --mask.")
    ],
    out: Annotated[Path, typer.Option(help="Pruned directory to write.")],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Calibration text, for wanda, sparsegpt and --solve."),
    ] = None,
    sparsity: Annotated[str, typer.Option(help="N:M.")] = "2:4",
    mask: Annotated[
        Path | None, typer.Option(help="Gated, pruned or compressed directory whose mask to take.")
    ] = None,
    solve: Annotated[
        bool, typer.Option("--solve", help="Solve the dense model's kept weights by least squares.")
    ] = False,
    zeros: Annotated[float, ZEROS] = 1.0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression; linears whose names match stay dense; repeatable."),
    ] = None,
) -> None:
    """Prunes a dense model without training: the baseline to beat."""
    with _working():
        from cast_train.pruning import oneshot as pruning

        record = pruning.write_pruned(
            model, text or [], out, method, sparsity, mask, solve, zeros, exclude or []
        )
        print(f"{out}: {method} {sparsity} over {len(record['targets'])} linears")
        _finish(out=str(out), method=method, num_targets=len(record["targets"]))


@app.command()
def permute(
    model: Annotated[Path, MODEL],
    text: Text,
    out: Annotated[Path, typer.Option(help="Dense directory to write.")],
    sparsity: Annotated[str, typer.Option(help="N:M.")] = "2:4",
) -> None:
    """Reorders a dense model's channels so that pruning costs less; it computes the same."""
    with _working():
        from cast_train.pruning.permute import write_permuted

        record = write_permuted(model, text, out, sparsity)
        for kind, (before, after) in record["kept_share"].items():
            print(
                f"{out}: {sparsity} keeps {before:.4f} of {kind}'s squared scores, now {after:.4f}"
            )
        _finish(out=str(out), kept_share=record["kept_share"])


@app.command()
def study(
    model: Annotated[Path, MODEL],
    text: Text,
    heldout: Annotated[Path, typer.Option(help="Text to measure on, never trained on.")],
    out: Annotated[Path, typer.Option(help="Directory; an unfinished study in it goes on.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings that all ways share.")
    ] = None,
    ways: Annotated[
        str | None,
        typer.Option(
            help="Ways to compare, separated by ';', each with KEY=VALUE for any setting of the "
            "run, as in 'ste;soft_topk;soft_topk penalty_weight=1'; default: all."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each way.", min=1)] = 3,
    first_seed: Annotated[
        int, typer.Option(help="Seed of the first run; the next have the following ones.", min=0)
    ] = 0,
    choices: Annotated[
        list[Path] | None, typer.Option(help="Questions, JSONL, for every model; repeatable.")
    ] = None,
    rival: Annotated[
        list[Path] | None,
        typer.Option(help="A directory pruned by other means, to measure too; repeatable."),
    ] = None,
) -> None:
    """Compares the ways of learning the pattern, at equal tokens."""
    with _working():
        from cast_train.config import read_toml
        from cast_train.evaluate import report
        from cast_train.evaluate import study as comparison

        settings = read_toml(config) if config is not None else {}
        result = comparison.run(
            *(model, text, heldout, out, settings),
            ways=comparison.ways_of(ways),
            seeds=range(first_seed, first_seed + seeds),
            choices=choices or [],
            rivals=rival or [],
        )
        print(report.table_of(result))
        _finish(out=str(out), summary=result["summary"])


def _check_losses(path: Path) -> None:
    """Refuses a file to write that cannot be written, before there is anything to write."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--losses {path}: there is no such directory; make it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--losses {path} cannot be written; name another file")


def _finish(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


@contextmanager
def _working() -> Iterator[None]:
    """Sets the process up for long work, and turns errors into exit codes."""
    logging.basicConfig(level=logging.INFO, format="cast-train: %(message)s")
    for noisy in ("transformers", "accelerate", "torch", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    memory.keep_freed()
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error), 2)
    except RuntimeError as error:
        codes = {"DivergedError": 1, "StudyError": 1, "StoppedError": STOPPED}
        if type(error).__name__ not in codes:
            raise
        _fail(str(error), codes[type(error).__name__])
    except KeyboardInterrupt:
        _fail("stopped; nothing was written since the last checkpoint, if there is one", STOPPED)


def _fail(message: str, code: int) -> None:
    print(f"cast-train: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def repeat_text_flag(arguments: Sequence[str]) -> list[str]:
    """``--text A B`` -> ``--text A --text B``: as many files as stand before the next flag."""
    repeated: list[str] = []
    is_text = False
    for argument in arguments:
        if is_text and not argument.startswith("-") and repeated[-1] != "--text":
            repeated.append("--text")
        is_text = argument == "--text" or (is_text and not argument.startswith("-"))
        repeated.append(argument)
    return repeated


def main() -> None:
    app(repeat_text_flag(sys.argv[1:]))


if __name__ == "__main__":
    main()
