"""A gated or already N:M directory -> hardened weights -> a compressed directory, by shards.

The order is harden, compress, quantise (target.py). A compressed directory in bf16, fp16 or fp32
can be quantised too, and comes out as what it was made from would. What another program quantised
is converted without being quantised again (formats/).

Every group of every target is verified, in the input and in the output; the output appears under
its name only when it is complete. linear.py and head.py name the tensors, scheme.py writes
``quantization_config``. ``cast.json`` keeps what training wrote, with its ``source`` (hashes of
model, text and teacher), and adds ``converted_from``, the sha256 of every shard converted, and
``quantization`` (quantize, head, scale_group if either is int4, scales: how they were chosen,
calibration: text and sha256 if `cast-train quantize` chose the integers; null if not quantised).
Early builds of 0.1.0 wrote the hashes to ``source``.
"""

import itertools
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.card import write_card
from cast_serve.checkpoint.declared import OLD_KEY
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.formats.form import SCALE_PARTS
from cast_serve.checkpoint.formats.ragged import Ragged
from cast_serve.checkpoint.head import PARTS as HEAD_PARTS
from cast_serve.checkpoint.head import QuantizedHead, check_columns
from cast_serve.checkpoint.inspect import inspect
from cast_serve.checkpoint.quantization import Quantization, check_recorded
from cast_serve.checkpoint.record import (
    CAST_JSON,
    CheckpointError,
    check_new,
    new_directory,
    pattern_of,
    read_record,
    sha256,
    shards,
    write_record,
)
from cast_serve.checkpoint.scheme import quantization_config, resolved
from cast_serve.checkpoint.target import Calibrated, Plan
from cast_serve.sparsity.nibbles import PACKED
from cast_serve.sparsity.pattern import MOST_KEPT, Pattern, PatternError
from cast_serve.sparsity.quantize import SCALES_TAKEN_OVER
from cast_serve.sparsity.targets import not_by_vllm

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # tensors done, tensors in all
# The tensor that stands for a target in its shard.
WEIGHTS = (".weight", ".compressed", f".{PACKED}")
BITMASK_PARTS = ("bitmask", "row_offsets", "shape")
TARGET_PARTS = ("gate", "scale", *BITMASK_PARTS, *SCALE_PARTS)  # read with it, not copied


def convert(
    source: Path,
    out: Path,
    dense_twin: Path | None = None,
    progress: Progress | None = None,
    *,
    quantization: Quantization | None = None,
    calibrated: Calibrated | None = None,
    pattern: Pattern | None = None,
) -> dict[str, Any]:
    """Writes the compressed directory and, if asked, its dense twin.

    Args:
        source: gated checkpoint, or an HF directory whose targets have the pattern of its cast.json
            (without one, `pattern`) already, also in a quantised form of formats/; to quantise also
            a compressed directory. Or its hub name.
        out: the directory to make; must not exist.
        dense_twin: a second directory to make, with the hardened, dequantised weights stored
            densely.
        progress: called after each tensor.
        quantization: of the targets' values and the output layer; None: they stay in the model's
            dtype. Where the output layer shares the embedding's weight, the embedding stays so and
            the output layer gets a quantised copy of its own.
        calibrated: the targets quantised already, as asked for; None: each value is rounded to the
            nearest integer.
        pattern: of a source whose files do not say one, such as another program's with its zeros;
            None: 2:4.

    Returns:
        `inspect` of the output.

    Raises:
        CheckpointError: if the source cannot be read or is quantised already, an output exists,
            vLLM cannot load the output layer's form, or a weight to quantise is Inf or NaN.
        PatternError: if the pattern or a target's in_features has no compressed form, or a group
            of a target does not have the pattern.
    """
    check_outputs([folder for folder in (out, dense_twin) if folder])
    source = hub.fetch(source)
    directory = ModelDirectory(source, pattern)
    quantization = resolved(quantization, source)
    check_source(directory, quantization)
    new_twin: AbstractContextManager[Path | None] = (
        new_directory(dense_twin) if dense_twin else nullcontext()
    )
    _warn_of_changes(directory)
    with new_directory(out) as compressed, new_twin as dense:
        plan = Plan(quantization, calibrated)
        _warn_of_training(directory, plan)
        is_int4 = quantization is not None and quantization.values == "int4"
        if is_int4 and calibrated is None and not plan.is_trained(directory):
            logger.warning(
                "%s: 4-bit values are rounded to nearest, which costs much quality; cast-train "
                "quantize chooses them with calibration text",
                out,
            )
        _write(directory, compressed, dense, plan, progress or (lambda done, total: None))
        summary = inspect(compressed)
        write_card(compressed, read_record(compressed), summary)
    return summary


def check_source(directory: ModelDirectory, quantization: Quantization | None) -> None:
    """Refuses a source that `convert` cannot make anything of.

    Raises:
        CheckpointError, PatternError: as `convert` does.
    """
    source = directory.path
    if directory.quantized and quantization:
        raise CheckpointError(
            f"{source} is already quantised ({directory.quantized}); for --quantize "
            f"{quantization.values}, give the directory that it was made from"
        )
    if directory.kind == "compressed" and not quantization and not directory.form.is_foreign:
        raise CheckpointError(f"{source} is compressed already; serve it as it is")
    values = quantization.values if quantization else directory.quantized
    if not directory.pattern.zeros and values != "int4":
        raise CheckpointError(
            f"{source} is {directory.pattern}, which keeps every weight; that is served in 4 bits "
            "only: give --quantize int4, or serve the dense model as it is"
        )
    if quantization:
        check_head(directory, quantization)
    for name in directory.targets:
        stored = directory.pattern_of(name).stored
        in_features = directory.in_features(name)
        if in_features < 1 or in_features % stored.m:
            raise PatternError(
                f"{name}: in_features {in_features} is not a positive multiple of "
                f"{stored.m}, so it cannot be stored as {stored}; train again, which leaves it "
                "dense, or with --sparsity 2:4"
            )


def check_head(source: ModelDirectory, quantization: Quantization) -> None:
    """Refuses a form of the output layer that the model cannot have.

    Raises:
        CheckpointError: naming the remedy.
    """
    asked = resolved(quantization, source.path)
    if asked and asked.head == "int4" and source.head:
        check_columns(source.head, source.in_features(source.head), asked.scale_group)


def check_outputs(outputs: Sequence[Path]) -> None:
    """Refuses what `convert` would refuse whatever the source is.

    Raises:
        CheckpointError: as `convert` does.
    """
    if len({folder.resolve() for folder in outputs}) < len(outputs):
        raise CheckpointError(f"{outputs[0]} cannot be its own dense twin; name another directory")
    for inner, outer in itertools.permutations(outputs, 2):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise CheckpointError(f"{inner} is inside {outer}; name a directory outside it")
    for folder in outputs:
        check_new(folder)


def check_converted(
    source: Path,
    out: Path,
    quantization: Quantization | None = None,
    pattern: Pattern | None = None,
) -> None:
    """Refuses an output of other shards than the source has now, or of other settings.

    Args:
        source: a directory as `convert` takes it.
        out: a directory that `convert` made.
        quantization, pattern: as `convert` takes them.

    Raises:
        CheckpointError: naming the shards or settings that differ.
    """
    source = hub.fetch(source)
    record = read_record(out)
    recorded = record.get("converted_from")
    remedy = f"remove {out} and convert {source} again, or name another directory"
    if recorded is None:
        raise CheckpointError(
            f"{out / CAST_JSON} has no converted_from, so it is not known what {out} was "
            f"converted from (an earlier release did not write it); {remedy}"
        )
    found = {file.name: sha256(file) for file in shards(source)}
    differ = [f for f in sorted(found | recorded) if found.get(f) != recorded.get(f)]
    if differ:
        raise CheckpointError(
            f"{out} was not converted from what {source} holds now: {', '.join(differ)} "
            f"differ; {remedy}"
        )
    if pattern is not None and (pattern.n, pattern.m) != pattern_of(record):
        raise CheckpointError(f"{out} is not {pattern}, as --sparsity asks for; {remedy}")
    recorded = record.get("quantization") or {}
    if recorded.get("scales") == SCALES_TAKEN_OVER:  # nothing was asked for
        recorded = {}
    check_recorded(resolved(quantization, source), recorded, str(out), remedy)


def _write(
    source: ModelDirectory,
    compressed: Path,
    dense: Path | None,
    plan: Plan,
    progress: Progress,
) -> None:
    names_of: dict[Path, list[str]] = {}
    for name, file in source.files.items():
        names_of.setdefault(file, []).append(name)
    targets = set(source.targets)
    stored = {name.rpartition(".")[0] for name in source.files if name.endswith(WEIGHTS)}
    if missing := sorted(targets - stored):
        raise CheckpointError(f"{source.path} has no weight for its targets {missing[:5]}")
    stored_otherwise = targets | set(source.form.dense)
    asked = plan.quantization if plan.quantization and plan.quantization.head else None
    head_weight = _head_weight(source, targets) if asked else None
    done = dense_bytes = sparse_bytes = 0
    written: dict[str, str] = {}
    dense_written: dict[str, str] = {}
    for file, names in names_of.items():
        tensors: dict[str, Tensor] = {}
        dense_tensors: dict[str, Tensor] = {}
        for name in names:
            linear, _, part = name.rpartition(".")
            if linear in targets and name.endswith(WEIGHTS):
                target = plan.quantized(source, linear)
                tensors |= target.tensors()
                dense_bytes += target.dense_nbytes
                sparse_bytes += target.nbytes
                if dense:
                    dense_tensors[f"{linear}.weight"] = source.turned(linear, target.dense())
            elif linear in source.form.dense and part == "compressed":
                weight = {f"{linear}.weight": source.form.dense_weight(linear)}
                tensors |= weight
                dense_tensors |= weight if dense else {}
            elif not (linear in stored_otherwise and part in TARGET_PARTS):
                kept, twin = _other_tensors(
                    source, name, asked, head_weight, has_twin=dense is not None
                )
                tensors |= kept
                dense_tensors |= twin
            progress(done := done + 1, len(source.files))
        if tensors:
            save_file(tensors, compressed / file.name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, file.name)
        if dense and dense_tensors:
            save_file(dense_tensors, dense / file.name, metadata={"format": "pt"})
            dense_written |= dict.fromkeys(dense_tensors, file.name)

    dense_config = {
        k: v for k, v in source.config.items() if k not in ("quantization_config", OLD_KEY)
    }
    if asked:
        dense_config["tie_word_embeddings"] = False
    quantization = plan.record(source)
    config = {**dense_config, "quantization_config": quantization_config(source, quantization)}
    record = {
        "method": None,
        "n": source.pattern.n,
        "m": source.pattern.m,
        **({"kept_of_64": dict(source.kept_of_64)} if source.kept_of_64 else {}),
        "targets": sorted(targets),
        **source.record,
        "converted_from": {file.name: sha256(file) for file in names_of},
        "quantization": quantization,
        "dense_linear_weight_bytes": dense_bytes,
        "linear_weight_bytes": sparse_bytes,
    }
    _finish(source.path, compressed, written, config, {**record, "kind": "compressed"})
    if dense:
        _finish(source.path, dense, dense_written, dense_config, {**record, "kind": "pruned"})


def _other_tensors(
    source: ModelDirectory,
    name: str,
    asked: Quantization | None,
    head_weight: str | None,
    has_twin: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What becomes of a tensor that belongs to no target.

    Args:
        asked: how the output layer is quantised now; None: it is not.
        head_weight: then of `_head_weight`, else None.
        has_twin: whether the dense twin is written.

    Returns:
        tensors by name of the compressed directory, and of its dense twin.
    """
    tensor = source.get(name)
    module, _, part = name.rpartition(".")
    head = f"{source.head}.weight"
    if asked and name == head_weight:  # the output layer's, or the embedding that it shares
        quantized = QuantizedHead.from_weight(str(source.head), tensor, asked, name)
        kept = {} if name == head else {name: tensor}
        twin = {**kept, head: quantized.dense()} if has_twin else {}
        return {**kept, **quantized.tensors()}, twin
    if asked and name == head:  # a copy of the embedding
        return {}, {}
    if source.head_dtype and module == source.head and part in HEAD_PARTS:
        twin = {}
        if has_twin and name.endswith(WEIGHTS):
            stored = QuantizedHead.from_parts(module, source.parts(module))
            twin = {head: stored.dense(source.model_dtype)}
        return {name: tensor}, twin
    return {name: tensor}, {name: tensor}


def _warn_of_changes(source: ModelDirectory) -> None:
    """Says what of the source is not served as it was (formats/), or not by vLLM."""
    if reason := not_by_vllm(source.targets, source.linears.keys() - set(source.targets)):
        logger.warning("%s: %s", source.path, reason)
    if isinstance(source.form, Ragged):
        if source.form.costs:
            logger.warning("%s: %s", source.path, source.form.costs)
        if large := [name for name in source.form.dense if name in source.candidates]:
            logger.warning(
                "%s: %d linears become dense, such as %s: more than %d of 64 weights are kept, or "
                "in_features is not a multiple of 64",
                source.path,
                len(large),
                large[0],
                MOST_KEPT,
            )
    is_integer = source.quantized is not None and not source.form.is_widened
    num_static = sum(name.endswith(".input_scale") for name in source.files)
    if num_static:
        logger.warning(
            "%s: the input_scale of %d linears is left out: activations are %s",
            source.path,
            num_static,
            "quantised for each token" if is_integer else "not quantised",
        )
    groups = (source.quantization.get("config_groups") or {}).values()
    if is_integer and not all(group.get("input_activations") for group in groups):
        logger.warning(
            "%s: its activations are not quantised, but serving quantises them to int8 for each "
            "token",
            source.path,
        )
    if source.form.is_widened and source.quantized != "float8":
        logger.warning(
            "%s: no kernel supports the scale groups of its %s weights, so they become %s; "
            "`cast-serve convert OUT OUT2 --quantize int8` makes them smaller again",
            source.path,
            source.quantized,
            source.model_dtype,
        )


def _warn_of_training(source: ModelDirectory, plan: Plan) -> None:
    """Says where the source is not quantised as it was trained to be."""
    trained_as = source.record.get("trained_as")
    if trained_as is None or plan.is_trained(source):
        return
    group = trained_as["scale_group"]
    flags = f"--quantize {trained_as['quantize']}" + (f" --scale-group {group}" if group else "")
    logger.warning(
        "%s: it was trained to be converted from the gated checkpoint with %s, but here it is %s",
        source.path,
        flags,
        "quantised with newly chosen scales" if plan.quantization else "not quantised",
    )


def _head_weight(source: ModelDirectory, targets: set[str]) -> str:
    """The name of the tensor that holds the output layer's weight.

    Raises:
        CheckpointError: if there is none, or the output layer is 2:4 itself.
    """
    if source.head is None or source.head in targets:
        which = "no output layer" if source.head is None else f"{source.head} among its targets"
        raise CheckpointError(f"{source.path} has {which}; give --head none")
    name = f"{source.tied_embedding or source.head}.weight"
    if name.removesuffix(".weight") in source.form.dense:
        raise CheckpointError(
            f"{source.path} stores {name} as a bitmask; convert it without --quantize, then "
            "convert OUT with it"
        )
    if name not in source.files:
        raise CheckpointError(f"{source.path} has no tensor {name}; the checkpoint is incomplete")
    return name


def _finish(
    source: Path,
    folder: Path,
    written: dict[str, str],
    config: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Copies the small files that a hub would give; writes index, config and cast.json last."""
    for file in source.iterdir():
        is_ours = file.name in ("config.json", CAST_JSON) or ".safetensors" in file.name
        if file.is_file() and not is_ours and any(map(file.match, hub.WANTED)):
            shutil.copyfile(file, folder / file.name)  # without its mode: a card is written anew
    write_record(folder, record, config=config, weight_map=written)
