"""The BentoML service: a packaged model, opened once, behind the API of `app`. Nothing is decided here.

One worker, as the model answers one request at a time; torch takes all cores, or as many as OMP_NUM_THREADS says. BentoML itself
brings /readyz (200 once the model is open), /livez and /metrics. Importing this module reads the arguments of the Bento that is served.
"""

from __future__ import annotations

from pathlib import Path

import bentoml
from pydantic import BaseModel

from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.auth import read_key
from llm_from_scratch.serving.limits import LONGEST_DEADLINE
from llm_from_scratch.serving.responder import Responder, check_package


class Arguments(BaseModel):
    """What `bentoml build --arg …` puts into the Bento: the exact model, and where its place keeps the API key, if it wants one.

    Without `model` a Bento names what is latest wherever it is served: BentoML pins Hugging Face's models, not those of its own store.
    Without `api_key_file` everybody who reaches the server may ask.
    """

    model: str = "llm_from_scratch:latest"
    api_key_file: str = ""


arguments = bentoml.use_arguments(Arguments)
app = create_app()


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
    envs=[{"name": "OMP_WAIT_POLICY", "value": "PASSIVE"}],  # idle threads that spin cost the others half their speed
)
@bentoml.asgi_app(app)
class LanguageModel:
    """A language model with OpenAI's API at /v1, and POST /ask for answers with citations."""

    model = bentoml.models.BentoModel(arguments.model)
    check = bentoml.on_deployment(check_inputs)

    def __init__(self) -> None:
        app.state.key = api_key()
        app.state.responder = Responder.open(Path(self.model.path))
