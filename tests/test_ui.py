"""The page at /ui, used as a reader uses it: headless Chromium against a served app with a tiny model, nothing beyond this machine."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Error, Locator, Page, expect, sync_playwright

from llm_from_scratch.evaluation.heatmaps import attention_of
from llm_from_scratch.inference.engine import Batching, Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.rag import answer
from llm_from_scratch.serving import reloading, ui, ui_html, ui_work
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.lane import Check
from llm_from_scratch.serving.responder import Responder
from pipelines.screenshots import screenshots
from tests.tiny import SENTENCES, tiny_embedder, tiny_index, tiny_limits, tiny_model

LIMITS = tiny_limits(prefill_chunk=32, maximum_prompt_tokens=100, maximum_choices=2, maximum_body_bytes=65536, maximum_passages=4)
KEY = "sk-123"
GREEDY = Sampling(temperature=0.0, max_tokens=8)
HOSTILE = "<img src=x onerror='window.hacked = 1'> ${6 * 7} {{value}}"


@dataclass(frozen=True)
class Served:
    """A page, and the model behind it."""

    address: str
    responder: Responder


@pytest.fixture(scope="module")
def responder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Responder]:
    folder = tmp_path_factory.mktemp("bundles")
    embedder = Embedder.open(tiny_embedder(folder / "embedder"))
    index = tiny_index(folder / "index", embedder, [*SENTENCES, f"A hacker writes {HOSTILE} into documents."])
    rungs = {name: Engine.open(tiny_model(folder / name, seed)) for seed, name in enumerate(("bigram", "gpt"), 1)}
    engine = Engine.open(tiny_model(folder / "model"), batching=Batching(slots=LIMITS.slots, prefill_chunk=LIMITS.prefill_chunk))
    made = Responder(engine, index, LIMITS, "fp_test", rungs)
    yield made
    made.close()


@contextmanager
def serving(responder: Responder, key: str = "") -> Iterator[Served]:
    """The app with its page on a free port, in a thread of its own."""
    app = create_app(responder, key)
    app.router.lifespan_context = type(app)().router.lifespan_context  # the fixture closes the responder, not the first app that ends
    ui.mount(app, app.state.served)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", responder)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def served(responder: Responder) -> Iterator[Served]:
    with serving(responder) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium here ({str(error).splitlines()[0]}); install chromium, or: playwright install chromium")
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser: Browser, served: Served) -> Iterator[Page]:
    with watched(browser, served.address) as page:
        yield page


@contextmanager
def watched(browser: Browser, address: str, **context: Any) -> Iterator[Page]:
    """A tab with the page in it; afterwards, nothing must have gone wrong in it, and no request have left this machine."""
    inside = browser.new_context(viewport={"width": 1200, "height": 1000}, **context)
    page = inside.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    asked: set[str | None] = set()
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.add(urlsplit(request.url).hostname) if not request.url.startswith("data:") else None)
    page.goto(f"{address}/ui")
    page.get_by_role("tab", name="Chat").wait_for()
    try:
        yield page
    finally:
        inside.close()
    assert wrong == []
    assert asked == {"127.0.0.1"}


@pytest.fixture
def page(opened: Page) -> Page:
    return opened


def tab(page: Page, name: str) -> Locator:
    """What is under a tab, once it is open."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def begin_of_text(completion: Locator, text: str) -> None:
    """Types it once the tab is whole: the example that stands there at first would take its place."""
    box = completion.get_by_label("Text to continue")
    expect(box).not_to_have_value("")
    box.fill(text)


def text_of(engine: Engine, prompt: str, sampling: Sampling) -> str:
    return "".join(piece.text for piece in engine.complete(prompt, sampling))


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Its result; in a thread, as Playwright's own event loop runs in this one."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(asyncio.run, asyncio.wait_for(coroutine, 60)).result()


# What each tab does.


def test_an_answer_from_the_documents_comes_with_passages_that_open(page: Page, served: Served) -> None:
    chat = tab(page, "Chat")
    chat.get_by_role("textbox", name="Message").fill("What is a river?")
    chat.get_by_role("button", name="Send").click()
    wanted = answer(served.responder.engine, served.responder.index, "What is a river?", LIMITS.passages, GREEDY)
    first = chat.get_by_role("button", name=f"[1] {wanted.citations[0].title}").last

    expect(chat.get_by_test_id("bot").first).to_contain_text(wanted.text)
    expect(chat.get_by_text(wanted.citations[0].text)).to_be_hidden()
    first.click()
    expect(chat.get_by_text(wanted.citations[0].text)).to_be_visible()


def test_without_documents_the_model_talks_and_remembers_what_was_said(page: Page, served: Served) -> None:
    chat = tab(page, "Chat")
    chat.get_by_role("button", name="Clear").click()
    chat.get_by_label("Answer from the documents").uncheck()
    said: list[dict[str, str]] = []
    for question in ("What is a cat?", "And a dog?"):
        chat.get_by_role("textbox", name="Message").fill(question)
        chat.get_by_role("button", name="Send").click()
        expect(chat.get_by_role("textbox", name="Message")).to_have_value("")
        said.append({"role": "user", "content": question})
        text = "".join(piece.text for piece in served.responder.engine.chat(said, GREEDY))
        expect(chat.get_by_test_id("bot").last).to_have_text(text)
        said.append({"role": "assistant", "content": text})

    assert chat.get_by_role("button", name=re.compile(r"^\[1\]")).count() == 0
    chat.get_by_label("Answer from the documents").check()


def test_a_completion_shows_each_token_by_its_probability(page: Page, served: Served) -> None:
    completion = tab(page, "Completion")
    begin_of_text(completion, "The cat")
    completion.get_by_role("button", name="Continue").click()
    expect(completion.locator(".given")).to_have_text("The cat")
    sampling = Sampling(temperature=0.8, max_tokens=8, seed=1, logprobs=ui_work.ALTERNATIVES)
    pieces = list(served.responder.engine.complete("The cat", sampling))
    drawn = [one for piece in pieces for one in piece.logprobs]
    tokens, rows = completion.locator(".token"), completion.locator("tr")

    expect(tokens).to_have_count(len(drawn))
    assert len(drawn) > 1
    for place, one in enumerate(drawn):
        probability = 2.718281828459045**one.logprob
        assert rows.nth(place + 1).locator("td").nth(1).inner_text() == f"{probability:.1%}"
        assert tokens.nth(place).get_attribute("title").startswith(f"{probability:.1%}; likeliest: ")
        assert tokens.nth(place).get_attribute("title").count(" · ") == ui_work.ALTERNATIVES - 1
        assert f"{0.6 * (1 - probability):.2f}" in tokens.nth(place).get_attribute("style")


@pytest.mark.parametrize("mode", ["fused", "dense", "bm25"])
def test_retrieval_lists_what_the_index_finds(mode: str, page: Page, served: Served) -> None:
    retrieval = tab(page, "Retrieval")
    retrieval.get_by_label("Query").fill("water that runs to the sea")
    retrieval.get_by_label(mode, exact=True).check()
    retrieval.get_by_role("button", name="Search").click()
    hits = served.responder.index.search("water that runs to the sea", LIMITS.maximum_passages, mode)
    rows = retrieval.locator("tr:has(td)")

    expect(rows.first.locator("td").nth(1)).to_have_text(f"{hits[0].score:.4f}")
    found = [rows.nth(place).locator("td").all_inner_texts() for place in range(rows.count())]
    assert [(row[0], row[1], row[4]) for row in found] == [(str(hit.rank), f"{hit.score:.4f}", hit.passage.title) for hit in hits]
    if mode != "fused":
        assert [row[2 if mode == "dense" else 3] for row in found] == [row[0] for row in found]


def test_attention_is_drawn_for_the_layer_and_head_that_are_chosen(page: Page, served: Served) -> None:
    panel = tab(page, "Attention")
    panel.get_by_label("Text").fill("The cat is a cat.")
    panel.get_by_role("button", name="Draw").click()
    maps, tokens = attention_of(served.responder.engine, "The cat is a cat.")
    last = panel.locator("rect title").last

    for layer, head in ((1, 1), (2, 3)):
        for name, choice in (("Layer", layer), ("Head", head)):
            panel.locator("fieldset").filter(has_text=name).get_by_label(str(choice), exact=True).check()
        weight = maps[layer - 1, head - 1, -1, -1]
        expect(last).to_have_text(re.compile(rf"looks at .*: {weight:.1%}$"))
    assert panel.locator("rect").count() == len(tokens) * (len(tokens) + 1) // 2


def test_evolution_puts_one_prompt_and_seed_to_every_rung_and_the_served_model(page: Page, served: Served) -> None:
    evolution = tab(page, "Evolution")
    evolution.get_by_label("One prompt for all").fill("The star")
    evolution.get_by_label("Seed").fill("7")
    evolution.get_by_role("button", name="Write").click()
    sampling = Sampling(temperature=0.8, max_tokens=LIMITS.maximum_new_tokens, seed=7)
    cards = evolution.locator(".card")

    for place, (name, rung) in enumerate(served.responder.rungs.items()):
        expect(cards.nth(place).locator("strong")).to_have_text(name)
        expect(cards.nth(place).locator("p")).to_have_text(text_of(rung, "The star", sampling)[:32])
    said = "".join(piece.text for piece in served.responder.engine.chat([{"role": "user", "content": "The star"}], sampling))
    expect(cards.last.locator("strong")).to_have_text("tiny")
    expect(cards.last.locator("p")).to_have_text(said[:32])


# What must not happen.


def test_what_is_typed_or_retrieved_is_shown_and_never_run(page: Page, served: Served) -> None:
    completion = tab(page, "Completion")
    begin_of_text(completion, HOSTILE)
    completion.get_by_role("button", name="Continue").click()
    expect(completion.locator(".given")).to_have_text(HOSTILE)
    retrieval = tab(page, "Retrieval")
    retrieval.get_by_label("Query").fill("hacker documents")
    retrieval.get_by_label("bm25", exact=True).check()
    retrieval.get_by_role("button", name="Search").click()
    expect(retrieval.get_by_text(HOSTILE)).to_be_visible()
    chat = tab(page, "Chat")
    chat.get_by_role("textbox", name="Message").fill(HOSTILE)
    chat.get_by_role("button", name="Send").click()
    expect(chat.get_by_test_id("user").last).to_have_text(HOSTILE)
    expect(chat.get_by_test_id("bot").last).to_be_visible()

    assert page.evaluate("window.hacked") is None


def test_a_text_too_long_is_one_line_to_the_reader(page: Page, served: Served) -> None:
    completion = tab(page, "Completion")
    text = "cat " * 120
    begin_of_text(completion, text)
    completion.get_by_role("button", name="Continue").click()
    found = len(served.responder.engine.tokenizer.encode(text))

    expect(completion.get_by_role("alert")).to_have_text(f"the prompt is {found} tokens, and no more than 100 are read; shorten it")


def test_a_full_line_is_one_line_to_the_reader(page: Page, served: Served) -> None:
    completion = tab(page, "Completion")
    with held(served, LIMITS.slots + LIMITS.maximum_waiting):
        begin_of_text(completion, "The cat")
        completion.get_by_role("button", name="Continue").click()
        expect(completion.get_by_role("alert")).to_contain_text("are waiting already, and no more than 1 may; send it again later")


def test_who_leaves_the_page_stops_the_work_and_who_types_on_while_it_goes_on_keeps_what_is_typed(
    browser: Browser, responder: Responder
) -> None:
    patient = responder.limits.model_copy(update={"maximum_new_tokens": 100_000, "default_new_tokens": 32, "deadline_seconds": 500})
    other = Responder(responder.engine, responder.index, patient, "fp_test")
    with serving(other) as served:
        with watched(browser, served.address) as page:
            chat = tab(page, "Chat")
            chat.get_by_label("Answer from the documents").uncheck()
            chat.get_by_label("number input for New tokens at most").fill("100000")
            for stop in (True, False):
                chat.get_by_role("textbox", name="Message").fill("A cat?")
                chat.get_by_role("button", name="Send").click()
                until(lambda: other.lane.running == 1)
                expect(chat.get_by_role("textbox", name="Message")).to_have_value("")  # the one emptying that is meant
                expect(chat.get_by_test_id("bot").first).to_be_visible()
                chat.get_by_role("textbox", name="Message").fill("And a dog?")  # every piece of an answer used to empty the box again
                page.wait_for_timeout(500)
                expect(chat.get_by_role("textbox", name="Message")).to_have_value("And a dog?")
                if stop:
                    chat.get_by_role("button", name="Stop").click()
                    until(lambda: other.lane.running == 0)
        until(lambda: other.lane.running == 0)
    other.lane.close()


@contextmanager
def held(served: Served, jobs: int) -> Iterator[None]:
    """The lane with `jobs` in it that do not end."""

    def counting(check: Check) -> Iterator[int]:
        for number in itertools.count():
            time.sleep(0.01)
            check()
            yield number

    stop = threading.Event()

    async def hold() -> None:
        working = [served.responder.lane.submit(counting) for _ in range(jobs)]
        ready.set()
        await asyncio.to_thread(stop.wait, 60)
        for job in working:
            job.stop()
        await served.responder.lane.idle()

    ready = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(hold(),))
    thread.start()
    ready.wait(20)
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


# Who may see it, and what there is.


def test_with_a_key_nothing_of_the_page_answers_without_it(responder: Responder) -> None:
    app = create_app(responder, KEY)
    ui.mount(app, app.state.served)
    gradio = next(route.app for route in app.routes if getattr(route, "path", "") == ui.PATH and hasattr(route, "app"))
    paths = {re.sub(r"{[^}]*}", "x", path) for path in gradio.openapi()["paths"]}
    client = TestClient(app, follow_redirects=False)

    assert len(paths) > 50
    for path in {"", "/", *paths}:
        for method in ("GET", "POST", "OPTIONS"):
            assert client.request(method, f"{ui.PATH}{path}").status_code == 401, path
    asked = {"Authorization": f"Basic {b64encode(f'any:{KEY}'.encode()).decode()}"}
    assert client.get(f"{ui.PATH}/", headers=asked).status_code == 200


def test_a_browser_gives_the_key_as_the_password(browser: Browser, responder: Responder) -> None:
    with (
        serving(responder, KEY) as served,
        watched(browser, served.address, http_credentials={"username": "any", "password": KEY}) as page,
    ):
        retrieval = tab(page, "Retrieval")
        retrieval.get_by_label("Query").fill("cat")
        retrieval.get_by_role("button", name="Search").click()
        expect(retrieval.locator("tr:has(td)").first).to_be_visible()


def test_of_gradios_many_routes_only_the_pages_own_are_there(served: Served) -> None:
    """An upload would fill the disk of whoever serves this, and a body without an end the memory."""
    with TestClient(create_mounted(served.responder)) as client:
        for method, path in (
            ("POST", "upload"),
            ("GET", "proxy=http://x/"),
            ("GET", "file=/etc/passwd"),
            ("POST", "run/predict"),
            ("GET", "info"),
        ):
            assert client.request(method, f"{ui.PATH}/gradio_api/{path}").status_code == 404, path
        joined = client.post(f"{ui.PATH}/gradio_api/queue/join", content=b" " * (LIMITS.maximum_body_bytes + 1))
        assert joined.status_code == 413
        endless = client.post(f"{ui.PATH}/gradio_api/queue/join", content=iter([b"{}"]))
        assert endless.status_code == 413


def create_mounted(responder: Responder) -> Any:
    app = create_app(responder)
    app.router.lifespan_context = type(app)().router.lifespan_context
    ui.mount(app, app.state.served)
    return app


def test_a_tab_is_hidden_where_there_is_nothing_to_show_in_it(responder: Responder, tmp_path: Path) -> None:
    bare = Responder(responder.engine, responder.index, LIMITS, "fp_test")

    def tabs(one: Responder) -> list[str]:
        import gradio

        components = ui.page(gradio, reloading.Served(one)).config["components"]
        return [component["props"]["label"] for component in components if component["type"] == "tabitem"]

    assert tabs(responder) == ["Chat", "Completion", "Retrieval", "Attention", "Evolution"]
    assert tabs(bare) == ["Chat", "Completion", "Retrieval", "Attention"]
    bare.lane.close()


def test_the_page_asks_the_model_that_answers_now(responder: Responder, tmp_path: Path) -> None:
    """It is made for the first model, and another may have taken over since."""
    import gradio

    models, other = reloading.Served(responder), Responder(Engine.open(tiny_model(tmp_path, seed=5)), responder.index, LIMITS, "fp_other")
    asked = ("The cat", 0.0, 8, 1)
    complete = next(event.fn for event in ui.page(gradio, models).fns.values() if event.name == "complete")

    async def drawn() -> str:
        return [html async for html in complete(*asked)][-1]

    async def wanted() -> str:
        sampling = Sampling(temperature=0.0, max_tokens=8, seed=1, logprobs=ui_work.ALTERNATIVES)
        return ui_html.tokens("The cat", [tokens async for tokens in ui_work.complete(other, "The cat", sampling)][-1])

    first = run(drawn())
    models.now = other
    assert run(drawn()) == run(wanted()) != first
    with pytest.raises(ValueError, match="no head 1 in layer 3: this model has 2 layers of 4"):
        run(anext(ui_work.attend(other, "The cat", 3, 1)))
    other.close()


@pytest.mark.slow
def test_a_picture_is_taken_of_each_tab(served: Served, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:  # as Playwright's own event loop runs in this thread
        taken = pool.submit(screenshots, Path(), tmp_path / "pictures", served.address).result()

    assert [path.name for path in taken] == ["chat.png", "completion.png", "retrieval.png", "attention.png", "evolution.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in taken)


def test_a_chat_grows_piece_by_piece_and_forgets_its_oldest_turns_before_it_outgrows_the_model(responder: Responder) -> None:
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(40) for role in ("user", "assistant")]

    long = Sampling(temperature=0.0, max_tokens=64)

    async def scenario() -> list[str]:
        return [said.text async for said in ui_work.chat(responder, [*turns, {"role": "user", "content": "A cat?"}], False, long)]

    texts = run(scenario())
    assert len(texts) > 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
