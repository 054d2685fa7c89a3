"""What does retrieval give a real open model? Held-out questions asked with no, a random, the retrieved and the right passage.

python -m benchmarks.open_retrieval --project FOLDER --models artifacts/models/smollm2 FOLDER/artifacts/models/sft

FOLDER is where make repro has run; an open model becomes a bundle by `python -m stages import`. It takes minutes, so --keep remembers every
reply, and --minutes stops it: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import nn

from benchmarks import open_model, table
from benchmarks.retrieval import WordsByChance, index_of
from llm_from_scratch import bundle, config, progress, tokenizer
from llm_from_scratch.data.chat import Message
from llm_from_scratch.data.documents import Document, read_documents, with_splits
from llm_from_scratch.data.questions import Question, questions
from llm_from_scratch.evaluation import EvaluateParams
from llm_from_scratch.evaluation.multiple_choice import bootstrap_interval, credit
from llm_from_scratch.evaluation.retrieval import CONDITIONS, TOGETHER, Reply, choice_ids, graded, passages_for, prompts_with, replies
from llm_from_scratch.inference.decoding import context_of
from llm_from_scratch.inference.quantize import load_bundle
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.retrieval.passages import Passage
from llm_from_scratch.retrieval.rag import NUMBERED, TRAINED, Form, form_of
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.imported import ImportedTokenizer
from stages.__main__ import read_yaml

ROOT = Path(__file__).parent.parent
TRIED, BARE = ("none", "oracle"), "bare question"
NOTES = [
    "Each question asks what an entry of the encyclopedia is; the choices are its description and three of other entries of its field. "
    "`accuracy` counts the choice with the highest mean log probability a token, as the assistant's whole answer in the model's own chat "
    "template. `F1` and `exact match` are of the text that it writes greedily.",
    "`lift` is in points above the same prompt with no passage, its interval that of the pairs (bootstrap, 95%). `by what it changes` "
    "counts the choice whose likelihood the passage raised most.",
    f"`{BARE}` is the question and nothing else, as a chat without documents puts it to the model, and `above it` is in points above that: "
    "what retrieval as /ask has it gives in all, passages, instructions and worked examples together.",
    "`random` is the passage of another question, which shows what length and style do; `oracle` the right one, which is the most that "
    "search could give; `retrieved` what our index finds for the question, among it the passages of these entries.",
    "How an imported model's prompt is put was tried on entries of the training split, which none of the other rows ask about; the "
    "form with the highest accuracy there, with the right passage, asks the rest. `numbered` is the form of /ask: instructions, two worked "
    "examples as turns that went before, then the numbered sources and the question; with no passage the examples have none either. `told` "
    "is the same without the examples. `system` is the passage alone as the system message, `asked` the passage and then the question in "
    "the user's.",
]


class OutOfTime(Exception):
    """The minutes are over; what was replied is kept."""


@dataclass(frozen=True)
class Asked:
    """A model, and the name and form of its prompts."""

    name: str
    digest: str
    model: nn.Module
    words: Tokenizer
    form: str

    def replies_to(self, condition: str, task: Task, journal: Journal) -> list[Reply]:
        form, choices = FORMS[self.form], choice_ids(task.asked, self.words)
        longest = max(len(ids) for offered in choices for ids in offered)
        room = context_of(self.model) - max(task.params.answer_tokens, longest)
        passages = passages_for(condition, task.asked, task.index, task.params, form)
        prompts = prompts_with(passages, task.asked, self.words, room, form)
        return journal.completed(self, prompts, choices, task.params.answer_tokens, f"{self.name}, {self.form}, {condition}")


@dataclass(frozen=True)
class Task:
    """Questions, and where to search for what to read."""

    on: str
    asked: list[Question]
    index: Index
    params: EvaluateParams


class Journal:
    """What was replied, a line of JSON each, under the digest of all that it depends on; until the minutes are over, the rest is asked."""

    def __init__(self, path: Path | None, minutes: float) -> None:
        self.path, self.until = path, perf_counter() + 60 * minutes
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.known = {key: Reply(tuple(scores), text) for key, scores, text in map(json.loads, lines)}

    def completed(self, by: Asked, prompts: list[list[int]], choices: list[list[list[int]]], answer_tokens: int, what: str) -> list[Reply]:
        """The reply to each prompt, asked now where it is not known. Raises OutOfTime."""
        pairs = zip(prompts, choices, strict=True)
        keys = [sha256(json.dumps([by.digest, prompt, offered, answer_tokens]).encode()).hexdigest()[:16] for prompt, offered in pairs]
        rest = sorted((place for place, key in enumerate(keys) if key not in self.known), key=lambda place: len(prompts[place]))
        with progress.bar(total=len(keys), initial=len(keys) - len(rest), desc=what, unit=" questions") as bar:
            for some in (rest[start : start + TOGETHER] for start in range(0, len(rest), TOGETHER)):
                if perf_counter() > self.until:
                    raise OutOfTime(f"{what}: {bar.n} of {len(keys)} questions are done")
                made = replies(by.model, by.words, [prompts[place] for place in some], [choices[place] for place in some], answer_tokens)
                self._add([keys[place] for place in some], made)
                bar.update(len(some))
        return [self.known[key] for key in keys]

    def _add(self, keys: Sequence[str], made: Sequence[Reply]) -> None:
        self.known |= zip(keys, made, strict=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, *asdict(reply).values()]) + "\n" for key, reply in zip(keys, made, strict=True))


def asked_messages(question: str, sources: Sequence[str]) -> list[Message]:
    """All in the user's message, and no system message but the template's own."""
    read = "".join(f"{source}\n\n" for source in sources)
    return [{"role": "user", "content": f"{read}{question} Answer in a few words."}]


def told_messages(question: str, sources: Sequence[str]) -> list[Message]:
    """The instructions and the question, and no examples between them."""
    instructions, *_, asked = NUMBERED.messages(question, sources)
    return [instructions, asked]


FORMS = {
    "numbered": NUMBERED,
    "told": Form(told_messages, NUMBERED.told, NUMBERED.shared_characters),
    "system": TRAINED,
    "asked": Form(asked_messages, TRAINED.told, TRAINED.shared_characters),
}


def main() -> None:
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as work:
        folders = [open_model.toy(Path(work) / "toy")] if arguments.quick else arguments.models
        tried, held_out = toy() if arguments.quick else real(arguments)
        journal = Journal(arguments.keep, arguments.minutes)
        try:
            rows = [row for folder in folders for row in rows_of(folder, tried, held_out, journal, arguments.quick)]
        except OutOfTime as over:
            raise SystemExit(f"benchmarks.open_retrieval: {over}; the same command goes on") from None
    settings = {
        "seed": held_out.params.seed,
        "answer_tokens": held_out.params.answer_tokens,
        "passages": held_out.params.passages,
        "models": {row["model"]: row.pop("digest")[:16] for row in rows},
    }
    table.write(arguments.out, "open_retrieval", "A real open model, and ours, with and without retrieval", rows, settings, NOTES)


def parser() -> argparse.ArgumentParser:
    made = table.parser(__doc__ or "")
    made.add_argument("--project", type=Path, default=Path(), metavar="FOLDER", help="where make repro has run")
    models = [Path("artifacts/models/smollm2"), Path("artifacts/models/sft")]
    made.add_argument("--models", type=Path, nargs="+", default=models, metavar="FOLDER", help="bundles to ask")
    made.add_argument("--questions", type=int, default=500, help="of the held-out entries")
    made.add_argument("--tried", type=int, default=96, help="of other entries, to try forms of prompts on")
    made.add_argument("--keep", type=Path, metavar="FILE", help="every reply, so that a run that was stopped goes on")
    made.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    return made


def real(arguments: Any) -> tuple[Task, Task]:
    """One line where an input is not there."""
    artifacts = arguments.project / "artifacts"
    try:
        params = config.parse(read_yaml(arguments.project / "params.yaml"), "params.yaml")
        index = Index.open(artifacts / "index", Embedder.open(artifacts / "raw" / params.index.embedder))
        corpus = artifacts / "raw" / params.index.documents
        train, held_out = (list(read_documents(corpus, split)) for split in ("train", "validation"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.open_retrieval: {error}") from None
    evaluate = params.evaluate.model_copy(update={"questions": arguments.questions})
    return of(train, arguments.tried, index, evaluate, "training"), of(held_out, evaluate.questions, index, evaluate, "held-out")


def of(documents: Sequence[Document], count: int, index: Index, params: EvaluateParams, kind: str) -> Task:
    asked = questions(documents, count, params.choices, params.seed)
    return Task(f"{len(asked)} {kind}", asked, index, params)


def toy() -> tuple[Task, Task]:
    """Entries of no meaning, and vectors made of words by chance."""
    entries = [
        Document(f"e{n}", f"Thing {n}", f"Thing {n} is seen in valley {n}.", description=f"Kind {n}", topic="Arts") for n in range(40)
    ]
    embedder: Any = WordsByChance()
    passages = [Passage(f"{entry.id}#0", entry.id, entry.title, entry.text) for entry in entries]
    index = index_of(passages, embedder.embed([passage.searched for passage in passages]), embedder)
    shipped = config.parse(read_yaml(ROOT / "params.yaml"), "params.yaml").evaluate
    params = shipped.model_copy(update={"questions": 8, "answer_tokens": 2})
    sides = with_splits(entries, 0.5)
    train, held_out = ([entry for entry in sides if entry.split == split] for split in ("train", "validation"))
    return of(train, 4, index, params, "training"), of(held_out, 8, index, params, "held-out")


def rows_of(folder: Path, tried: Task, held_out: Task, journal: Journal, choose: bool) -> Iterable[dict[str, Any]]:
    """Where the model is imported, or to `choose` is asked for, each form of its prompts; then the four conditions in the best of them."""
    try:
        digest, model, words = bundle.verify(folder).digest, load_bundle(folder), tokenizer.load(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.open_retrieval: {error}") from None
    assert isinstance(model, nn.Module)
    served = next(name for name, form in FORMS.items() if form is form_of(words))
    forms = list(FORMS) if choose or isinstance(words, ImportedTokenizer) else [served]
    best: dict[str, float] = {}
    for name in forms if len(forms) > 1 else ():
        rows = list(conditions(Asked(folder.name, digest, model, words, name), tried, TRIED, journal))
        best[name] = rows[-1]["accuracy"]
        yield from rows
    form = max(best, key=lambda name: best[name]) if best else served
    yield from conditions(Asked(folder.name, digest, model, words, form), held_out, (BARE, *CONDITIONS), journal)


def conditions(asked: Asked, task: Task, wanted: Sequence[str], journal: Journal) -> Iterable[dict[str, Any]]:
    """A row for each condition, among them `none`."""
    bare = replace(asked, form="system")  # which without a passage is the question alone
    found = {
        condition: bare.replies_to("none", task, journal) if condition == BARE else asked.replies_to(condition, task, journal)
        for condition in wanted
    }
    right = [question.choices.index(question.answer) for question in task.asked]
    credits = {
        name: np.array([credit(reply.scores, place) for reply, place in zip(made, right, strict=True)]) for name, made in found.items()
    }
    for condition, made in found.items():
        means = graded(task.asked, made, task.params.seed, found["none"])
        lift, its_ends = gain(credits, condition, "none", task.params.seed)
        above, the_ends = gain(credits, condition, BARE, task.params.seed)
        yield {
            "model": asked.name,
            "asked": task.on,
            "prompt": "" if condition == BARE else asked.form,
            "passage": condition,
            "accuracy": means["accuracy"],
            "95%": f"{means['accuracy_low']:.3f} … {means['accuracy_high']:.3f}",
            "lift": "" if condition == BARE else lift,
            "95% of the lift": "" if condition == BARE else its_ends,
            "above it": above,
            "95% of that": the_ends,
            "by what it changes": means["accuracy_pmi"],
            "F1": means["f1"],
            "exact match": means["exact_match"],
            "digest": asked.digest,
        }


def gain(credits: Mapping[str, np.ndarray], condition: str, base: str, seed: int) -> tuple[float | str, str]:
    """Points above `base`, and the ends of their 95% interval; nothing where it was not asked, and no interval for what is `base`."""
    if base not in credits:
        return "", ""
    gained = credits[condition] - credits[base]
    low, high = (100 * end for end in bootstrap_interval(gained, seed))
    return 100 * float(gained.mean()), f"{low:.1f} … {high:.1f}" if condition != base else ""


if __name__ == "__main__":
    main()
