"""Chat records and questions: real answers, one prompt form, nothing held out ever shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from llm_from_scratch import bundle
from llm_from_scratch.config import Params
from llm_from_scratch.data.chat import (
    ChatRecord,
    Message,
    RecordError,
    gather_records,
    passage,
    question_about,
    question_messages,
    read_records,
    records,
    split_records,
    write_records,
)
from llm_from_scratch.data.corpora import DownloadParams, Source
from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.questions import questions
from llm_from_scratch.evaluation.splits import conversations
from stages import download
from stages.__main__ import read_yaml

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


def test_a_separator_of_lines_inside_a_text_ends_no_record(tmp_path: Path):
    """str.splitlines also cuts at U+2028 and U+0085, which JSON does not escape: half a record was "not JSON"."""
    made = records([Document("hat", "Hat", "A hat.\u2028It is\x85worn.", "train", "Head\u2029covering", "Arts")], seed=1)
    write_records(tmp_path / "records.jsonl", made)
    assert read_records(tmp_path / "records.jsonl") == made


def read_rows(tmp_path: Path, *rows: object) -> list[ChatRecord]:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_records(tmp_path / "rows.jsonl")


TOLD = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TOLD},
        {"messages": TOLD, "source": "mine", "turns": 2},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 2?", "response": "4", "score": 5},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4", "text": "the three of them in one"},
        {"instruction": "2 + 2?", "input": None, "output": "4"},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_conversation_is_read_from_the_shapes_that_people_have(tmp_path: Path, row: object):
    [found] = read_rows(tmp_path, row)
    assert found["messages"] == TOLD
    assert found["kind"] == "chat"


def test_what_an_instruction_is_to_work_on_stands_below_it(tmp_path: Path):
    [found] = read_rows(tmp_path, {"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert found["messages"] == [{"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"}]


def test_a_record_without_an_id_is_named_by_what_is_said_in_it_whatever_its_shape_and_place(tmp_path: Path):
    first, again, other, named = read_rows(
        tmp_path,
        {"messages": TOLD},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 3?", "completion": "5"},
        {"id": "mine", "prompt": "2 + 2?", "completion": "4"},
    )
    assert first["id"] == again["id"] != other["id"]
    assert len(first["id"]) == 16
    assert named["id"] == "mine"


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "Hi", "completion": "Ho"}\r\n' * 2 + b"\r\n")
    assert [record["messages"][1]["content"] for record in read_records(tmp_path / "a.jsonl")] == ["Ho", "Ho"]


def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "Hi", "completion": "\xff"}')
    with pytest.raises(RecordError, match=r"a.jsonl: byte 32 is not UTF-8; save"):
        read_records(tmp_path / "a.jsonl")


def test_a_path_may_be_one_file_or_a_folder_of_them(tmp_path: Path):
    (tmp_path / "more").mkdir()
    (tmp_path / "b.jsonl").write_text('{"prompt": "1", "completion": "one"}\n')
    (tmp_path / "more" / "a.jsonl").write_text('{"prompt": "2", "completion": "two"}\n')
    (tmp_path / "notes.txt").write_text("no record")
    assert [record["messages"][1]["content"] for record in gather_records(tmp_path)] == ["one", "two"]
    assert [record["messages"][1]["content"] for record in gather_records(tmp_path / "b.jsonl")] == ["one"]
    (tmp_path / "more" / "a.jsonl").write_text('{"prompt": "2"}\n')
    with pytest.raises(RecordError, match=r"more/a.jsonl: 1 of 1 records are bad: line 1: found prompt, wanted messages, instruction and"):
        gather_records(tmp_path)
    with pytest.raises(RecordError, match=r"nothing: found no .jsonl file, wanted one of chat records or a folder of them"):
        gather_records(tmp_path / "nothing")


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"id": "a", "kind": "k", "messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": ', "line 2: not JSON"),
        ('["id"]', "line 2: found list, wanted an object of messages, instruction and output, prompt and completion, or prompt"),
        ("{}", "line 2: found nothing, wanted messages"),
        ('{"id": "a", "kind": "k"}', "line 2: found id, kind, wanted messages"),
        ('{"id": 3, "kind": "k", "messages": []}', "line 2: id: found 3, wanted some text"),
        ('{"prompt": "Why?", "completion": " "}', "line 2: completion: found ' ', wanted some text"),
        ('{"prompt": "Why?", "completion": null, "response": "So."}', "line 2: completion: found None, wanted some text"),
        ('{"prompt": [{"role": "user"}], "completion": "So."}', "line 2: prompt: found .*, wanted some text"),
        ('{"instruction": "Add", "input": 3, "output": "4"}', "line 2: input: found 3, wanted some text"),
        ('{"instruction": "Add", "input": "2"}', "line 2: found input, instruction, wanted messages"),
        ('{"messages": null, "prompt": "Why?", "completion": "So."}', "line 2: messages: wanted a list"),
        (chat(), "line 2: messages: wanted a list that ends in the assistant's answer"),
        ('{"id": "a", "kind": "k", "messages": ["hi"]}', r"line 2: messages\[0\]: wanted an object of role and content"),
        (chat(("bot", "hi")), r"line 2: messages\[0\].role: found 'bot', wanted system, user, assistant"),
        (chat(("user", " ")), r"line 2: messages\[0\].content: found ' ', wanted some text"),
        (chat(("user", "hi")), "line 2: messages: found the turns user; wanted"),
        (chat(("system", "hi")), "line 2: messages: found the turns system; wanted"),
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


def test_a_file_of_chat_records_is_a_source_and_one_bad_line_leaves_no_corpus(tmp_path: Path):
    tree: Any = read_yaml(Path(__file__).parent.parent / "params.yaml")
    told = {"kind": "records", "path": "mine.jsonl", "sha256": "", "licence": "mine", "language": "en", "validation": 0.5}
    params = Params.model_construct(
        sources={"mine": TypeAdapter(Source).validate_python(told)}, download=DownloadParams.model_validate(tree["download"])
    )
    rows = [{"prompt": "2 + 2?", "completion": "4"}, {"instruction": "Add.", "input": "2 and 3", "output": "5"}, {"messages": TOLD}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    download.run(params, "mine", tmp_path)
    corpus = tmp_path / "artifacts/raw/mine"
    assert bundle.verify(corpus, "corpus").facts["documents"] == 3
    learnable, tested, asked = conversations(corpus, 0.5, seed=1)
    assert sorted(record["messages"][-1]["content"] for record in [*learnable, *tested]) == ["4", "4", "5"]
    assert len(asked) == len(tested) > 0

    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "2 + 2?"}])), encoding="utf-8")
    (tmp_path / "artifacts/raw").rename(tmp_path / "artifacts/older")
    with pytest.raises(RecordError, match=r"mine.jsonl: 1 of 4 records are bad: line 4: found prompt, wanted messages"):
        download.run(params, "mine", tmp_path)
    assert not corpus.exists()


def test_records_of_a_file_are_held_out_by_their_question_so_more_records_move_none():
    made = records(entries(400), seed=1)
    train, held_out = split_records(made, 0.1)
    assert len(train) + len(held_out) == len(made)
    assert 0.05 < len(held_out) / len(made) < 0.15
    fewer, _ = split_records(made[:600], 0.1)
    assert fewer == [record for record in train if record in made[:600]]


def test_a_question_that_stands_in_several_records_is_held_out_with_all_of_them_or_not_at_all():
    """They used to be split by their ids, so that a model was asked what it had been told."""
    made: list[ChatRecord] = [
        {"id": f"{number}-{answer}", "kind": "chat", "messages": [*question_messages(f"Who is {number}?", []), said(answer)]}
        for number in range(40)
        for answer in ("me", "you", "nobody")
    ]
    train, held_out = split_records(made, 0.3)
    told, asked = ({record["messages"][0]["content"] for record in side} for side in (train, held_out))
    assert not told & asked
    assert len(train) == 3 * len(told)
    assert 5 < len(asked) < 20


def said(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def test_of_two_questions_one_is_held_out_where_there_is_a_share_and_none_without():
    made = [*records([HAT], seed=1), *records([BOSE], seed=1)]
    assert all(split_records(made, 0.01))
    assert split_records(made, 0.0) == (made, [])


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
