"""Who may use the card: a limit on the Prefect server, held by a lease, so that flows of all workspaces and machines take turns.

Prefect renews a lease when three quarters of it are over. Who was killed renews no more, and the server takes the slot back when the lease
has run out: after a minute at most, and the pause between two looks of the server (`make prefect` sets five seconds).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

GPU = "gpu"
STAGES = {"train", "finetune"}
LEASE_SECONDS = 60.0  # the shortest that the server grants


def uses_gpu(node: str) -> bool:
    return node.split("@")[0] in STAGES


def ensure_limit(slots: int = 1) -> bool:
    """Whether the limit had to be made; one that a person has set already stays as it is."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU, limit=slots))
            return True
    return False


def lease() -> AbstractContextManager[None]:
    """A slot, waited for. `strict`: a missing limit is an error, not a warning.

    A lease that cannot be renewed, as the server is away, does not end a long training: it goes on, and another may start beside it.
    """
    return concurrency(GPU, occupy=1, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False)
