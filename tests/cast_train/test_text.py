import pytest
import torch

from cast_train import text
from cast_train.text import TokenBlocks, read_texts, split_held_out, to_blocks, tokenize


class Bytes:
    """A tokenizer of one token per byte."""

    def __call__(self, piece, **_):
        return {"input_ids": list(piece.encode())}


def test_pieces_change_no_token(monkeypatch):
    words = "one two\nthree\n\nfour " * 50
    monkeypatch.setattr(text, "PIECE_CHARS", 64)
    assert tokenize(words, Bytes()).tolist() == list(words.encode())
    assert tokenize("x" * 200, Bytes()).tolist() == [ord("x")] * 200


def test_no_more_tokens_than_asked_for(monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARS", 64)
    assert len(tokenize("word\n" * 100, Bytes(), 70)) == 70


def test_blocks_hold_the_tokens_in_order():
    blocks = to_blocks(torch.arange(11), 4)
    assert blocks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert TokenBlocks(blocks)[1]["labels"].tolist() == [4, 5, 6, 7]


def test_the_held_out_split_is_not_trained_on():
    train, heldout = split_held_out(torch.arange(10).view(5, 2), 2, 3)
    assert heldout.tolist() == [[0, 1], [4, 5]]
    assert train.tolist() == [[2, 3], [6, 7], [8, 9]]


def test_too_short_a_text_says_what_it_has_and_needs():
    with pytest.raises(ValueError, match=r"has 7 tokens, but 8 are needed .*give more text"):
        to_blocks(torch.arange(7), 8)
    with pytest.raises(ValueError, match=r"has 8 tokens .*12 are needed: 4 blocks of 2 to train"):
        split_held_out(torch.arange(8).view(4, 2), 2, 4)


def test_files_that_are_no_text_are_named(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà".encode("latin-1"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        read_texts([latin])
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_texts([empty])
    with pytest.raises(ValueError, match=r"cannot read the text .*gone\.txt"):
        read_texts([tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match="no text file is given"):
        read_texts([])
