"""8-bit 2:4 weights as another program stores them, served as they are: their twin's logits.

The model is small and random, and stored in the forms of compressed-tensors' own fixtures, whose
heads of 8 columns are too few for vLLM's attention on CPUs.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.pattern import TWO_FOUR, hard_mask
from cast_serve.sparsity.targets import find_targets

# A fixture that is imported keeps its name in every test module that asks for it.
from tests.cast_train.conftest import llama_dir  # noqa: F401
from tests.story.conftest import FLAGS, Served, distance_to, serving, variant_infos

pytestmark = pytest.mark.server

FIXTURES = Path(__file__).parents[1] / "cast_serve/checkpoint/fixtures"
KERNELS = {"float8-bitmask": "cast::linear24", "float8-zeros": "cast::linear24"}
TOLERANCE = 1e-2
LARGEST_FLOAT8 = 448


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def store(form: str, folder: Path) -> PreTrainedModel:
    """Writes the random model in the form of a fixture; returns its dequantised twin in fp32."""
    model = random_model()
    stored: dict[str, Tensor] = {}
    for name, module in find_targets(model, TWO_FOUR)[0].items():
        weight = module.weight.data * hard_mask(module.weight.data.abs())
        largest = weight.abs().amax(1, keepdim=True) if form == "float8-bitmask" else weight.max()
        scale = (largest / LARGEST_FLOAT8).bfloat16()
        values = (weight / scale.float()).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        values = values.to(torch.float8_e4m3fn)
        module.weight.data = values.float() * scale.float()
        stored[f"{name}.weight_scale"] = scale.reshape(-1, 1) if scale.dim() else scale.reshape(1)
        if form == "float8-zeros":
            stored[f"{name}.weight"] = values
            continue
        kept, bitmask = compress(values.float())
        stored[f"{name}.compressed"] = kept.to(torch.float8_e4m3fn)
        stored[f"{name}.bitmask"] = bitmask
        stored[f"{name}.shape"] = torch.tensor(weight.shape).reshape(2, 1)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in find_targets(model, TWO_FOUR)[0]:
        del tensors[f"{name}.weight"]
    save_file(tensors | stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    foreign = json.loads((FIXTURES / form / "config.json").read_text())
    config["quantization_config"] = foreign["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def twins_of_forms(
    tmp_path_factory: pytest.TempPathFactory,
    llama_dir: Path,  # noqa: F811
) -> dict[str, tuple[Path, PreTrainedModel]]:
    """By form: the directory, and its dequantised twin in memory."""
    root = tmp_path_factory.mktemp("foreign")
    twins = {form: (root / form, store(form, root / form)) for form in KERNELS}
    for folder, _ in twins.values():
        AutoTokenizer.from_pretrained(llama_dir).save_pretrained(folder)
    return twins


@pytest.fixture(scope="module")
def served(
    twins_of_forms: dict[str, tuple[Path, PreTrainedModel]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    flags = [*FLAGS, "--dtype", "float32", "--logprobs-mode", "raw_logits"]
    folders = {form: folder for form, (folder, _) in twins_of_forms.items()}
    with serving(folders, flags, tmp_path_factory.mktemp("logs") / "up.log") as served:
        yield served


@pytest.mark.parametrize("form", KERNELS)
def test_logits_are_the_dequantised_twins(
    served: Served, twins_of_forms: dict[str, tuple[Path, PreTrainedModel]], form: str
) -> None:
    assert distance_to(served, form, twins_of_forms[form][1]) < TOLERANCE


def test_every_linear_runs_sparse(served: Served) -> None:
    infos = variant_infos(served)
    assert {form: info["kernel"] for form, info in infos.items()} == KERNELS
    assert {info["num_sparse_layers"] for info in infos.values()} == {"14"}
