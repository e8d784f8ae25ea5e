"""config.json -> the model that transformers builds of it, without its weights."""

from pathlib import Path
from typing import Any

import torch

from cast_serve.checkpoint.declared import OLD_KEY
from cast_serve.checkpoint.record import CheckpointError


def empty_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model of config.json, with weights by chance, and with the generation settings."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    settings.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(
        settings, dtype=dtype, attn_implementation=attention_of(settings)
    )
    if (directory / "generation_config.json").is_file():  # which `from_config` knows nothing of
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def attention_of(settings: Any) -> str | None:
    """The attention that transformers must compute a model with; None: any.

    PyTorch's fused attention leaves out Gemma2's cap of the scores, without a word.
    """
    is_capped = getattr(settings.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if is_capped else None


def meta_model(directory: Path, num_tensors: int) -> Any:
    """The model without weights, as transformers builds it of config.json.

    Raises:
        CheckpointError: if transformers cannot, or there are fewer tensors than layers: a layer
            that is not stored could be one of a billion.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        for key in ("quantization_config", OLD_KEY):
            config.__dict__.pop(key, None)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if num_layers > num_tensors:
            raise CheckpointError(f"it has {num_layers} layers, but {num_tensors} tensors")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises whatever a foreign config.json makes it raise
        raise CheckpointError(
            f"{directory}/config.json does not describe a model that can be built: {error!s:.500}"
        ) from error


def linears_of(model: torch.nn.Module) -> dict[str, bool]:
    """Every linear by name, and whether it stores its weight transposed, as GPT-2's Conv1D."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind == "Conv1D" for name, kind in kinds.items() if kind in ("Linear", "Conv1D")}


def name_of(model: torch.nn.Module, wanted: torch.nn.Module | None) -> str | None:
    """The name of a module in its model; None if it is not there."""
    return next((name for name, module in model.named_modules() if module is wanted), None)
