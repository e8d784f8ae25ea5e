"""Texts, data sets and folders of tokens give the same tokens, whatever their size and form."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from cast_serve.checkpoint.record import CheckpointError
from cast_serve.errors import UsageError
from cast_train import documents, tokens
from cast_train.checkpoint import models
from cast_train.documents import TOKENS_JSON, Documents, find, weighted
from cast_train.tokens import read_tokens, to_blocks, tokenize, write_tokens

ROWS = [f"document {i}, a short one. " * (1 + i % 3) for i in range(40)]


class Bytes:
    """A tokenizer of one token per byte, and 256 to end a document."""

    eos_token_id = 256

    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()) for text in texts]}


def of(*pieces):
    return [token for part in tokenize(pieces, Bytes()) for token in part.tolist()]


def jsonl(path, rows, field="text"):
    path.write_text("".join(json.dumps({field: row, "n": i}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def end_dir(llama_dir, tmp_path_factory):
    """`llama_dir` with an end token."""
    folder = tmp_path_factory.mktemp("end") / "model"
    models.load_dense(llama_dir).save_pretrained(folder)
    tokenizer = models.load_tokenizer(llama_dir)
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def names(tmp_path):
    """Text in every form: a file, .jsonl, .jsonl.gz and .parquet."""
    (tmp_path / "a.txt").write_text("One line.\nAnother.\n" * 20)
    jsonl(tmp_path / "b.jsonl", ROWS)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(jsonl(tmp_path / "c.part", ROWS[:5]).read_text())
    datasets.Dataset.from_dict({"text": [*ROWS[5:9], None, " "]}).to_parquet(tmp_path / "d.parquet")
    return [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet")]


def test_documents_are_packed_with_the_end_token_between_them():
    assert of(("ab", True), ("c", False), ("d", True)) == [97, 98, 99, 256, 100]


def test_without_an_end_token_a_blank_line_is_between_them(llama_dir):
    tokenizer = models.load_tokenizer(llama_dir)
    found = np.concatenate(list(tokenize([("ab", True), ("d", True)], tokenizer)))
    assert tokenizer.decode(found) == "ab\n\nd"


def test_tokens_are_those_of_transformers_whatever_a_tokenizer_cuts_and_pads(llama_dir):
    tokenizer = models.load_tokenizer(llama_dir)
    texts = ["one two three " * 9, "a!b", "é漢"]
    wanted = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    found = np.concatenate(list(tokenize([(text, False) for text in texts], tokenizer)))
    assert found.tolist() == sum(wanted, [])


@pytest.mark.parametrize(
    "text", ["one two\nthree\n\nfour " * 50, "x" * 200, "a\r\nb\rc" * 40, "é" * 190]
)
def test_pieces_change_no_token(monkeypatch, tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(documents, "PIECE_CHARS", 64)
    monkeypatch.setattr(documents, "READ_BYTES", 7)
    pieces = list(Documents(find([path])))
    assert len(pieces) > 2
    assert "".join(piece for piece, _ in pieces) == path.read_text()
    assert [is_new for _, is_new in pieces] == [True] + [False] * (len(pieces) - 1)


def test_every_form_gives_its_documents(names):
    found = [piece for piece, _ in Documents(find(names))]
    assert found == [names[0].read_text(), *ROWS, *ROWS[:5], *ROWS[5:9]]


def test_a_folder_and_a_glob_are_their_files(names, tmp_path):
    (tmp_path / "README.md").write_text("not text to train on")
    wanted = list(Documents(find(names)))
    assert list(Documents(find([tmp_path]))) == wanted
    assert list(Documents(find([tmp_path / "b.*", tmp_path / "[ac].jsonl.gz"]))) == wanted[1:46]


def test_no_more_tokens_than_asked_for(names, end_dir):
    tokenizer = models.load_tokenizer(end_dir)
    everything = read_tokens(names, tokenizer)
    assert read_tokens(names, tokenizer, 70).tolist() == everything[:70].tolist()
    assert everything.dtype == torch.int64


def test_blocks_hold_the_tokens_in_order():
    assert to_blocks(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UsageError, match=r"has 7 tokens, but 8 are needed .*give more text"):
        to_blocks(torch.arange(7), 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d: (d / "x.txt").write_bytes("déjà".encode("latin-1")),
            r"x\.txt is not UTF-8.*byte 1",
        ),
        (lambda d: (d / "x.txt").write_text(" \n"), r"x\.txt is empty"),
        (lambda d: (d / "x.jsonl").write_text('{"body": "a"}\n'), r"no field 'text', only body"),
        (
            lambda d: (d / "x.jsonl").write_text('{"text": 3}\n'),
            r"row 1 has 3 as 'text'",
        ),
        (lambda d: (d / "x.jsonl").write_text("no json\n"), r"cannot read the data set .*x\.jsonl"),
        (lambda d: (d / "x.parquet").write_text("PAR"), r"cannot read the data set .*x\.parquet"),
        (lambda d: (d / "x.md").write_text("a"), r"folder .* holds no text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UsageError, match=message):
        list(Documents(find([tmp_path])))


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the text .*gone\.txt"):
        find([tmp_path / "gone.txt"])
    with pytest.raises(UsageError, match=r"no file matches .*gone\*"):
        find([tmp_path / "gone*"])
    with pytest.raises(UsageError, match="no text file is given"):
        find([])


def test_weights_are_of_all_texts_or_of_none(tmp_path):
    there = tmp_path / "a=2.txt"
    there.write_text("a")
    assert weighted([there, "b.txt"]) == ([there, Path("b.txt")], None)
    assert weighted([f"{there}=3", "b.txt=0.5"]) == ([there, Path("b.txt")], [3, 0.5])
    with pytest.raises(UsageError, match=r"b\.txt has no weight"):
        weighted(["a.txt=1", "b.txt"])
    for wrong in ("0", "-1", "much", "nan", "inf"):
        with pytest.raises(UsageError, match=f"the weight '{wrong}' is not a number above 0"):
            weighted([f"a.txt={wrong}"])


@pytest.mark.parametrize("shard_tokens", [1, 500, 1 << 26])
def test_a_folder_of_tokens_is_its_texts(names, end_dir, tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(tokens, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 100)
    tokenizer, out = models.load_tokenizer(end_dir), tmp_path / "out"
    record = write_tokens(end_dir, names, out)
    wanted = read_tokens(names, tokenizer)
    assert read_tokens([out], tokenizer).tolist() == wanted.tolist()
    assert read_tokens([out], tokenizer, 77).tolist() == wanted[:77].tolist()
    assert record["num_tokens"] == len(wanted)
    assert (len(record["shards"]) > 1) == (shard_tokens <= 500)
    assert record["dtype"] == "uint16"
    with pytest.raises(CheckpointError, match="exists already"):
        write_tokens(end_dir, names, out)


@pytest.mark.parametrize("num_batches", [1, 4, 8, 14])
def test_killed_it_goes_on_where_its_shards_end(names, end_dir, tmp_path, monkeypatch, num_batches):
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 300)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 100)
    write_tokens(end_dir, names, tmp_path / "whole", max_tokens=2500)

    def interrupted(*arguments, **options):
        for i, found in enumerate(tokenize(*arguments, **options)):
            if i == num_batches:
                raise KeyboardInterrupt
            yield found

    out = tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(tokens, "tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_tokens(end_dir, names, out, max_tokens=2500)
    assert not out.exists()
    partial = tmp_path / "out.partial"
    if num_batches > 1:  # a shard of 300 tokens is there
        with pytest.raises(
            CheckpointError, match=r"out\.partial holds unfinished work; continue it with"
        ):
            write_tokens(end_dir, names, out, max_tokens=2500)
        with pytest.raises(CheckpointError, match="max_tokens is 2500, not 2000"):
            write_tokens(end_dir, names, out, max_tokens=2000, is_resume=True)
    written = sorted(partial.glob("*.bin")) if partial.exists() else []
    times = [path.stat().st_mtime_ns for path in written]
    write_tokens(end_dir, names, out, max_tokens=2500, is_resume=True)
    assert [(out / path.name).stat().st_mtime_ns for path in written] == times
    assert not partial.exists()
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    for path in (tmp_path / "whole").glob("*.bin"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("when", ["in the first file", "before the folder is renamed"])
def test_killed_elsewhere_it_goes_on(names, end_dir, tmp_path, monkeypatch, when):
    out, killed = tmp_path / "out", pytest.raises(KeyboardInterrupt)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        name = "fsync" if when == "in the first file" else "to_disk"
        patched.setattr(tokens, name, kill)
        with killed:
            write_tokens(end_dir, names, out)
    assert not out.exists()
    assert any((tmp_path / "out.partial").iterdir())
    write_tokens(end_dir, names, out, is_resume=True)
    tokenizer = models.load_tokenizer(end_dir)
    assert read_tokens([out], tokenizer).tolist() == read_tokens(names, tokenizer).tolist()


def test_another_run_s_folder_is_not_taken(names, end_dir, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json is not readable"):
        write_tokens(end_dir, names, tmp_path / "out", is_resume=True)
    with pytest.raises(CheckpointError, match="holds unfinished work"):
        write_tokens(end_dir, names, tmp_path / "out")


def test_nothing_is_left_of_a_text_that_is_refused(end_dir, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", ROWS, field="body")
    with pytest.raises(UsageError, match="has no field 'text', only body, n"):
        write_tokens(end_dir, [path], tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.jsonl"]
    assert write_tokens(end_dir, [path], tmp_path / "out", field="body")["field"] == "body"


def test_a_damaged_folder_and_another_tokenizer_are_refused(names, end_dir, llama_dir, tmp_path):
    tokenizer, out = models.load_tokenizer(end_dir), tmp_path / "out"
    write_tokens(end_dir, names[:1], out)
    with pytest.raises(UsageError, match=r"out holds tokens and .*b\.jsonl is text"):
        read_tokens([out, names[1]], tokenizer)
    other = models.load_tokenizer(llama_dir)
    swapped = other.get_vocab()
    other.get_vocab = lambda: {token: 255 - number for token, number in swapped.items()}
    with pytest.raises(CheckpointError, match=r"the model and .*out have different tokenizers"):
        read_tokens([out], other)
    shard = out / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"tokens-00000\.bin has 758 bytes, .* says 760"):
        read_tokens([out], tokenizer)
    content = json.loads((out / TOKENS_JSON).read_text())
    (out / TOKENS_JSON).write_text(json.dumps({**content, "format_version": 9}))
    with pytest.raises(CheckpointError, match="has format_version 9, but this program reads 1"):
        read_tokens([out], tokenizer)


def test_a_data_set_of_a_hub_is_streamed(end_dir, tmp_path, monkeypatch):
    asked: dict[str, Any] = {}

    def load_dataset(name, subset, **options):
        asked.update(name=name, subset=subset, **options)
        return datasets.Dataset.from_dict({"text": ROWS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write_tokens(
        end_dir, [Path("org/name@v1")], tmp_path / "out", max_tokens=100, of_hub=documents.Hub("en")
    )
    assert asked == {
        "name": "org/name",
        "subset": "en",
        "split": "train",
        "revision": "v1",
        "streaming": True,
    }
    tokenizer = models.load_tokenizer(end_dir)
    assert tokenizer.decode(read_tokens([tmp_path / "out"], tokenizer)) == "!".join(ROWS)[:100]
