"""Tags of words, and answers in windows of a context: genuine tiny models, their own loss."""

from typing import Any

import numpy as np
import pytest
import torch

from veneer.core.errors import AdapterError

WORDS = [
    (["anna", "met", "bob"], ["B-PER", "O", "B-PER"]),
    (["the", "new", "york", "film"], ["O", "B-LOC", "I-LOC", "O"]),
]
CONTEXT = "anna saw a good film in york. " + "it was 2 hours long and not bad. " * 4 + "bob saw a bad film in leeds."
QUESTIONS = [
    {"question": "who saw a good film?", "context": CONTEXT, "answers": {"text": ["anna"], "answer_start": [0]}},
    {"question": "where was the bad film?", "context": CONTEXT, "answers": ["leeds"]},
]


def _tagged() -> list[dict[str, Any]]:
    return [{"tokens": words, "ner_tags": tags} for words, tags in WORDS * 3]


def test_words_get_tags_at_their_first_token(encoder, made, own_loss):
    task, _ = made("token-classification", encoder(), _tagged())
    assert task.data.labels == ["B-LOC", "B-PER", "I-LOC", "O"]
    tokens = task.part.examples[0]
    pieces = task.tokenizer.convert_ids_to_tokens(tokens["input_ids"].tolist())
    begins = [piece for piece, tag in zip(pieces, tokens["tag"], strict=True) if tag != -100]
    assert begins == ["a", "m", "b"]
    assert [task.data.labels[tag] for tag in tokens["tag"] if tag >= 0] == WORDS[0][1]
    task.model.double().eval()
    (batch,) = task.batches([0, 1, 2])
    assert batch.units == 3 + 4 + 3
    with torch.no_grad():
        assert task.loss(batch).item() / 10 == pytest.approx(own_loss(task, [0, 1, 2]), rel=1e-9)
    task.model.float()
    figures, said = task.evaluate(whole=True), task.said_of(list(task.held_out.documents))
    right = [
        a == b for own, (_, tags) in zip(said, WORDS * 3, strict=True) for a, b in zip(own["tags"], tags, strict=True)
    ]
    assert figures["accuracy"] == pytest.approx(np.mean(right))
    assert (task.judged_by, list(figures)) == ("f1", ["eval_loss", "precision", "recall", "f1", "accuracy"])


def test_words_that_come_alone_are_words_of_a_text_all_the_same(encoder, made):
    from transformers import RobertaTokenizer

    base = encoder("roberta")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate(letters)}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(base)
    task, _ = made("token-classification", base, _tagged())
    pieces = task.tokenizer.convert_ids_to_tokens(task.part.examples[0]["input_ids"].tolist())
    assert "".join(pieces) == "<s>ĠannaĠmetĠbob</s>"
    assert [pieces[i] for i in np.flatnonzero(task.part.examples[0]["tag"] >= 0)] == ["Ġ"] * 3


def test_words_that_are_cut_off_have_no_tag_and_count(encoder, made):
    task, _ = made("token-classification", encoder(), _tagged(), data__max_length=6)
    (said,) = task.said_of([task.typed("anna bobb york", None)])
    assert len(said["tags"]) == 3
    assert said["probabilities"][1:] == [0.0, 0.0]
    assert said["tags"][1:] == ["O", "O"]


def test_windows_of_a_context_hold_its_answer(encoder, made, own_loss):
    task, _ = made("question-answering", encoder(), QUESTIONS, data__max_length=60, data__stride=16)
    part = task.part
    assert len(part.examples) > 4
    assert task.data.unanswered is False
    held = {0: [], 1: []}
    for i, tokens in enumerate(part.examples):
        first, last = part.examples.table[["first", "last"]][i].item()
        if first:
            text = CONTEXT[tokens["begin"][first] : tokens["end"][last]]
            held[int(part.examples.of[i])].append(text)
        starts = tokens["begin"][tokens["begin"] >= 0]
        assert len(tokens) <= 60
        assert (np.diff(starts) > 0).all()
    assert held == {0: ["anna"], 1: ["leeds"]}
    task.model.double().eval()
    rows = list(range(len(part.examples)))
    task.most = 10**6
    with torch.no_grad():
        (batch,) = task.batches(rows)
        assert task.loss(batch).item() / len(rows) == pytest.approx(own_loss(task, rows), rel=1e-9)


def test_the_best_span_of_all_windows_is_the_answer(encoder, made):
    task, _ = made("question-answering", encoder(), QUESTIONS, data__max_length=60, data__stride=16)
    wanted = CONTEXT.index("leeds")

    def outputs(batch: Any) -> torch.Tensor:
        logits = torch.zeros(len(batch.places), 2, batch.inputs["input_ids"].shape[1])
        for i, ids in enumerate(batch.inputs["input_ids"].tolist()):
            pieces = task.tokenizer.convert_ids_to_tokens(ids)
            for j in range(len(pieces) - 4):
                if pieces[j : j + 5] == ["l", "##e", "##e", "##d", "##s"]:
                    logits[i, 0, j] = logits[i, 1, j + 4] = 9.0
        return logits

    task.outputs = outputs
    said = task.said_of(list(task.held_out.documents))
    assert [own["answer"] for own in said] == ["leeds", "leeds"]
    assert said[0]["start"] == wanted
    assert said[0]["probability"] > 0.9
    assert task.evaluate(whole=True)["exact_match"] == 0.5
    task.data.longest_answer = 4
    assert task.said_of(list(task.held_out.documents))[0]["answer"] != "leeds"


def test_a_question_without_an_answer(encoder, made):
    rows = [*QUESTIONS, {"question": "who?", "context": "nobody.", "answers": {"text": [], "answer_start": []}}]
    task, _ = made("question-answering", encoder(), rows, data__max_length=60, data__stride=16)
    assert task.data.unanswered is True
    task.outputs = lambda batch: torch.nn.functional.one_hot(
        torch.zeros(len(batch.places), 2, dtype=torch.long), batch.inputs["input_ids"].shape[1]
    ).float()
    assert [own["answer"] for own in task.said_of(list(task.held_out.documents))] == ["", "", ""]
    assert task.evaluate(whole=True)["exact_match"] == pytest.approx(1 / 3)
    rows[0]["answers"] = {"text": ["bob"], "answer_start": [3]}
    with pytest.raises(AdapterError, match=r"line 1: the answer 'bob' is not in the context at character 3"):
        made("question-answering", encoder(), rows)
