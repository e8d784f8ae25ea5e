"""A model directory, text and questions -> its figures, alone or paired with a reference's."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import CAST_JSON, read_record
from cast_serve.errors import UsageError
from cast_serve.questions import paired_difference as accuracy_difference
from cast_serve.questions import read_questions
from cast_train.checkpoint import identity, models
from cast_train.evaluate import choices as answered
from cast_train.evaluate.perplexity import (
    mean_divergence,
    paired_difference,
    perplexity,
    soft_and_hard,
)
from cast_train.passes import check_length
from cast_train.precision import arithmetic
from cast_train.tokens import read_tokens, to_blocks

logger = logging.getLogger(__name__)


def evaluate(
    directory: Path,
    text: Sequence[Path],
    context: int = 512,
    max_tokens: int | None = None,
    reference: Path | None = None,
    choices: Sequence[Path] = (),
    limit: int | None = None,
) -> tuple[dict[str, Any], list[float]]:
    """Measures perplexity (of a gated checkpoint, soft and hard), KL and accuracy (hard).

    Args:
        directory: dense, gated, pruned or compressed; or a model's name on a hub.
        text: UTF-8 files.
        context: tokens of one sequence.
        max_tokens: to read from the text; None: all.
        reference: what KL, perplexity and accuracy are measured against, paired.
        choices: files of questions, JSONL.
        limit: questions from each file's beginning; None: all.

    Returns:
        the figures, as `cast-train eval` prints them; the loss of every block, nats per token.

    Raises:
        CheckpointError: if a directory cannot be read.
        UsageError: if the reference is gated or has another vocabulary, or text or questions cannot
            be used.
    """
    folder = hub.fetch(directory)
    dense_folder = hub.fetch(reference) if reference is not None else None
    if dense_folder is not None and models.kind_of(dense_folder) == "gated":
        raise UsageError(
            f"--reference {reference} is a gated checkpoint; give the dense model, or the output "
            "of cast-serve convert"
        )
    if dense_folder is not None:
        sizes = [models.vocabulary_size(path) for path in (folder, dense_folder)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"{directory} has a vocabulary of {sizes[0]} tokens and --reference {reference} "
                f"one of {sizes[1]}; give a reference with the same tokenizer"
            )
        models.check_same_tokens(dense_folder, folder)
    if max_tokens is not None and max_tokens < context:
        raise UsageError(
            f"--tokens {max_tokens} is less than one sequence of --context {context} tokens; "
            "raise --tokens or lower --context"
        )
    answered.check_names(choices)
    kind = models.kind_of(folder)
    record = read_record(folder) if (folder / CAST_JSON).is_file() else {}
    tokenizer = models.load_tokenizer(folder)
    blocks = to_blocks(read_tokens(text, tokenizer, max_tokens), context)
    trained_on = identity.hashes((record.get("source") or {}).get("text", ()))
    for digest, name in identity.hashes(identity.of_texts(text)).items():
        if digest in trained_on:
            logger.warning("%s was trained on %s, so measuring on it tests nothing", folder, name)
    questions = {path.stem: read_questions(path, limit) for path in choices}
    figures: dict[str, Any] = {}
    if kind == "gated":
        model, gate_map, last = models.load_gated(folder, arithmetic())
        check_length(model, context, "--context")
        soft, hard = soft_and_hard(model, gate_map, last, blocks)
        print(f"{directory}: perplexity {soft.perplexity:.2f} soft, {hard.perplexity:.2f} hard")
        figures = {"perplexity_soft": soft.perplexity, "perplexity_hard": hard.perplexity}
    else:
        model = models.load_any(folder, arithmetic())
        check_length(model, context, "--context")
        hard = perplexity(model, blocks)
        print(f"{directory}: perplexity {hard.perplexity:.2f}")
        figures = {"perplexity": hard.perplexity}
    figures["stderr_nats"] = hard.stderr_nats
    if dense_folder is not None:
        dense = models.load_any(dense_folder, arithmetic())
        figures["kl_nats_per_token"] = mean_divergence(model, dense, blocks)
        print(f"KL({reference} || {directory}): {figures['kl_nats_per_token']:.4f} nats per token")
        difference, stderr = paired_difference(hard, perplexity(dense, blocks))
        figures["nats_above_reference"] = difference
        figures["nats_above_reference_stderr"] = stderr
        print(
            f"log perplexity minus {reference}'s: {difference:.4f}{_error(stderr, 4)} nats per "
            f"token, that is {math.exp(difference):.3f} times its perplexity"
        )
    for name, asked in questions.items():
        accuracy = answered.choice_accuracy(model, tokenizer, asked)
        figures[name] = accuracy.about()
        print(
            f"{name}: acc {accuracy.acc:.3f}{_error(accuracy.acc_stderr)}, acc_norm "
            f"{accuracy.acc_norm:.3f}{_error(accuracy.acc_norm_stderr)}, chance "
            f"{accuracy.chance:.3f}, n={accuracy.num_questions}"
        )
        if dense_folder is not None:
            of_reference = answered.choice_accuracy(dense, tokenizer, asked)
            difference, stderr = accuracy_difference(
                accuracy.is_right_norm, of_reference.is_right_norm
            )
            figures[name] |= {
                "acc_norm_reference": of_reference.acc_norm,
                "acc_norm_above_reference": difference,
                "acc_norm_above_reference_stderr": stderr,
            }
            print(
                f"{name}: acc_norm minus {reference}'s ({of_reference.acc_norm:.3f}), paired: "
                f"{difference:+.3f}{_error(stderr)}"
            )
    found = {
        "directory": str(directory),
        "kind": kind,
        "method": record.get("method"),
        **figures,
        "num_tokens": hard.num_tokens,
        "context_tokens": hard.context_tokens,
    }
    return found, list(hard.block_losses)


def _error(stderr: float | None, digits: int = 3) -> str:
    return "" if stderr is None else f" +- {stderr:.{digits}f}"
