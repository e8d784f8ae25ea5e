"""The command line `cast-train`: train gates, measure, prune, quantise, reorder, tokenise.

Speaks to people while it works and ends stdout with one line of JSON. Exit 0: done. 1: training
diverged, or the result could not be pushed. 2: wrong use; then one line on stderr says what is
wrong and nothing is left behind. 130: stopped by Ctrl-C or SIGTERM; stderr says whether something
was saved.
"""

import errno
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cast_serve.errors import FailedError, UsageError
from cast_serve.options import PASSED_ON, VERSION, of_source_tree, option
from cast_train import memory
from cast_train.errors import StoppedError

if TYPE_CHECKING:
    from cast_serve.checkpoint.quantization import Quantization
    from cast_serve.sparsity.pattern import Pattern

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # to write to
STOPPED = 130  # as a shell says of a process that Ctrl-C ended
TEXT = (
    "UTF-8 text, .jsonl or .parquet: a file, folder or glob, or the output of `tokenize`; "
    "repeatable."
)
Text = Annotated[list[Path], option("FILE", TEXT, name="--text")]
MODEL = option(
    "MODEL", "Dense Hugging Face model: a directory, or ORG/NAME or ORG/NAME@REVISION on a hub."
)
ZEROS = option(
    "SHARE",
    "Share of zeros over all targets, such as 0.45, placed where they cost least: with "
    "--sparsity N:64 by choosing N per linear, else by keeping some linears dense. 1.0: "
    "--sparsity everywhere.",
    "1.0",
)
BITS = option(
    "N",
    "Instead of --zeros, with --sparsity N:64: stored bits per weight, in the form of --quantize; "
    "5 with int8 gives 50 % zeros.",
    "none",
)


@app.callback()
def cast_train(show_version: Annotated[bool, VERSION] = False) -> None:
    """Train a dense language model to an N:M pattern, and measure what that costs."""


@app.command()
def run(
    model: Annotated[
        Path,
        option(
            "MODEL",
            "Dense model, or a pruned or compressed one to train further: a directory, or "
            "ORG/NAME or ORG/NAME@REVISION on a hub.",
        ),
    ],
    text: Annotated[
        list[Path],
        option(
            "FILE",
            TEXT + " FILE=WEIGHT, on all or none, sets the shares of the tokens.",
            name="--text",
        ),
    ],
    out: Annotated[
        Path | None, option("DIR", "Gated checkpoint to write.", "DIR.gated with --convert DIR")
    ] = None,
    config: Annotated[Path | None, option("FILE", "TOML file of settings.", "none")] = None,
    assignments: Annotated[
        list[str] | None,
        option(
            "KEY=VALUE",
            "Any setting (docs/settings.md); overrides --config and the other flags; repeatable.",
            "none",
            "--set",
        ),
    ] = None,
    method: Annotated[
        str | None,
        option("NAME", "Mask: learnt (gates, ste, adams), fixed, or none (dense).", "gates"),
    ] = None,
    selector: Annotated[
        str | None,
        option(
            "NAME",
            "How gates become a soft mask: soft_topk, gumbel, penalty, generator.",
            "soft_topk",
        ),
    ] = None,
    sparsity: Annotated[str | None, option("N:M", "Keep N of every M weights.", "2:4")] = None,
    zeros: Annotated[float | None, ZEROS] = None,
    bits: Annotated[float | None, BITS] = None,
    start: Annotated[
        str | None,
        option("NAME", "Initial ranking of weights: wanda, magnitude, sparsegpt, ones.", "wanda"),
    ] = None,
    steps: Annotated[int | None, option("N", "Optimiser steps.", "64")] = None,
    quantize: Annotated[
        Literal["none", "int8", "int4"] | None,
        option(
            "int8|int4",
            "Train the last steps as they are served in 8 or 4 bits; with --convert: form of the "
            "compressed weights.",
            "none",
        ),
    ] = None,
    heldout: Annotated[
        Path | None, option("FILE", "Text to measure on.", "blocks held out of --text")
    ] = None,
    tensorboard: Annotated[
        Path | None, option("DIR", "Folder for TensorBoard files.", "none")
    ] = None,
    teacher: Annotated[
        Path | None, option("MODEL", "Dense model to distil from.", "--model")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from OUT.partial if it exists.")
    ] = False,
    convert: Annotated[
        Path | None, option("DIR", "Also compress the checkpoint into this directory.", "none")
    ] = None,
    train_quantized: Annotated[
        bool,
        typer.Option(
            "--train-quantized",
            help="With --convert --quantize: also train the last steps in that form.",
        ),
    ] = False,
    scale_group: Annotated[
        int | None,
        option("128|64|32", "Columns that share a scale of 4 bits, with --convert.", "128"),
    ] = None,
    head: Annotated[
        Literal["int8", "int4", "none"] | None,
        option(
            "int8|int4|none",
            "With --convert: form of the output layer.",
            "int8 with --quantize where vLLM supports it, else none",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, option("ORG/NAME", "Also push the compressed directory to a hub.", "none")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the model on the hub private.")
    ] = False,
) -> None:
    """Train a dense model under a fixed or a learnt mask, and write a gated checkpoint.

    With --convert, also compress it; the last line is then that of `cast-serve inspect`.
    """
    with _working():
        from cast_serve.checkpoint.quantization import Quantization
        from cast_serve.sparsity.quantize import SCALE_GROUP
        from cast_train.config import TrainConfig

        if quantize == "none":
            quantize = None
        if convert is None:
            for_conversion = {
                "--train-quantized": train_quantized,
                "--scale-group": scale_group,
                "--head": head,
                "--push-to-hub": push_to_hub,
                "--private": private,
            }
            if given := [flag for flag, value in for_conversion.items() if value]:
                raise UsageError(f"{given[0]} needs --convert DIR; give both or none")
            if out is None:
                raise UsageError("--out DIR is missing; --convert DIR alone trains DIR.gated")
        if train_quantized and quantize is None:
            raise UsageError("--train-quantized needs --quantize int8 or int4; give both or none")
        is_trained_so = convert is None or train_quantized
        settings = TrainConfig.from_toml(
            config,
            assignments or (),
            method=method,
            selector=selector,
            sparsity=sparsity,
            zeros=zeros,
            start=start,
            steps=steps,
            quantize=quantize if is_trained_so else None,
            scale_group=scale_group if train_quantized and quantize == "int4" else None,
        )
        if bits is not None:
            form = settings.quantization
            if form is None:
                form = Quantization.asked(quantize, scale_group or SCALE_GROUP)
            budgeted = settings.as_dict()
            budgeted["zeros"] = _zeros_of(bits, budgeted.get("zeros", 1.0), settings.pattern, form)
            settings = TrainConfig.from_dict(budgeted)
        from cast_train import documents, sharding
        from cast_train.training.run import train

        texts, weights = documents.weighted(text)
        conversion = None
        if convert is not None:
            from cast_train.training.conversion import Conversion, quantization_of

            conversion = Conversion(
                out=convert,
                gated=convert.with_name(convert.name + ".gated") if out is None else out,
                quantization=quantization_of(settings, quantize, scale_group, head),
                push_to_hub=push_to_hub,
                is_private=private,
            )
            conversion.check(settings, model)
            out = conversion.trained
        assert out is not None
        began = time.monotonic()
        with nullcontext() if conversion is None else redirect_stdout(sys.stderr):
            record = train(
                model,
                texts,
                out,
                settings,
                is_resume=resume,
                heldout_file=heldout,
                tensorboard_dir=tensorboard,
                teacher_dir=teacher,
                weights=weights,
            )
            sharding.leave()
            if sharding.rank() != 0:  # only rank 0 prints
                return
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
        if conversion is not None:
            _finish(path=str(convert), **conversion.make(texts))


@app.command("eval")
def evaluate(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Dense, gated, pruned or compressed model: a directory, or ORG/NAME or "
            "ORG/NAME@REVISION on a hub.",
        ),
    ],
    text: Text,
    context: Annotated[int, option("N", "Tokens per sequence.", min=2)] = 512,
    tokens: Annotated[
        int | None, option("N", "Read only the first N tokens of the text.", "all", min=2)
    ] = None,
    reference: Annotated[
        Path | None,
        option("DIR", "Model to compare with, paired: KL, perplexity, accuracy.", "none"),
    ] = None,
    losses: Annotated[
        Path | None, option("FILE", "Write the loss of every block to this JSON file.", "none")
    ] = None,
    choices: Annotated[
        list[Path] | None, option("FILE", "Multiple-choice questions, JSONL; repeatable.", "none")
    ] = None,
    limit: Annotated[
        int | None, option("N", "Ask only the first N questions of each file.", "all", min=2)
    ] = None,
) -> None:
    """Measure perplexity (soft and hard for a gated checkpoint), KL and accuracy."""
    with _working():
        from cast_train.evaluate import evaluation
        from cast_train.origin import origin

        began = origin()
        if losses is not None:
            _check_losses(losses)
        found, block_losses = evaluation.evaluate(
            directory, text, context, tokens, reference, choices or (), limit
        )
        if losses is not None:
            written = {**found, "text": [str(path) for path in text], "origin": began}
            written["losses"] = block_losses
            losses.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        _finish(**found)


@app.command()
def oneshot(
    model: Annotated[Path, MODEL],
    method: Annotated[str, option("NAME", "magnitude, wanda, sparsegpt, or mask to use --mask's.")],
    out: Annotated[Path, option("DIR", "Pruned directory to write.")],
    text: Annotated[
        list[Path] | None,
        option(
            "FILE",
            "Calibration text for wanda, sparsegpt and --solve, given as in `eval`.",
            "none",
            "--text",
        ),
    ] = None,
    sparsity: Annotated[str, option("N:M", "Keep N of every M weights.")] = "2:4",
    mask: Annotated[
        Path | None,
        option("DIR", "Gated, pruned or compressed directory to take the mask from.", "none"),
    ] = None,
    solve: Annotated[
        bool, typer.Option("--solve", help="Adjust the kept weights by least squares.")
    ] = False,
    zeros: Annotated[float, ZEROS] = 1.0,
    bits: Annotated[float | None, BITS] = None,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        option("int8|int4", "With --bits: the form whose bits are counted.", "bf16"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        option("REGEX", "Keep linears with matching names dense; repeatable.", "none"),
    ] = None,
) -> None:
    """Prune a dense model without training: the baseline to beat."""
    with _working():
        from cast_serve.checkpoint.quantization import Quantization
        from cast_serve.sparsity.pattern import Pattern
        from cast_train.pruning import oneshot as pruning

        if quantize is not None and bits is None:
            raise UsageError(f"--quantize {quantize} needs --bits N here; give both or none")
        if bits is not None:
            form = Quantization.asked(quantize)
            zeros = _zeros_of(bits, zeros, Pattern.parse(sparsity), form)
        record = pruning.write_pruned(
            model,
            text or [],
            out,
            method,
            sparsity,
            mask,
            solve,
            zeros,
            exclude=exclude or [],
        )
        print(f"{out}: {method} {sparsity} over {len(record['targets'])} linears")
        _finish(out=str(out), method=method, num_targets=len(record["targets"]))


@app.command()
def quantize(
    model: Annotated[
        Path,
        option(
            "MODEL",
            "Sparse or dense model, not quantised yet: a directory, or ORG/NAME or "
            "ORG/NAME@REVISION on a hub.",
        ),
    ],
    text: Annotated[
        list[Path], option("FILE", "Calibration text, given as in `eval`.", name="--text")
    ],
    out: Annotated[Path, option("DIR", "Compressed directory to write.")],
    bits: Annotated[int, option("4|8", "Bits per kept weight.")] = 4,
    scale_group: Annotated[
        int,
        option("128|64|32", "Columns that share a scale in 4 bits; in 8 bits each row has one."),
    ] = 128,
    head: Annotated[
        Literal["int8", "int4", "none"] | None,
        option(
            "int8|int4|none",
            "Form of the output layer; if it is tied, a copy.",
            "int8 where vLLM supports it",
        ),
    ] = None,
    blocks: Annotated[
        int, option("N", "Sequences of 512 tokens, from the start of the text.", min=1)
    ] = 16,
    sparsity: Annotated[
        str | None,
        option(
            "N:M",
            "Pattern of a MODEL whose files do not say it; 64:64, in 4 bits, of a dense one.",
            "what cast.json or config.json says, else 2:4",
        ),
    ] = None,
) -> None:
    """Quantise and compress a model, choosing integers that change its outputs least."""
    with _working():
        from cast_serve.checkpoint.quantization import Quantization
        from cast_serve.sparsity.pattern import Pattern
        from cast_train.pruning.quantize import write_quantized

        if bits not in (4, 8):
            raise UsageError(f"--bits {bits} is not served; give 4 or 8")
        asked = Quantization.asked("int4" if bits == 4 else "int8", scale_group, head)
        assert asked is not None
        pattern = None if sparsity is None else Pattern.parse(sparsity)
        summary = write_quantized(model, text, out, asked, num_blocks=blocks, pattern=pattern)
        print(f"{out}: {summary['quantized']}, {summary['bits_per_weight']} bits per weight")
        _finish(path=str(out), **summary)


@app.command()
def tokenize(
    model: Annotated[
        Path, option("MODEL", "Model whose tokenizer to use: a directory, or its name on a hub.")
    ],
    text: Annotated[
        list[Path],
        option(
            "FILE",
            "UTF-8 text, .jsonl or .parquet: a file, folder or glob, or a data set on a hub as "
            "ORG/NAME or ORG/NAME@REVISION; repeatable.",
            name="--text",
        ),
    ],
    out: Annotated[Path, option("DIR", "Folder of tokens to write; any --text accepts it.")],
    text_field: Annotated[
        str, option("NAME", "Field of .jsonl and .parquet that holds the text.")
    ] = "text",
    tokens: Annotated[int | None, option("N", "Stop after N tokens.", "all", min=1)] = None,
    subset: Annotated[
        str | None, option("NAME", "Subset of a hub's data set.", "its only one")
    ] = None,
    split: Annotated[str, option("NAME", "Split of a hub's data set.")] = "train",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from OUT.partial if it exists.")
    ] = False,
) -> None:
    """Tokenise text of any size once, so that no run has to read it whole."""
    with _working():
        from cast_train.documents import Hub
        from cast_train.tokens import write_tokens

        record = write_tokens(model, text, out, text_field, tokens, Hub(subset, split), resume)
        num_tokens, num_shards = record["num_tokens"], len(record["shards"])
        print(f"{out}: {num_tokens:,} tokens in {num_shards} files")
        _finish(out=str(out), num_tokens=num_tokens, num_files=num_shards)


@app.command()
def plan(
    model: Annotated[
        Path,
        option("MODEL", "Dense model: a directory with a config.json, or its name on a hub."),
    ],
    memory_gb: Annotated[float, option("N", "Memory per process, in 10^9 bytes.", min=0.001)],
    processes: Annotated[int, option("N", "Number of processes.", min=1)] = 1,
    config: Annotated[Path | None, option("FILE", "TOML file of settings.", "none")] = None,
    assignments: Annotated[
        list[str] | None,
        option("KEY=VALUE", "Any setting, as in `run`; repeatable.", "none", "--set"),
    ] = None,
    tflops: Annotated[
        float | None,
        option("N", "Speed of a process, in 10^12 operations per second.", "unknown", min=1e-6),
    ] = None,
) -> None:
    """Show how much memory a run needs, by part, without loading anything.

    Exit code 1: it does not fit.
    """
    with _working():
        from cast_train.config import TrainConfig
        from cast_train.training import plan as planning

        settings = TrainConfig.from_toml(config, assignments or ())
        found = planning.plan(model, settings, processes)
        for part in found.parts:
            print(f"{part.num_bytes / 1e9:9.2f} GB  {part.name}")
        print(f"{found.step_bytes / 1e9:9.2f} GB  during a step, in each of {processes} processes")
        print(f"{found.start_bytes / 1e9:9.2f} GB  before the first step")
        figures = {
            "num_weights": found.num_weights,
            "num_sparse_weights": found.num_sparse,
            "step_bytes": found.step_bytes,
            "start_bytes": found.start_bytes,
            "parts_bytes": {part.name: part.num_bytes for part in found.parts},
            "is_fitting": found.num_bytes <= memory_gb * 1e9,
            "step_flops": found.flops,
            "step_tokens": found.tokens * processes,
        }
        if tflops is not None:
            figures["step_s"] = found.flops / tflops / 1e12
            print(f"{figures['step_s']:9.2f} s   per step of {figures['step_tokens']} tokens")
        if not figures["is_fitting"]:
            most = found.num_bytes / 1e9
            print(f"{most:.2f} GB do not fit in {memory_gb:g} GB. To reduce it: {found.remedy()}")
        _finish(**figures)
        if not figures["is_fitting"]:
            raise typer.Exit(1)


@app.command()
def permute(
    model: Annotated[Path, MODEL],
    text: Text,
    out: Annotated[Path, option("DIR", "Dense directory to write.")],
    sparsity: Annotated[str, option("N:M", "Keep N of every M weights.")] = "2:4",
) -> None:
    """Reorder a dense model's channels so that pruning costs less; its outputs do not change."""
    with _working():
        from cast_train.pruning.permute import write_permuted

        record = write_permuted(model, text, out, sparsity)
        for kind, (before, after) in record["kept_share"].items():
            print(
                f"{out}: share of {kind}'s squared scores that {sparsity} keeps: {before:.4f} "
                f"before, {after:.4f} now"
            )
        _finish(out=str(out), kept_share=record["kept_share"])


@app.command(context_settings=PASSED_ON)
def study(context: typer.Context) -> None:
    """Compare ways of learning the pattern at equal tokens; needs the source tree."""
    with _working():
        of_source_tree(context, "benchmarks.studies.command").main(context.args)


def _zeros_of(bits: float, zeros: float, pattern: "Pattern", form: "Quantization | None") -> float:
    """The share of zeros of --bits, which stands in place of --zeros."""
    from cast_train.pruning.allocate import zeros_of_bits

    if zeros != 1:
        raise UsageError(f"--bits {bits:g} and --zeros {zeros:g} both set the budget; drop one")
    return zeros_of_bits(bits, pattern, form)


def _check_losses(path: Path) -> None:
    """Refuses a file to write that cannot be written, before there is anything to write."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--losses {path}: its directory does not exist; create it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"--losses {path} cannot be written; name another file")


def _finish(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


@contextmanager
def _working() -> Iterator[None]:
    """Sets the process up for long work, and turns errors into exit codes (errors.py)."""
    logging.basicConfig(level=logging.INFO, format="cast-train: %(message)s")
    for noisy in ("transformers", "accelerate", "torch", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    memory.keep_freed()
    try:
        from cast_train import precision

        precision.flush_denormals()
        yield
    except StoppedError as error:
        _fail(str(error), STOPPED)
    except UsageError as error:
        _fail(str(error), 2)
    except FailedError as error:
        _fail(str(error), 1)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped; nothing was saved since the last checkpoint, if any", STOPPED)


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
    try:
        app(repeat_text_flag(sys.argv[1:]))
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "accelerate", "datasets"):
            raise
        print(f"cast-train: {error}; run pip install 'cast-serve[train]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
