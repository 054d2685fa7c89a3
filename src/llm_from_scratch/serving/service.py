"""The BentoML service: a packaged model, opened once, behind the API of `app`. Nothing is decided here.

One worker, as the engine puts requests together that come at the same time; torch takes all cores, or as many as OMP_NUM_THREADS says.
BentoML itself brings /readyz (200 once the model is open, 503 while it goes down), /livez and /metrics. Importing this module reads the
arguments of the Bento that is served.
"""

from __future__ import annotations

from pathlib import Path

import bentoml
from pydantic import BaseModel
from starlette.routing import Route

from llm_from_scratch.serving import ui
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.auth import Guard, read_key
from llm_from_scratch.serving.bento_middleware import mend
from llm_from_scratch.serving.draining import finish_first
from llm_from_scratch.serving.limits import LONGEST_DEADLINE
from llm_from_scratch.serving.metrics import PrometheusMeter
from llm_from_scratch.serving.package import NAME
from llm_from_scratch.serving.responder import Responder, check_package

LATEST = f"{NAME}:latest"


class Arguments(BaseModel):
    """What `bentoml build --arg …` puts into the Bento: the exact model, and where its place keeps the API key, if it wants one.

    Without `model` a Bento names what is latest wherever it is served: BentoML pins Hugging Face's models, not those of its own store.
    Without `api_key_file` everybody who reaches the server may ask.
    """

    model: str = LATEST
    api_key_file: str = ""


def open_stored(tag: str | None) -> Responder:
    """The responder of a model in BentoML's store, beside the one that answers. Raises ValueError where it is not there or damaged."""
    try:
        folder = Path(bentoml.models.get(tag or LATEST).path)
    except bentoml.exceptions.BentoMLException as error:
        raise ValueError(f"{error}; python -m pipelines reload stores the chosen one and asks for it") from None
    return Responder.open(folder, app.state.served.now)


arguments = bentoml.use_arguments(Arguments)
app = create_app(open_stored=open_stored)
mend(frozenset(route.path for route in app.routes if isinstance(route, Route)).__contains__)


def api_key() -> str:
    return read_key(Path(arguments.api_key_file)) if arguments.api_key_file else ""


def check_inputs() -> None:
    """Before anything listens: a worker that cannot open its model or read its key would be started again and again."""
    try:
        check_package(Path(bentoml.models.get(arguments.model).path))
        api_key()
    except ValueError as error:
        raise bentoml.exceptions.BentoMLException(str(error)) from None


@bentoml.service(
    name="language_model",
    workers=1,
    http={"host": "127.0.0.1", "port": 3000},
    traffic={"timeout": LONGEST_DEADLINE + 60},
    envs=[
        {"name": "OMP_WAIT_POLICY", "value": "PASSIVE"},  # idle threads that spin cost the others half their speed
        {"name": "MALLOC_ARENA_MAX", "value": "2"},  # one for each thread, as glibc has it, goes on growing; with two it ends
    ],
)
@bentoml.asgi_app(app)
class LanguageModel:
    """A language model with OpenAI's API at /v1, and POST /ask for answers with citations."""

    model = bentoml.models.BentoModel(arguments.model)
    check = bentoml.on_deployment(check_inputs)

    def __init__(self) -> None:
        app.state.key = api_key()
        self.served = app.state.served
        self.served.now = Responder.open(Path(self.model.path))
        self.served.now.meter = PrometheusMeter()
        self.served.now.report()
        ui.mount(app, self.served)
        finish_first(self.served.lanes)

    async def __is_ready__(self) -> bool:
        return not any(lane.draining for lane in self.served.lanes())

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        self.served.close()


# BentoML's own routes too: its page, /docs.json and /schema.json. To mypy a decorated class is still the class.
LanguageModel.add_asgi_middleware(Guard, key=lambda: app.state.key)  # type: ignore[attr-defined]
