"""Tiny random models with a byte tokenizer, and text for them, made once per session."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SETTINGS = """
method = "gates"
channel_order = "given"
block_size = 32
batch_blocks = 4
heldout_blocks = 4
calibration_blocks = 4
learning_rate = 3e-3
hidden_states_weight = 0.0
checkpoint_every = 4
"""


def _save(model: torch.nn.Module, folder: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def _llama(folder: Path, hidden_size: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _save(LlamaForCausalLM(config), folder)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _llama(tmp_path_factory.mktemp("llama") / "dense", hidden_size=32)


@pytest.fixture(scope="session")
def words_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `llama_dir`, with linears whose columns are whole words of 64."""
    return _llama(tmp_path_factory.mktemp("words") / "dense", hidden_size=64)


@pytest.fixture(scope="session")
def large_weights_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama_dir` with weights so large that a wrong one shows in the logits, exact in bf16."""
    model = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(drawn.bfloat16())
    folder = tmp_path_factory.mktemp("large_weights") / "dense"
    shutil.copytree(llama_dir, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2") / "dense")


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 100, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def heldout_file(text_file: Path) -> Path:
    """A file that begins as the training text does, so that what is learnt shows in it."""
    path = text_file.with_name("heldout.txt")
    path.write_text(text_file.read_text(encoding="utf-8") + "The end.\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "train.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def untrained_perplexity(model_dir: Path, text_file: Path) -> float:
    """Of the dense model on the text's first 128 tokens, context 32: about 256, of 256 tokens.

    Runs measure on the same if they have the settings above and the text as `heldout_file`.
    """
    return _perplexity(model_dir, text_file)


@pytest.fixture(scope="session")
def untrained_llama_perplexity(llama_dir: Path, text_file: Path) -> float:
    """As `untrained_perplexity`."""
    return _perplexity(llama_dir, text_file)


def _perplexity(model_dir: Path, text_file: Path) -> float:
    from cast_train.checkpoint import models
    from cast_train.evaluate.perplexity import perplexity
    from cast_train.tokens import read_tokens, to_blocks

    tokens = read_tokens([text_file], models.load_tokenizer(model_dir), 128)
    model = models.load_dense(model_dir, torch.float32)
    return perplexity(model, to_blocks(tokens, 32)).perplexity


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`train`, interrupted in a step, as by Ctrl-C."""
    from cast_train.training.run import train
    from cast_train.training.trainer import CastTrainer

    def interrupted(step: int, *arguments: Any) -> None:
        compute_loss = CastTrainer.compute_loss

        def stop(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return compute_loss(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(CastTrainer, "compute_loss", stop)
            with pytest.raises(KeyboardInterrupt):
                train(*arguments)

    return interrupted


@pytest.fixture
def begun_at(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The names of the checkpoints that this test's runs went on from; None where one started."""
    from cast_train.training.trainer import CastTrainer

    found: list[str | None] = []
    begin = CastTrainer.train

    def remember(self: CastTrainer, resume_from_checkpoint: str | None) -> object:
        found.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return begin(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(CastTrainer, "train", remember)
    return found
