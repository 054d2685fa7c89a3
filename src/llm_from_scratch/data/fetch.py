"""One pinned file, fetched: mirror first, resumed where it broke off, and never handed on before its sha256 is right.

A transfer lives in `<name>.part` until then. What passes by itself (a dropped connection, a busy server, a transfer cut short) is tried
again with growing pauses; what does not (404, wrong bytes) is not. What it cannot do is fetch a file whose sha256 nobody wrote down.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from llm_from_scratch import progress
from llm_from_scratch.bundle import file_digest

CHUNK = 1 << 16  # bytes; at most this much is lost when a connection breaks
LONGEST_PAUSE = 60.0  # seconds
BUSY = (408, 425, 429)  # client errors that pass by themselves, as do all of 500 and above


class FetchError(ValueError):
    """A file cannot be had: it is not there, not the pinned one, or out of reach. One line."""


class Interrupted(OSError):
    """A fault that may pass by itself; another attempt goes on from where this one stopped."""


class Response(Protocol):
    """As much of a response as is used here; those of requests and of pip's own session have it."""

    status_code: int

    @property
    def headers(self) -> Mapping[str, str]: ...

    def iter_content(self, chunk_size: int) -> Iterator[bytes]: ...

    def close(self) -> None: ...


Get = Callable[[str, Mapping[str, str]], Response]  # (url, headers) → a response whose body is not read yet


@dataclass(frozen=True)
class Pinned:
    """A file by name and sha256. `aliases` are other names a mirror may have it under, `url` is empty where a registry knows it."""

    name: str
    sha256: str
    url: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patience:
    """How often a transfer is begun, and the seconds before the second time, doubled each time after."""

    attempts: int
    backoff: float


def quiet(message: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Route:
    """The way out of this machine. `mirror` is a folder, a base URL, or empty; `say` hears of what went wrong and was got around."""

    mirror: str
    web: Get
    patience: Patience
    say: Callable[[str], None] = quiet


def fetch(corpus: str, pinned: Pinned, downloads: Path, route: Route, locate: Callable[[], tuple[str, Get]]) -> Path:
    """The path of the verified file: in `downloads`, or in the mirror itself where that is a folder.

    A mirror is tried first and may have the file under its own name or the corpus's. `locate` gives the origin, and is asked only when
    the mirror could not help. Raises FetchError with everything that was tried.
    """
    place = downloads / pinned.name
    if place.is_file() and file_digest(place) == pinned.sha256:
        return place
    tried: list[str] = []
    if route.mirror:
        try:
            return _from_mirror(corpus, pinned, place, route)
        except FetchError as error:
            tried.append(f"mirror: {error}")
            route.say(f"{corpus}: {tried[-1]}; trying the origin")
    try:
        url, get = locate()
        return download(url, get, place, pinned.sha256, route.patience)
    except FetchError as error:
        tried.append(str(error))
    raise FetchError(
        f"cannot get {corpus}: {'; '.join(tried)}; "
        f"next: put {PurePosixPath(pinned.name).name} into a folder and name the folder in LLM_MIRROR or params.yaml: download.mirror"
    )


def download(url: str, get: Get, place: Path, sha256: str, patience: Patience) -> Path:
    """Transfer `url` to `place`, going on with `<place>.part` if there is one. Raises FetchError."""
    partial = place.with_name(place.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    resumed = partial.exists()
    found = file_digest(partial) if resumed else ""
    if found != sha256:
        resumed = _transfer_patiently(url, get, partial, patience)
        found = file_digest(partial)
    if found != sha256 and resumed:
        # The two halves may be of different files: once more from nothing.
        partial.unlink()
        _transfer_patiently(url, get, partial, patience)
        found = file_digest(partial)
    if found != sha256:
        partial.unlink()
        raise FetchError(f"{shown(url)}: {_wrong(found, sha256)}")
    os.replace(partial, place)
    return place


def shown(url: str) -> str:
    """The URL without user, password or query: it may hold secrets, and messages end up in logs."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _from_mirror(corpus: str, pinned: Pinned, place: Path, route: Route) -> Path:
    names = _mirror_names(corpus, pinned)
    for name in names:
        if route.mirror.startswith(("http://", "https://")):
            try:
                return download(f"{route.mirror.rstrip('/')}/{name}", route.web, place, pinned.sha256, route.patience)
            except _Missing:
                continue
        if (path := Path(route.mirror, name)).is_file():
            if (found := file_digest(path)) != pinned.sha256:
                raise FetchError(f"{path}: {_wrong(found, pinned.sha256)}")
            return path
    raise FetchError(f"{shown(route.mirror)} has none of {', '.join(names)}")


def _mirror_names(corpus: str, pinned: Pinned) -> list[str]:
    last = PurePosixPath(pinned.name).name
    ending = re.search(r"(\.(tar|json|jsonl|txt))?\.\w+$", last)
    return list(dict.fromkeys([pinned.name, *pinned.aliases, last, f"{corpus}{ending[0] if ending else ''}"]))


def _wrong(found: str, wanted: str) -> str:
    return f"sha256 is {found[:12]}…, wanted {wanted[:12]}…; refused"


class _Missing(FetchError):
    """The server answers, and does not have the file."""


def _transfer_patiently(url: str, get: Get, partial: Path, patience: Patience) -> bool:
    """True when some of the bytes came from an earlier attempt."""
    retrying = Retrying(
        stop=stop_after_attempt(patience.attempts),
        wait=wait_exponential(multiplier=patience.backoff, max=LONGEST_PAUSE),
        retry=retry_if_exception_type(Interrupted),
        reraise=True,
    )
    try:
        return retrying(_transfer, url, get, partial)
    except Interrupted as error:
        raise FetchError(f"{shown(url)}: {error}, in each of {patience.attempts} attempts") from None


def _transfer(url: str, get: Get, partial: Path) -> bool:
    """One attempt at the rest of the file; true when there was a beginning already. Raises Interrupted, leaving what came."""
    start = partial.stat().st_size if partial.exists() else 0
    with closing(_open(url, get, start)) as response:
        if response.status_code == 416:
            partial.unlink()
            raise Interrupted(f"cannot resume at byte {start}")
        if not (response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")):
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            partial.open("ab" if start else "wb") as file,
            progress.bar(total=total, initial=start, desc=partial.stem, unit="B", unit_scale=True, leave=False) as bar,
        ):
            for chunk in _chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and (size := partial.stat().st_size) != total:
        raise Interrupted(f"ended at {size:,} of {total:,} bytes")
    return start > 0


def _open(url: str, get: Get, start: int) -> Response:
    # A compressed transfer would count other bytes than the file has.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = get(url, headers)
    except OSError as error:
        raise Interrupted(f"no connection ({type(error).__name__})") from error
    if (status := response.status_code) < 400 or (status == 416 and start):
        return response
    response.close()
    if status >= 500 or status in BUSY:
        raise Interrupted(f"HTTP {status}")
    raise (_Missing if status in (404, 410) else FetchError)(f"{shown(url)}: HTTP {status}")


def _chunks(response: Response) -> Iterator[bytes]:
    try:
        yield from response.iter_content(CHUNK)
    except OSError as error:
        raise Interrupted(f"the connection broke ({type(error).__name__})") from error
