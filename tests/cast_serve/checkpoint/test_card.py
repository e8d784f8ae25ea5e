from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama

TRAINED = {
    "steps": 1234,
    "tokens_seen": 567890,
    "config": {"learning_rate": 5e-4, "distillation_weight": 0.9},
    "quality": {
        "text": "wiki.txt",
        "perplexity_hard": 48.25,
        "num_tokens": 8176,
        "context_tokens": 512,
    },
}
DENSE = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- small\n---\n# Tiny\nThe dense model.\n"


def test_a_card_has_the_figures_and_the_licence(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama(), **TRAINED)
    (source / "README.md").write_text(DENSE)
    summary = convert(source, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert card.data.tags == ["small", "2:4", "sparse", "compressed-tensors"]
    assert summary["bits_per_weight"] == 9.0
    for text in (
        "in 14 linears",
        "| share of zeros in the pruned linears | 50.0% |",
        "| stored bits per weight in them | 9.0 |",
        "| perplexity (wiki.txt, 8,176 tokens in contexts of 512) | 48.25 |",
        "1,234 steps, 567,890 tokens, method `gates`, learning rate 0.0005",
        "cast-serve vllm serve DIR",
    ):
        assert text in card.text
    assert card.text.count("# Tiny\nThe dense model.") == 1


def test_converted_again_the_dense_card_stands_once(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama(), **TRAINED)
    (source / "README.md").write_text(DENSE)
    convert(source, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "int8", quantization=Quantization("int8", head="int8"))
    text = (tmp_path / "int8/README.md").read_text()
    assert text.count("# A 2:4-sparse language model") == text.count("# Tiny") == 1
    assert text.count("license: apache-2.0") == text.count("compressed-tensors") == 1
    assert "| perplexity before the values were quantised (wiki.txt" in text
    assert "in 8 bits" in text


@pytest.mark.parametrize("card", [None, "", "# No front matter\n", "---\n: {[\n---\n# Broken\n"])
def test_any_source_s_card_will_do(card: str | None, save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    if card is not None:
        (source / "README.md").write_text(card)
    convert(source, tmp_path / "out")
    written = ModelCard.load(tmp_path / "out/README.md")
    assert written.data.tags == ["2:4", "sparse", "compressed-tensors"]
    assert "How it was trained" not in written.text
    assert "perplexity" not in written.text
    assert "# No front matter" in written.text or "No front" not in (card or "")


@pytest.mark.parametrize(
    ("field", "value"), [("source", {"model": 5}), ("config", 5), ("quality", {"text": "x"})]
)
def test_a_record_of_another_program_is_refused(
    save_gated: Save, tmp_path: Path, field: str, value: object
) -> None:
    source = save_gated(tiny_llama(), **{field: value})
    with pytest.raises(CheckpointError, match="no model card can be written"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
