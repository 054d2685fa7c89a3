"""From finished bundles to a model in BentoML's store, from there to a Bento, and from a Bento to an address.

The store is where BENTOML_HOME says, which bentoml reads by itself; it must lie outside src/, or a Bento would pack the store it goes into.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from llm_from_scratch import bundle
from llm_from_scratch.inference.quantize import KINDS
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.responder import EMBEDDER, INDEX, MODEL, RUNGS, SERVING, check_package

NAME = "llm_from_scratch"
BENTOML = (sys.executable, "-m", "bentoml")


def package(model: Path, index: Path, embedder: Path, limits: ServeParams, rungs: Mapping[str, Path] | None = None) -> str:
    """One model in BentoML's store made of three bundles, the ladder's `rungs` by name, and the limits; its tag.

    The tag follows from the content, and the same content is stored once. Raises BundleError when a bundle is damaged, or the index was
    made with another embedder.
    """
    parts = {MODEL: model, INDEX: index, EMBEDDER: embedder}
    manifests = {MODEL: bundle.verify(model, *KINDS), INDEX: bundle.verify(index, "index"), EMBEDDER: bundle.verify(embedder, "corpus")}
    bundle.require_parent(manifests[INDEX], "embedder", manifests[EMBEDDER])
    for name, rung in (rungs or {}).items():
        parts[f"{RUNGS}/{name}"] = rung
        manifests[f"{RUNGS}/{name}"] = bundle.verify(rung, *KINDS)
    digests = {part: manifest.digest for part, manifest in manifests.items()}
    serving = json.dumps({"serve": limits.model_dump(), "digests": digests}, indent=2) + "\n"
    tag = f"{NAME}:{hashlib.sha256(serving.encode()).hexdigest()[:24]}"
    if not _stored_whole(tag):
        _store(tag, parts, serving)
    return tag


def build(root: Path, model: str, api_key_file: str = "") -> str:
    """The tag of a new Bento that serves the stored `model`, made from the project at `root` by `bentoml build`.

    With an `api_key_file`, a path where it will be served, it opens only where that holds a key. The path is told now because a built
    Bento takes no arguments any more: `bentoml serve` drops them without a word. Raises ValueError with the last thing that bentoml said.
    """
    told = ["--arg", f"model={model}", "--arg", f"api_key_file={api_key_file}"]
    command = [*BENTOML, "build", "src", "-f", "bentofile.yaml", *told, "--output", "tag"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if (found := re.search(r"__tag__:(\S+)", done.stdout)) is None or done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ValueError(f"bentoml build ended with {done.returncode}: {said[-1] if said else 'no word'}")
    return found[1]


def serve(bento: str, host: str, port: int) -> NoReturn:
    """Become the server of `bento`: signals and the exit code are its own. Raises ValueError when the address is not free."""
    require_free(host, port)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(BENTOML[0], [*BENTOML, "serve", bento, "--host", host, "--port", str(port)])


def require_free(host: str, port: int) -> None:
    """Raises ValueError when nothing can listen there: bentoml would answer that with a page of traceback."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such port"
            raise ValueError(f"cannot listen on {host}:{port} ({reason}); stop what listens there or choose another with --port") from None


def _stored_whole(tag: str) -> bool:
    """Whether the store has it. What a killed run left of it is taken away."""
    import bentoml

    try:
        check_package(Path(bentoml.models.get(tag).path))
    except bentoml.exceptions.NotFound:
        return False
    except (bundle.BundleError, bentoml.exceptions.BentoMLException):
        bentoml.models.delete(tag)
        return False
    return True


def _store(tag: str, parts: dict[str, Path], serving: str) -> None:
    import bentoml

    with bentoml.models.create(tag) as stored:
        for part, folder in parts.items():
            shutil.copytree(folder, stored.path_of(part))
        Path(stored.path_of(SERVING)).write_text(serving, encoding="utf-8")
