"""From finished bundles to a Bento, and from a Bento to an address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from llm_from_scratch import config
from llm_from_scratch.serving import package as bento
from llm_from_scratch.serving.auth import read_key
from pipelines.champion import RETRIEVER, SERVED, champion_bundle, require_store
from pipelines.servers import free_port, running
from stages.__main__ import read_yaml

SHOWN_BYTES = 64 * 2**20
"""Of a rung that the page shows beside the served model: every Bento carries and opens them all, so the large ones stay at home."""
STOP_SECONDS = 30
RELOAD_SECONDS = 600
"""The new model is read, checked and opened before the server answers."""


def package(root: Path, api_key_file: str, champion: bool = False, index: Path | None = None) -> str:
    """The tag of a Bento of what `store` put into BentoML's store. Raises as that does."""
    return bento.build(root, store(root, champion, index), api_key_file)


def store(root: Path, champion: bool = False, index: Path | None = None) -> str:
    """The tag, in BentoML's store, of the model that `evaluate` chose to serve, with index, embedder and the ladder's smaller models.

    With `champion`, model and index are those that the registry has as champions, whatever evaluate chose last; an `index` that is named
    goes before either. Raises BundleError where one is missing or damaged, and ParamsError and ValueError before any work.
    """
    params = config.parse(read_yaml(root / "params.yaml"), "params.yaml")
    artifacts = root / "artifacts"
    model, built = champions(root) if champion else (artifacts / "models" / served(root), artifacts / "index")
    embedder = artifacts / "raw" / params.index.embedder
    ladder = {name: artifacts / "models" / name for name in params.train}
    shown = {name: folder for name, folder in ladder.items() if _bytes(folder) <= SHOWN_BYTES}
    return bento.package(model, index or built, embedder, params.serve, shown)


def champions(root: Path) -> tuple[Path, Path]:
    """The bundles of the champions: the model to serve, and the index. Raises ValueError where there is none, or no registry."""
    require_store(root)
    return champion_bundle(root, SERVED), champion_bundle(root, RETRIEVER)


def served(root: Path) -> str:
    """The name of the bundle to serve, from the verdict. Raises ValueError where there is none yet."""
    verdict = root / "reports" / "verdict.json"
    try:
        return str(json.loads(verdict.read_text(encoding="utf-8"))["served"])
    except (FileNotFoundError, KeyError):
        raise ValueError(f"{verdict} names no model to serve; dvc repro evaluate chooses one") from None


def serve(root: Path, host: str, port: int, api_key_file: str, champion: bool = False, index: Path | None = None) -> NoReturn:
    """Package, then become the server. Raises ValueError, before any work, where the address is taken or the file holds no key."""
    bento.require_free(host, port)
    if api_key_file:
        read_key(Path(api_key_file))
        api_key_file = str(Path(api_key_file).resolve())
    bento.serve(package(root, api_key_file, champion, index), host, port)


def reload(root: Path, url: str, api_key_file: str, champion: bool = False, index: Path | None = None) -> str:
    """Store what `store` chooses, and let the server at `url` take it over; what came of it, in a line.

    The server has to have the same store. Nobody who is being answered is cut off. Raises ValueError where it refuses or is not there.
    """
    tag = store(root, champion, index)
    headers = {"Content-Type": "application/json"}
    if api_key_file:
        headers["Authorization"] = f"Bearer {read_key(Path(api_key_file))}"
    asked = Request(f"{url.rstrip('/')}/admin/reload", json.dumps({"model": tag}).encode(), headers)
    try:
        with urlopen(asked, timeout=RELOAD_SECONDS) as reply:
            said = json.load(reply)
    except HTTPError as error:
        raise ValueError(f"{url} keeps its model ({error.code}): {error.read().decode(errors='replace')[:300]}") from None
    except URLError as error:
        raise ValueError(f"nobody answers at {url} ({error.reason}); make serve starts a server") from None
    same = "as before" if not said["changed"] else "as before; its index or embedder is new"
    before = same if said["digest"] == said["previous"] else f"before with {said['previous'][:12]}…"
    return f"{url} answers with {said['digest'][:12]}… ({tag}), {before}"


@contextmanager
def serving(tag: str) -> Iterator[str]:
    """The address where the Bento `tag` answers, on a free port of the loopback, until the block ends. Raises ValueError if it does not."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    with running([*bento.BENTOML, "serve", tag, "--port", str(port)], f"{address}/readyz", patience=STOP_SECONDS):
        yield address


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))
