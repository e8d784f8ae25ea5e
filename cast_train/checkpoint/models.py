"""A trained model <-> a gated or pruned checkpoint directory, written whole and verified.

Both are ordinary HF directories (safetensors, config, tokenizer) plus ``cast.json``. A gated one
has beside each target's ``<name>.weight`` (unmasked, bf16) its ``<name>.gate`` (logits, fp32, same
shape; with method fixed the mask, bool; none with method adams, which ranks by |W|) and maybe
``<name>.scale`` (fp32, scaling.py) or ``<name>.weight_scale`` (bf16, quantizing.py), and its
config.json says that it is gated (`GATED_METHOD`). To harden it: mask = the N largest logits of
each group, W * mask * scale. A pruned one has its zeros written.

Directories appear whole and their shards are checked (record.py); no pickle is read or written.
"""

import contextlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cast_serve.checkpoint.architecture import attention_of
from cast_serve.checkpoint.declared import Structure
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.hub import PAPERS
from cast_serve.checkpoint.record import (
    CAST_JSON,
    GATED_METHOD,
    CheckpointError,
    check_new,
    new_directory,
    read_json,
    read_record,
    shards,
    verify,
    write_record,
)
from cast_serve.checkpoint.shard import each_tensor
from cast_serve.sparsity.pattern import Pattern
from cast_train.checkpoint import channel_order, conv1d, rows
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.checkpoint.compressed import load_compressed
from cast_train.gates import gating, quantizing, scaling
from cast_train.gates.schedules import Phase

logger = logging.getLogger(__name__)

MAX_RENAMED = 0.05  # share of tokens
GATE_PARTS = ("gate", "scale", "weight_scale")  # what is stored beside a target's weight


def write(
    out: Path,
    model: nn.Module,
    tokenizer: Any,
    record: Mapping[str, Any],
    gate_tensors: Mapping[str, Tensor] | None = None,
    *,
    source: Path,
    order: ChannelOrder | None = None,
) -> dict[str, Any]:
    """Writes a whole checkpoint directory or none.

    Args:
        out: must not exist.
        model: a transformers model as the functions below load it, without parametrizations, in
            the dtype to store; or a sharded one (rows.py).
        tokenizer: its tokenizer.
        record: what cast.json says besides format_version, versions and sha256; needs ``kind``.
        gate_tensors: as `gating.detach` gives them; None if not gated.
        source: the model directory that it came from; its card and licence are copied.
        order: of its channels, seen from the dense model; None: the same.

    Returns:
        cast.json's content.

    Raises:
        CheckpointError: if out exists.
    """
    check_new(out)
    with new_directory(out) as partial:
        if isinstance(model, FSDPModule):
            rows.save(partial, model, gate_tensors or {})
        else:
            state = conv1d.transposed(model, {**model.state_dict(), **(gate_tensors or {})})
            model.save_pretrained(partial, state_dict=state, max_shard_size=rows.MAX_SHARD_SIZE)
        if record.get("kind") == "gated":
            _mark_gated(partial / "config.json")
        tokenizer.save_pretrained(partial)
        channel_order.write(partial, order)
        for pattern in PAPERS:
            for file in source.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        return write_record(partial, {**record, "versions": _versions()})


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: if the directory is missing or has no tokenizer.
    """
    check_directory(directory)
    return read_tokenizer(directory)


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory that need not hold a model.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no readable tokenizer: {error}") from error


def _mark_gated(config: Path) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": GATED_METHOD}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_dense(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model from an ordinary HF directory.

    Raises:
        CheckpointError: if the directory is missing, lacks weights of the model, or is gated or
            compressed.
    """
    check_dense(directory)
    return load_unmasked(directory, dtype)


def check_dense(directory: Path) -> None:
    """Refuses what `load_dense` would, of which no weight need be read.

    Raises:
        CheckpointError: if the directory is missing, gated or compressed.
    """
    if (kind := kind_of(directory)) in ("gated", "compressed"):
        raise CheckpointError(f"{directory} is {kind}; give the dense model that it was made of")


def sparse_targets(directory: Path, pattern: Pattern) -> dict[str, Pattern] | None:
    """The linears of a pruned or compressed directory that have zeros, and their patterns.

    No weight is read.

    Returns:
        None: the directory is dense, so that all its linears may become sparse.

    Raises:
        CheckpointError: if its weights cannot be trained: it is missing, gated or quantised, or
            its zeros are of another pattern.
    """
    kind = kind_of(directory)
    if kind == "gated":
        raise CheckpointError(
            f"{directory} is gated; give the dense model that it was made of or, to train it "
            "further, the output of cast-serve convert"
        )
    if kind not in ("pruned", "compressed"):
        return None
    found = ModelDirectory(directory)
    if found.quantized:
        raise CheckpointError(
            f"{directory} is quantised ({found.quantized}); give the directory that it was made "
            "from"
        )
    if found.pattern != pattern:
        raise CheckpointError(
            f"{directory} is {found.pattern}, and its zeros are the mask; set sparsity to that "
            f"instead of {pattern}"
        )
    return {name: found.pattern_of(name) for name in found.targets}


def load_unmasked(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """As `load_dense`; of a gated directory the weights without their gates."""
    check_directory(directory)
    try:
        settings = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        settings.__dict__.pop("quantization_config", None)
        with _no_report_of_keys():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=settings,
                dtype=dtype,
                attn_implementation=attention_of(settings),
                ignore_mismatched_sizes=True,  # refused below, by name
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} is not a language model that can be read: {error}"
        ) from error
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{directory}: {name} is {list(found)}, but its config.json asks for {list(wanted)}; "
            "copy the whole directory again"
        )
    if report["missing_keys"]:
        raise CheckpointError(f"{directory} lacks the weights {sorted(report['missing_keys'])}")
    known = tuple(f".{part}" for part in GATE_PARTS)
    unknown = [key for key in report["unexpected_keys"] if not key.endswith(known)]
    if unknown:
        logger.warning(
            "%s: ignoring %d tensors that the model does not use, such as %s",
            directory,
            len(unknown),
            min(unknown),
        )
    _check_generation(directory, model)
    return conv1d.to_linears(model)


def _check_generation(directory: Path, model: Any) -> None:
    """Refuses settings of generation_config.json with which transformers saves no model.

    Raises:
        CheckpointError: naming them, before any work is done that could then not be saved.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"{directory}/generation_config.json contradicts itself, so no model made from this "
            f"one could be saved; if it samples, set do_sample to true there: {error}"
        ) from error


@contextlib.contextmanager
def _no_report_of_keys() -> Iterator[None]:
    """transformers prints a table of all gates, as of any tensor that it does not know."""
    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def load_any(
    directory: Path, dtype: torch.dtype = torch.bfloat16, *, is_sharded: bool = False
) -> Any:
    """A compressed or an ordinary directory, as `load_compressed` and `load_unmasked` read them.

    Args:
        is_sharded: as `rows.load` does; every process must call.
    """
    if is_sharded:
        model = rows.load(directory, dtype)
        _check_generation(directory, model)
        return model
    load = load_compressed if kind_of(directory) == "compressed" else load_unmasked
    return load(directory, dtype)


def load_gated(
    directory: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, dict[str, gating.Gate], Phase]:
    """A gated checkpoint, verified, with its gates attached.

    Returns:
        the model, its gates by target name, and the phase that training ended in.

    Raises:
        CheckpointError: if it is damaged or lacks gates.
    """
    record = verify(directory)
    model = load_unmasked(directory, dtype)
    targets = {name: model.get_submodule(name) for name in record["targets"]}
    structure = Structure(Pattern(record["n"], record["m"]), record.get("kept_of_64") or {})
    patterns = {name: structure.of(name) for name in targets}
    method, selector = record["method"], record.get("selector")
    if selector not in ("gumbel", "penalty"):  # the others' logits are read by soft_topk
        selector = "soft_topk"
    gate_map = gating.attach(targets, patterns, method=method, selector=selector)
    stored = conv1d.transposed(model, read_gates(directory, targets))
    for name, gate in gate_map.items():
        if method != "adams":
            if f"{name}.gate" not in stored:
                raise CheckpointError(f"{directory} has no gates for {name}")
            gate.take(stored[f"{name}.gate"])
    if method == "adams":
        gating.freeze(gate_map)
    elif method == "ste":  # no other mask than that of the stored scores
        gating.mark_frozen(gate_map)
    scales = {name: stored[f"{name}.scale"] for name in targets if f"{name}.scale" in stored}
    if scales:
        num_parts = next(iter(scales.values())).shape[1]
        scaling.attach(targets, num_parts, structure.pattern.m)
        for name, linear in targets.items():
            linear.parametrizations.weight[1].scale.data.copy_(scales[name])
    if trained_as := record.get("trained_as"):
        if missing := [name for name in targets if f"{name}.weight_scale" not in stored]:
            raise CheckpointError(f"{directory} has no weight_scale for {missing[0]}")
        scales = {name: stored[f"{name}.weight_scale"] for name in targets}
        quantizing.attach(targets, gate_map, trained_as["scale_group"], scales)
    return model, gate_map, Phase(**record["schedules_end"])


def kind_of(directory: Path) -> str:
    """``gated``, ``pruned``, ``compressed`` or ``dense``: what `cast-train eval` is given.

    Raises:
        CheckpointError: if it is not a model directory, or config.json or cast.json is damaged.
    """
    check_directory(directory)
    settings = read_json(directory / "config.json")
    quantization = settings.get("quantization_config") or {}
    if quantization and quantization.get("quant_method") != GATED_METHOD:
        return "compressed"
    record = read_record(directory) if (directory / CAST_JSON).exists() else {}
    return str(record.get("kind", "dense"))


def check_same_tokens(directory: Path, other: Path) -> None:
    """Refuses two models whose tokens are other texts, though they may be as many.

    Some may differ: chat models rename reserved tokens. A directory without a tokenizer passes.

    Raises:
        CheckpointError: if more than MAX_RENAMED of the tokens that both have differ.
    """
    try:
        tokenizers = [load_tokenizer(folder) for folder in (directory, other)]
    except CheckpointError:
        return
    check_same_vocabulary(tokenizers[0], tokenizers[1], f"{directory} and {other}")


def check_same_vocabulary(tokenizer: Any, other: Any, names: str) -> None:
    """Refuses two tokenizers as `check_same_tokens` does.

    Args:
        names: of both, for the message.

    Raises:
        CheckpointError: if more than MAX_RENAMED of the tokens that both have differ.
    """
    ours, theirs = (
        {number: token for token, number in each.get_vocab().items()} for each in (tokenizer, other)
    )
    both = ours.keys() & theirs.keys()
    differ = sorted(number for number in both if ours[number] != theirs[number])
    if len(differ) > MAX_RENAMED * len(both):
        first = differ[0]
        raise CheckpointError(
            f"{names} have different tokenizers: {len(differ)} of {len(both)} tokens differ, such "
            f"as {first}, {ours[first]!r} and {theirs[first]!r}; give models with the same "
            "tokenizer"
        )


def vocabulary_size(directory: Path) -> int:
    """Tokens that a model directory's config.json names.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        settings = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json cannot be read: {error}") from error
    return int(settings.get_text_config().vocab_size)


def check_directory(directory: Path) -> None:
    """Refuses what is no model directory.

    Raises:
        CheckpointError: if it is missing or has no config.json.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give a downloaded model's directory"
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json, so it is not a model directory")


def read_gates(directory: Path, targets: Iterable[str]) -> dict[str, Tensor]:
    """What is stored beside the targets' weights, by tensor name."""
    wanted = {f"{name}.{part}" for name in targets for part in GATE_PARTS}
    return {key: tensor for key, tensor in tensors(directory) if key in wanted}


def tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a directory's shards, one at a time.

    Raises:
        CheckpointError: if a shard is damaged, or a tensor stands in two.
    """
    for key, _, shard in each_tensor(shards(directory)):
        yield key, shard.get_tensor(key)


def _versions() -> dict[str, str]:
    names = ("cast-serve", "torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}
