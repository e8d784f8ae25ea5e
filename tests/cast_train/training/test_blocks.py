"""Texts in memory and folders of tokens are shared out alike, whole or by weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import SeedableRandomSampler
from numpy.typing import NDArray

from cast_serve.errors import UsageError
from cast_train.checkpoint import models
from cast_train.config import TrainConfig
from cast_train.tokens import write_tokens
from cast_train.training import blocks as blocks_module
from cast_train.training.blocks import RandomOrder, TokenBlocks, read_blocks, split_held_out
from cast_train.training.run import train


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(settings_file, steps=3)


@pytest.fixture
def folder(llama_dir, text_file, tmp_path, monkeypatch):
    """The text's tokens, in several files whose ends are ends of blocks."""
    monkeypatch.setattr("cast_train.tokens.SHARD_TOKENS", 1)
    monkeypatch.setattr("cast_train.tokens.BATCH_CHARS", 1)
    monkeypatch.setattr("cast_train.documents.PIECE_CHARS", 32 * 45)
    write_tokens(llama_dir, [text_file], tmp_path / "tokens")
    return tmp_path / "tokens"


def test_blocks_are_counted_through_all_texts():
    numbers = np.arange(10).reshape(5, 2)
    texts: list[NDArray[Any]] = [numbers[:3].astype(np.uint16), numbers[3:].astype(np.uint32)]
    blocks = TokenBlocks(texts, np.array([4, 0, 2, 3]))
    assert blocks.tensor().tolist() == [[8, 9], [0, 1], [4, 5], [6, 7]]
    assert blocks.tensor(1).tolist() == [[8, 9]]
    assert blocks[3]["labels"].tolist() == [6, 7]


def test_the_order_is_that_of_accelerate_in_every_epoch():
    ours, theirs = RandomOrder(3000, seed=7), SeedableRandomSampler(range(3000), data_seed=7)
    assert [list(ours), list(ours)] == [list(theirs), list(theirs)]
    ours.set_epoch(0)
    theirs.set_epoch(0)
    assert list(ours) == list(theirs)


def test_the_held_out_split_is_not_trained_on():
    train_ids, heldout = split_held_out(5, 2, 3, 2)
    assert (train_ids.tolist(), heldout.tolist()) == ([1, 3, 4], [0, 2])
    with pytest.raises(UsageError, match=r"has 8 tokens .*12 are needed: 4 blocks of 2 to train"):
        split_held_out(4, 2, 4, 2)


def test_a_run_on_a_folder_of_tokens_is_the_run_on_its_text(
    llama_dir, text_file, folder, config, tmp_path
):
    tokenizer = models.load_tokenizer(llama_dir)
    assert len(list(folder.glob("*.bin"))) > 2
    of_text = read_blocks([text_file], None, tokenizer, config)
    of_folder = read_blocks([folder], None, tokenizer, config)
    for name in ("train", "validation"):
        wanted, found = getattr(of_text, name).tensor(), getattr(of_folder, name).tensor()
        assert found.tolist() == wanted.tolist()
    assert of_folder.calibration.tolist() == of_text.calibration.tolist()
    written = [
        train(llama_dir, [text], tmp_path / name, config)["sha256"]
        for text, name in ((text_file, "of-text"), (folder, "of-folder"))
    ]
    assert written[0] == written[1]


def test_a_folder_that_changed_is_another_run(llama_dir, text_file, folder, config, tmp_path):
    train(llama_dir, [folder], tmp_path / "out", config)
    text_file = tmp_path / "other.txt"
    text_file.write_text("Another text.\n" * 400)
    folder.rename(tmp_path / "old")
    write_tokens(llama_dir, [text_file], folder)
    with pytest.raises(UsageError, match=r"out exists and is another run \(source\.text\[0\]"):
        train(llama_dir, [folder], tmp_path / "out", config)


def test_what_is_held_out_of_a_text_is_not_trained_on_as_tokens(
    llama_dir, text_file, folder, config, tmp_path
):
    write_tokens(llama_dir, [text_file], tmp_path / "again")
    with pytest.raises(UsageError, match=r"--text has .* twice"):
        train(llama_dir, [folder, tmp_path / "again"], tmp_path / "out", config)
    with pytest.raises(UsageError, match=r"--heldout train\.txt is among the training texts"):
        train(llama_dir, [folder], tmp_path / "out", config, heldout_file=text_file)


def test_each_text_gives_its_share(llama_dir, config, tmp_path):
    letters = {"a": 60_000, "b": 3_000}
    for letter, length in letters.items():
        (tmp_path / f"{letter}.txt").write_text(letter * length)
    texts = [tmp_path / f"{letter}.txt" for letter in letters]
    tokenizer = models.load_tokenizer(llama_dir)
    settings = {**config.as_dict(), "steps": 100}
    shared = read_blocks(texts, None, tokenizer, TrainConfig.from_dict(settings), [1, 3])
    tokens = [tokenizer.decode(block) for block in shared.train.tensor()]
    assert len(tokens) == 100 * config.batch_blocks
    assert sum(set(block) == {"b"} for block in tokens) == 300
    # The 91 blocks of b that are not held out come three times, or four.
    counts = np.unique(shared.train.ids[shared.train.ids >= 60_000 // 32], return_counts=True)[1]
    assert set(counts) == {3, 4}
    assert len(set(tokens[:8])) == 2  # in random order
    again = read_blocks(texts, None, tokenizer, TrainConfig.from_dict(settings), [1, 3])
    assert again.train.ids.tolist() == shared.train.ids.tolist()


def test_weights_are_part_of_the_run(llama_dir, config, tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text(f"Of {text.name}.\n" * 400)
    record = train(llama_dir, texts, tmp_path / "out", config, weights=[1, 3])
    assert record["source"]["text_weights"] == [1, 3]
    with pytest.raises(UsageError, match=r"another run \(source\.text_weights\[1\] is 3, not 2"):
        train(llama_dir, texts, tmp_path / "out", config, weights=[1, 2])


def test_more_text_than_one_run_should_tokenise_is_refused(
    llama_dir, text_file, config, monkeypatch
):
    tokenizer = models.load_tokenizer(llama_dir)
    monkeypatch.setattr(blocks_module, "MOST_BYTES", 1000)
    with pytest.raises(UsageError, match=r"has more than .* cast-train tokenize --model MODEL"):
        read_blocks([text_file], None, tokenizer, config)
    with pytest.raises(UsageError, match=r"org/name is not a file here; .* cast-train tokenize"):
        read_blocks([Path("org/name")], None, tokenizer, config)
