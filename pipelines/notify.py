"""A word to whoever wants to hear of a run that failed, through a block of theirs: Slack, mail, a webhook of their own, …

Which block, the flow's parameter `notify` says, as TYPE/NAME: `slack-webhook/ops`. Empty, nobody is told.
"""

from __future__ import annotations

from typing import Any, Protocol

from prefect.blocks import notifications  # noqa: F401  so that their types are known
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.settings import PREFECT_UI_URL

LONGEST = 1500  # characters: chats cut or refuse more


class Run(Protocol):
    """What is told of a flow run."""

    id: Any
    name: str
    parameters: dict[str, Any]


class Ended(Protocol):
    name: str
    message: str | None


def tell(flow: Any, flow_run: Run, state: Ended) -> None:
    """A hook for `on_failure` and `on_crashed`. Its parameters have the names by which a worker calls it when the run's process died."""
    if name := flow_run.parameters.get("notify", ""):
        page = PREFECT_UI_URL.value()
        where = f"\n{page}/runs/flow-run/{flow_run.id}" if page else ""
        load(name).notify(f"{(state.message or '')[:LONGEST]}{where}", f"{flow.name} {flow_run.name}: {state.name}")


def load(name: str) -> NotificationBlock:
    """The block `name`. Raises ValueError where there is none, or it cannot notify."""
    block = Block.load(name)
    if not isinstance(block, NotificationBlock):
        raise ValueError(f"block {name} is a {type(block).__name__}; wanted one that notifies, such as slack-webhook/NAME")
    return block
