"""The page at /ui: chat, completion, retrieval, attention and the ladder's evolution, drawn by Gradio and mounted on the API's own app.

It needs nothing but this server: the fonts are the reader's own, and Gradio's telemetry, upload and API routes are closed. What the model
has to do goes through `ui_work`; here are only the controls and what happens when they are used.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from html import escape, unescape
from typing import Any, TypeVar, cast

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from starlette.middleware import Middleware

from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.index import Mode
from llm_from_scratch.serving import ui_html, ui_work
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.reloading import Served
from llm_from_scratch.serving.responder import Responder
from llm_from_scratch.serving.ui_routes import PageOnly
from llm_from_scratch.tokenizer.chat import Message

PATH = "/ui"
UNSUPPORTED = "What was retrieved does not say this. Take it for invented."
EXAMPLE_QUESTION, EXAMPLE_PROMPT, EXAMPLE_RUNGS, EXAMPLE_ATTENTION = (
    "What is a stick insect?",
    "The history of the city",
    "The king said to his people",
    "The river is the longest river in the world.",
)

T = TypeVar("T")
Shown = list[dict[str, Any]]  # a chat as Gradio keeps it: role, content, and for a passage metadata with its title


def mount(app: FastAPI, served: Served) -> None:
    """Put the page of what is `served` on `app`, before that has begun to answer. Who may see it is up to `auth`.

    It asks whichever model answers then; its tabs and the ends of its sliders stay those of the first.
    """
    gr = _gradio()
    assert served.now is not None
    gr.mount_gradio_app(
        app,
        page(gr, served),
        PATH,
        theme=gr.themes.Default(font=[_system_font("system-ui"), "sans-serif"], font_mono=[_system_font("ui-monospace"), "monospace"]),
        css=ui_html.CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"middleware": [Middleware(PageOnly, path=PATH, maximum_body_bytes=served.now.limits.maximum_body_bytes)]},
    )
    app.add_api_route(PATH, lambda: RedirectResponse(f"{PATH}/"), methods=["GET"])
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), methods=["GET"])  # browsers ask, whatever a page says


def page(gr: Any, served: Served) -> Any:
    """The controls, as Gradio's Blocks. The lane is the only queue: Gradio's own would make strangers wait for each other."""
    assert served.now is not None
    responder = served.now
    with gr.Blocks(analytics_enabled=False, title=responder.limits.model_name) as blocks:
        gr.Markdown(
            f"# {responder.limits.model_name}\nA small language model, trained from nothing. Check what it says against the passage."
        )
        with gr.Tab("Chat"):
            _chat(gr, served, responder)
        with gr.Tab("Completion"):
            _completion(gr, served, responder)
        with gr.Tab("Retrieval"):
            _retrieval(gr, served, responder)
        if shape := ui_work.heads(responder):
            with gr.Tab("Attention"):
                _attention(gr, served, *shape)
        if responder.rungs:
            with gr.Tab("Evolution"):
                _evolution(gr, served, responder)
    return blocks.queue(default_concurrency_limit=None, api_open=False)


def _chat(gr: Any, served: Served, first: Responder) -> None:
    async def talk(message: str, shown: Shown, documents: bool, temperature: float, new_tokens: float) -> AsyncIterator[tuple[Any, Shown]]:
        asked = [*shown, _message("user", message)]
        yield "", asked  # once: who types the next question while this one is answered keeps what is typed
        try:
            sampling = Sampling(temperature=temperature, max_tokens=int(new_tokens))
            with served.use() as responder:
                async with aclosing(ui_work.chat(responder, _turns(asked), documents, sampling)) as answers:
                    async for said in answers:
                        yield gr.skip(), [*asked, _message("assistant", said.text), *_sources(said)]
        except (ApiError, ValueError) as error:
            yield message, [*asked, _message("assistant", str(error), title="No answer")]

    chat = gr.Chatbot(label="Chat", height=420, render_markdown=False, buttons=[], feedback_options=None)
    with gr.Row():
        message = gr.Textbox(label="Message", placeholder=EXAMPLE_QUESTION, scale=4)
        documents = gr.Checkbox(label="Answer from the documents", value=True, scale=1)
    with gr.Row():
        send, stop = gr.Button("Send", variant="primary"), gr.Button("Stop")
    temperature, new_tokens = _drawing(gr, first, 0.0)
    inputs, outputs = [message, chat, documents, temperature, new_tokens], [message, chat]
    events = [on(talk, inputs, outputs, api_visibility="private") for on in (message.submit, send.click)]
    stop.click(None, cancels=events, api_visibility="private")


def _completion(gr: Any, served: Served, first: Responder) -> None:
    async def complete(prompt: str, temperature: float, new_tokens: float, seed: float) -> AsyncIterator[str]:
        def begin(responder: Responder) -> AsyncGenerator[list[ui_work.Token], None]:
            sampling = Sampling(temperature=temperature, max_tokens=int(new_tokens), seed=int(seed or 0), logprobs=ui_work.ALTERNATIVES)
            return ui_work.complete(responder, prompt, sampling)

        async for drawn in _drawn(served, begin, lambda tokens: ui_html.tokens(prompt, tokens)):
            yield drawn

    prompt = gr.Textbox(label="Text to continue", value=EXAMPLE_PROMPT, lines=3)
    temperature, new_tokens = _drawing(gr, first, 0.8)
    seed = gr.Number(label="Seed", value=1, precision=0, minimum=0)
    _button(gr, "Continue", complete, [prompt, temperature, new_tokens, seed])


def _retrieval(gr: Any, served: Served, first: Responder) -> None:
    async def search(query: str, mode: str, k: float) -> AsyncIterator[str]:
        def begin(responder: Responder) -> AsyncGenerator[list[ui_work.Found], None]:
            return ui_work.retrieve(responder, query, cast(Mode, mode), min(int(k), responder.limits.maximum_passages))

        async for drawn in _drawn(served, begin, ui_html.passages):
            yield drawn

    query = gr.Textbox(label="Query", value=EXAMPLE_QUESTION)
    with gr.Row():
        mode = gr.Radio(["fused", "dense", "bm25"], value="fused", label="Search")
        k = gr.Slider(1, most := first.limits.maximum_passages, value=min(5, most), step=1, label="Passages")
    _button(gr, "Search", search, [query, mode, k])


def _attention(gr: Any, served: Served, layers: int, heads: int) -> None:
    async def attend(text: str, layer: float, head: float) -> AsyncIterator[str]:
        async for drawn in _drawn(served, lambda responder: ui_work.attend(responder, text, int(layer), int(head)), ui_html.attention):
            yield drawn

    text = gr.Textbox(label="Text", value=EXAMPLE_ATTENTION)
    with gr.Row():
        layer, head = (gr.Radio(list(range(1, most + 1)), value=1, label=name) for name, most in (("Layer", layers), ("Head", heads)))
    out = _button(gr, "Draw", attend, [text, layer, head])
    for control in (layer, head):
        control.input(attend, [text, layer, head], out, api_visibility="private", trigger_mode="always_last")


def _evolution(gr: Any, served: Served, first: Responder) -> None:
    async def evolve(prompt: str, seed: float, temperature: float, characters: float) -> AsyncIterator[str]:
        with served.use() as responder:
            texts = dict.fromkeys([*responder.rungs, responder.limits.model_name], "")
            for rung in texts:
                try:
                    sampling = Sampling(temperature=temperature, max_tokens=int(characters), seed=int(seed or 0))
                    async with aclosing(ui_work.evolve(responder, rung, prompt, sampling)) as written:
                        async for text in written:
                            texts[rung] = text
                            yield ui_html.cards(texts)
                except (ApiError, ValueError) as error:
                    texts[rung] = f"({error})"
            yield ui_html.cards(texts)

    gr.Markdown("Every rung of the ladder goes on with the same prompt and seed; the last, the served model, answers it.")
    prompt = gr.Textbox(label="One prompt for all", value=EXAMPLE_RUNGS)
    with gr.Row():
        seed = gr.Number(label="Seed", value=1, precision=0, minimum=0)
        temperature = gr.Slider(0, 2, value=0.8, step=0.1, label="Temperature")
        characters = gr.Slider(1, first.limits.maximum_new_tokens, value=first.limits.maximum_new_tokens, step=1, label="Characters")
    _button(gr, "Write", evolve, [prompt, seed, temperature, characters])


def _drawing(gr: Any, responder: Responder, temperature: float) -> tuple[Any, Any]:
    limits = responder.limits
    with gr.Row():
        return (
            gr.Slider(0, 2, value=temperature, step=0.1, label="Temperature", info="0 takes the likeliest token"),
            gr.Slider(1, limits.maximum_new_tokens, value=limits.default_new_tokens, step=1, label="New tokens at most"),
        )


def _button(gr: Any, name: str, draw: Callable[..., AsyncIterator[str]], inputs: list[Any]) -> Any:
    """A button, one that stops it, and the drawing below them."""
    with gr.Row():
        begin, stop = gr.Button(name, variant="primary"), gr.Button("Stop")
    out = gr.HTML()
    events = [on(draw, inputs, out, api_visibility="private") for on in (begin.click, inputs[0].submit)]
    stop.click(None, cancels=events, api_visibility="private")
    return out


async def _drawn(served: Served, begin: Callable[[Responder], AsyncGenerator[T, None]], draw: Callable[[T], str]) -> AsyncIterator[str]:
    """The drawing of each item, and a line for the reader where there can be none."""
    try:
        with served.use() as responder:
            async with aclosing(begin(responder)) as items:
                async for item in items:
                    yield draw(item)
    except (ApiError, ValueError) as error:
        yield ui_html.problem(str(error))


def _message(role: str, text: str, **metadata: str) -> dict[str, Any]:
    """A message for Gradio's chat, which takes what is in it for HTML whether it comes from a reader, a model or a document."""
    return {"role": role, "content": escape(text), **({"metadata": metadata} if metadata else {})}


def _sources(said: ui_work.Said) -> Shown:
    """The passages under an answer, closed until somebody clicks."""
    if said.unsupported:
        return [_message("assistant", UNSUPPORTED, title="No passage supports this", status="done")]
    return [
        _message("assistant", source.text, title=f"[{source.number}] {escape(source.title)}", status="done") for source in said.citations
    ]


def _turns(shown: Shown) -> list[Message]:
    """What was said, without passages and complaints."""
    said = (one for one in shown if not (one.get("metadata") or {}).get("title"))
    return [{"role": one["role"], "content": unescape(_text(one["content"]))} for one in said]


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _system_font(name: str) -> Any:
    """A font that the reader's machine has: a plain name would be looked for on this server."""
    from gradio.themes.utils.fonts import Font

    return Font(name)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ValueError("no gradio here; pip install 'llm-from-scratch[serve]' brings it") from None
    return gradio
