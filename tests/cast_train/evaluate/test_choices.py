import pytest
import torch

from cast_serve.questions import Question
from cast_train.checkpoint.models import load_dense, load_tokenizer
from cast_train.evaluate.choices import check_names, choice_accuracy


def test_choices_are_scored_by_their_continuation(llama_dir):
    model, tokenizer = load_dense(llama_dir, torch.float32), load_tokenizer(llama_dir)
    choices = ("yes", "a much longer answer", "no")
    scores = []
    for choice in choices:
        prompt = tokenizer("Question: Is it?\nAnswer:").input_ids
        ids = torch.tensor([prompt + tokenizer(f" {choice}").input_ids])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0]
        scores.append(sum(float(log_p[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1])))
    best = scores.index(max(scores))
    norms = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    best_norm = norms.index(max(norms))
    questions = [Question("Is it?", choices, answer) for answer in (best, best, (best + 1) % 3)]
    found = choice_accuracy(model, tokenizer, questions, batch_rows=2)
    assert found.acc == pytest.approx(2 / 3)
    assert found.acc_stderr == pytest.approx((2 / 9 / 2) ** 0.5)
    assert found.acc_norm == sum(q.answer == best_norm for q in questions) / 3
    assert found.num_questions == 3
    assert "is_right_norm" not in found.about()


def test_files_of_one_name_are_refused(tmp_path):
    check_names([tmp_path / "a/test.jsonl", tmp_path / "a/other.jsonl"])
    with pytest.raises(ValueError, match="a/test.jsonl and .*b/test.jsonl would both be"):
        check_names([tmp_path / "a/test.jsonl", tmp_path / "b/test.jsonl"])
