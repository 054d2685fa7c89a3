"""Chat records and questions: real answers, one prompt form, nothing held out ever shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_from_scratch.data.chat import (
    ChatRecord,
    RecordError,
    passage,
    question_about,
    question_messages,
    read_records,
    records,
    split_records,
    write_records,
)
from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.questions import questions

HAT = Document("hat", "Hat", "A hat is a head covering. It is worn in the sun.", "train", "Shaped head covering", "Everyday life")
BOSE = Document("bose", "Satyendra Nath Bose", "Bose was a physicist.", "train", "Indian physicist", "People")


def entries(count: int = 40) -> list[Document]:
    """Entries of two topics, ten descriptions each, so that some descriptions stand twice."""
    return [
        Document(
            id=f"e{number}",
            title=f"Thing {number}",
            text=f"Thing {number} is the thing of number {number}. It is unlike thing {number + 1}.",
            split="validation",
            description=f"Thing of kind {number % 20}",
            topic="Arts" if number % 2 else "Geography",
        )
        for number in range(count)
    ]


def roles(record: ChatRecord) -> list[str]:
    return [message["role"] for message in record["messages"]]


def test_an_entry_gives_a_description_a_field_and_a_reading():
    describe, topic, read = records([HAT], seed=1)
    assert [record["kind"] for record in (describe, topic, read)] == ["describe", "topic", "read"]
    assert roles(describe) == roles(topic) == ["user", "assistant"]
    assert roles(read) == ["system", "user", "assistant"]
    assert read["messages"][0]["content"] == HAT.text
    assert describe["messages"][-1]["content"] == read["messages"][-1]["content"] == "Shaped head covering"
    assert topic["messages"][-1]["content"] == "Everyday life"


def test_records_and_questions_put_passages_before_a_question_in_the_same_form():
    *asked, _ = next(record for record in records([HAT], seed=1) if record["kind"] == "read")["messages"]
    assert asked == question_messages(asked[1]["content"], [HAT.text])
    assert question_messages("Why?", []) == [{"role": "user", "content": "Why?"}]
    assert question_messages("Why?", ["One.", "Two."])[0] == {"role": "system", "content": "One.\n\nTwo."}


def test_a_person_is_asked_for_with_who():
    assert question_about(BOSE) == "Who is Satyendra Nath Bose?"
    assert question_about(HAT) == "What is Hat?"


def test_an_entry_without_a_description_or_a_field_is_not_asked_for_it():
    plain = Document("p", "Plain", "Plain is plain.", "train", "", "Arts")
    loose = Document("l", "Loose", "Loose is loose.", "train", "Not tight", "Uncategorized")
    assert [record["id"] for record in records([plain, loose], seed=1)] == ["l:describe", "l:read"]


def test_half_of_the_readings_have_a_distractor_on_either_side_and_are_no_longer_for_it():
    documents = entries(400)
    reads = [record["messages"][0]["content"].split("\n\n") for record in records(documents, seed=1) if record["kind"] == "read"]
    pairs = [(place, texts) for place, texts in enumerate(reads) if len(texts) == 2]
    right_first = [texts[0].startswith(f"Thing {place} ") for place, texts in pairs]
    assert 160 < len(pairs) < 240
    assert 0.3 < sum(right_first) / len(pairs) < 0.7
    for place, texts in pairs:
        assert sum(text.startswith(f"Thing {place} ") for text in texts) == 1


def test_records_depend_on_the_seed_and_on_nothing_else():
    documents = entries()
    assert records(documents, seed=1) == records(documents, seed=1)
    assert records(documents, seed=1) != records(documents, seed=2)
    assert records(documents, seed=1)[:2] == records(documents[:20], seed=1)[:2]


def test_a_passage_ends_with_a_sentence_or_at_least_with_a_word():
    text = 'One two. "Three four." Five six seven.'
    assert passage(text, 100) == text
    assert passage(text, 30) == 'One two. "Three four."'
    assert passage(text, 8) == "One two."
    assert passage(text, 7) == "One"
    assert passage("3.5 is a number. Yes.", 18) == "3.5 is a number."


def test_records_survive_a_file(tmp_path: Path):
    made = records(entries(), seed=1)
    write_records(tmp_path / "records.jsonl", made)
    assert read_records(tmp_path / "records.jsonl") == made


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"id": "a", "kind": "k", "messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": ', "line 2: not JSON"),
        ('["id"]', "line 2: found list, wanted an object of id, kind and messages"),
        ('{"id": "a", "kind": "k"}', "line 2: found id, kind, wanted"),
        ('{"id": 3, "kind": "k", "messages": []}', "line 2: id: found 3, wanted some text"),
        (chat(), "line 2: messages: wanted a list that ends in the assistant's answer"),
        ('{"id": "a", "kind": "k", "messages": ["hi"]}', r"line 2: messages\[0\]: wanted an object of role and content"),
        (chat(("bot", "hi")), r"line 2: messages\[0\].role: found 'bot', wanted system, user, assistant"),
        (chat(("user", " ")), r"line 2: messages\[0\].content: found ' ', wanted some text"),
        (chat(("user", "hi")), "line 2: messages: found the turns user; wanted"),
        (chat(("user", "hi"), ("system", "no"), ("assistant", "yes")), "line 2: messages: found the turns user, system, assistant"),
    ],
)
def test_a_bad_record_is_named_by_its_line_and_no_record_is_used(tmp_path: Path, line: str, complaint: str):
    good = json.dumps(records([HAT], seed=1)[0])
    path = tmp_path / "records.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RecordError, match=complaint) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    assert "1 of 3 records are bad" in str(caught.value)


def test_all_bad_records_are_counted_and_the_first_five_shown(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text("nonsense\n" * 7)
    with pytest.raises(RecordError, match=r"7 of 7 records are bad: line 1.*line 5: [^;]*; and 2 more"):
        read_records(path)
    path.write_text("\n")
    with pytest.raises(RecordError, match="found no records"):
        read_records(path)


def test_records_of_a_file_are_held_out_by_their_id_so_more_records_move_none():
    made = records(entries(400), seed=1)
    train, held_out = split_records(made, 0.1)
    assert len(train) + len(held_out) == len(made)
    assert 0.05 < len(held_out) / len(made) < 0.15
    fewer, _ = split_records(made[:600], 0.1)
    assert fewer == [record for record in train if record in made[:600]]


def test_the_wrong_choices_are_other_descriptions_of_the_same_topic():
    documents = entries()
    described = {document.id: document for document in documents}
    topics_of = {document.description: document.topic for document in documents}
    asked = questions(documents, count=30, choices=4, seed=1)
    assert len(asked) == 30
    for question in asked:
        assert question.answer == described[question.document].description
        assert question.passage == described[question.document].text
        assert len(set(question.choices)) == 4
        assert question.choices.count(question.answer) == 1
        assert {topics_of[choice] for choice in question.choices} == {question.topic}


def test_the_right_choice_is_in_no_particular_place():
    places = [question.choices.index(question.answer) for question in questions(entries(400), count=400, choices=4, seed=1)]
    assert all(70 < places.count(place) < 130 for place in range(4))


def test_questions_depend_on_the_seed_and_on_nothing_else():
    documents = entries()
    assert questions(documents, 10, 4, seed=1) == questions(documents, 10, 4, seed=1)
    assert questions(documents, 10, 4, seed=1) == questions(documents, 40, 4, seed=1)[:10]
    assert questions(documents, 10, 4, seed=1) != questions(documents, 10, 4, seed=2)


def test_a_topic_with_too_few_descriptions_is_not_asked_about():
    lonely = Document("lonely", "Lonely", "Lonely is alone.", "validation", "Without company", "Philosophy")
    assert all(question.document != "lonely" for question in questions([*entries(), lonely], 100, 4, seed=1))
    with pytest.raises(ValueError, match="found 1 of 1 documents with a description, wanted 4 different ones in a topic"):
        questions([lonely], 10, 4, seed=1)
