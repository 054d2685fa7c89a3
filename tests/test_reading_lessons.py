"""Learning to read: lessons that cannot be guessed, their way to the batches of a rung, and a model that copies from the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data.documents import Document, write_documents
from llm_from_scratch.data.lessons import GO_ON, WORDS, lessons
from llm_from_scratch.data.rendered import read_conversations, write_conversations
from llm_from_scratch.model.llama import Llama, LlamaParams, start_copying
from llm_from_scratch.model.registry import build
from llm_from_scratch.tokenizer.base import END_OF_TURN
from llm_from_scratch.training.batches import conversations, in_turn, shifted
from llm_from_scratch.training.loop import Batch
from llm_from_scratch.training.memory import UNSCORED
from stages import tokenize
from tests.test_tokenizing import params

LLAMA = LlamaParams(
    architecture="llama", context=64, width=64, layers=2, heads=4, kv_heads=2, hidden=96, rope_theta=10000.0, qk_norm=False, copying=1.0
)


def entries(count: int = 30) -> list[Document]:
    return [
        Document(
            id=f"e{number}",
            title=f"Thing {number}",
            text=f"Thing number {number} is a large wooden thing from the northern province of Somewhere. "
            f"People have carried thing {number} through seven valleys, twelve forests and a desert since the year {1000 + number}.",
            description=f"Wooden thing of kind {number % 7}",
        )
        for number in range(count)
    ]


def test_a_lesson_asks_what_its_passage_answers():
    for lesson in lessons(entries(), seed=1, passage_characters=400):
        system, *turns = lesson["messages"]
        read = system["content"]
        asked = {question["content"]: answer["content"] for question, answer in zip(turns[::2], turns[1::2], strict=True)}
        assert len(asked) == 3
        for question, answer in asked.items():
            if question == WORDS:
                assert all(word in read for word in answer.split())
            elif question.startswith(GO_ON.format("")):
                assert f"{question.removeprefix(GO_ON.format(''))} {answer}" in read
            else:
                assert answer.startswith("Wooden thing of kind")


def test_some_lessons_have_a_strange_passage_beside_theirs_and_all_are_the_same_each_time():
    made = lessons(entries(200), seed=1, passage_characters=400)
    doubled = sum("\n\n" in lesson["messages"][0]["content"] for lesson in made) / len(made)
    assert 0.2 < doubled < 0.4
    assert made == lessons(entries(200), seed=1, passage_characters=400) != lessons(entries(200), seed=2, passage_characters=400)


def test_entries_without_a_description_or_with_hardly_a_text_give_what_they_can():
    assert lessons([Document("a", "A", "Some text.")], 1, 400) == []
    (short,) = lessons([Document("a", "A", "A thing.", description="Thing")], 1, 400)
    assert [message["role"] for message in short["messages"]] == ["system", "user", "assistant"]


def test_conversations_come_back_from_disk_as_they_were(tmp_path: Path):
    rows = [([1, 2, 3], [False, True, True]), ([4, 5], [False, True])]
    assert write_conversations(tmp_path, rows) == 2
    assert [(ids.tolist(), learned.tolist()) for ids, learned in read_conversations(tmp_path)] == rows
    with pytest.raises(ValueError, match="none of its training documents has a description; set lessons to false"):
        write_conversations(tmp_path, [])


def test_the_stage_writes_lessons_of_training_entries_alone(tmp_path: Path):
    held_out = Document("held", "Secret", "Secret text that nobody may learn.", "validation", "Secret description")
    with bundle.writing(tmp_path / "artifacts/raw/tiny") as folder:
        write_documents(folder / "documents.jsonl", [*entries(), held_out])
        bundle.seal(folder, "corpus", "download@tiny")
    tokenize.run(params(entry={"kind": "bpe", "vocab_size": 300, "lessons": True}), "entry", tmp_path)
    folder = tmp_path / "artifacts/tokens/entry"
    words, found = tokenizer.load(folder), read_conversations(folder)

    assert len(found) == bundle.verify(folder, "tokens").facts["lessons"] == len(entries())
    said = [words.decode(ids[learned].tolist()) for ids, learned in found]
    assert all("Wooden thing of kind" in answers for answers in said)
    assert "Secret" not in "".join(words.decode(ids.tolist()) for ids, _ in found)
    assert all(int(ids[-1]) == words.special[END_OF_TURN] and bool(learned[-1]) for ids, learned in found)
    assert json.loads((tmp_path / "artifacts/logs/tokenize/entry/metrics.json").read_text())["vocab_size"] == 300


def test_only_what_is_to_be_said_counts_and_rows_are_filled_up_unscored():
    pairs = [
        shifted(torch.tensor([1, 2, 3, 4]), torch.tensor([False, False, True, True])),
        shifted(torch.tensor([5, 6]), torch.tensor([False, True])),
    ]
    inputs, targets = conversations(pairs, batch=2, pad=9, seed=1)(0)
    rows = sorted(zip(inputs.tolist(), targets.tolist(), strict=True))
    assert rows == [([1, 2, 3], [UNSCORED, 3, 4]), ([5, 9, 9], [6, UNSCORED, UNSCORED])]


@pytest.mark.parametrize(
    ("first", "share", "wanted"),
    [
        (0, 0.5, "t0 l0 t1 l1 t2 l2"),
        (2, 0.5, "l0 l1 t0 l2 t1 l3"),
        (0, 0.0, "t0 t1 t2 t3 t4 t5"),
        (1, 1.0, "l0 l1 l2 l3 l4 l5"),
        (0, 0.4, "t0 t1 l0 t2 l1 t3"),
    ],
)
def test_text_and_lessons_take_turns_and_neither_misses_a_step(first: int, share: float, wanted: str):
    def named(name: str):
        def at(step: int) -> Batch:
            return (f"{name}{step}",)  # type: ignore[return-value]

        return at

    at = in_turn(named("t"), named("l"), first, share)
    assert " ".join(str(at(step)[0]) for step in range(6)) == wanted


def test_a_copying_start_makes_what_was_read_likelier_than_what_was_not():
    """Before any training: with the start as it was, every token is about as likely."""

    def lead(copying: float) -> float:
        """By how many deviations of all logits, over many models."""
        leads = []
        for seed in range(20):
            torch.manual_seed(seed)
            model = build(LLAMA.model_copy(update={"copying": copying}), 200).eval()
            with torch.no_grad():
                logits = model(torch.arange(20, 40)[None])[0, -1]
            leads.append((logits[20:39].mean() - logits[40:].mean()) / logits.std())
        return float(torch.stack(leads).mean())

    assert abs(lead(0.0)) < 0.1
    assert lead(1.0) > 0.3


def test_a_copying_start_adds_the_mean_of_what_was_read_where_queries_ask_for_nothing():
    torch.manual_seed(0)
    model = build(LLAMA.model_copy(update={"copying": 0.0, "kv_heads": 4}), 200)
    assert isinstance(model, Llama)
    start_copying(model, 0.5)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        x = torch.randn(1, 6, 64)
        cos, sin = model.turns(0, 6)
        added = attention(x, cos, sin, None, 0)
    means = x.cumsum(1) / torch.arange(1, 7)[None, :, None]
    torch.testing.assert_close(added, 0.5 * means)  # as many values as the width: nothing is lost
