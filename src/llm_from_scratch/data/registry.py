"""Files of a Python package registry, found and fetched by pip itself but neither built nor installed.

`pip download` would run the build script of a source distribution, so pip is asked for its finder and its session instead: the index,
mirrors, certificates, proxies and passwords a person has set up for pip then hold here too, and no registry's host is written down.
These are pip's internals, the same from pip 23 to 26; only this module touches them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_from_scratch.data.fetch import FetchError, Get, Response


@dataclass(frozen=True)
class Registry:
    """`find(package, version, file, sha256)` gives the URL of a file, `get` opens it."""

    find: Callable[[str, str, Literal["sdist", "wheel"], str], str]
    get: Get


def pip_registry(arguments: Sequence[str], attempts: int, timeout: float) -> Registry:
    """The registry pip is set up for; `arguments` are pip's own, such as --index-url. Raises FetchError where pip is not installed."""
    try:
        from pip._internal.commands.download import DownloadCommand
    except ImportError:
        raise FetchError("no pip in this environment; uv pip install pip") from None
    # Without a handler, Python itself would print pip's remarks on every index that lacks the package.
    logging.getLogger("pip").addHandler(logging.NullHandler())
    command = DownloadCommand("download", "")
    # Whole seconds, as pip counts; no cache, because what is fetched is kept by us.
    settings = ["--disable-pip-version-check", "--no-cache-dir", "--no-input", "--retries", str(attempts - 1)]
    options, _ = command.parse_args([*settings, "--timeout", str(max(1, round(timeout))), *arguments])
    finder = command._build_package_finder(options, command._build_session(options), ignore_requires_python=True)
    # Looking up retries inside pip; transfers retry in fetch, which can resume.
    session = command._build_session(options, retries=0)

    def find(package: str, version: str, file: Literal["sdist", "wheel"], sha256: str) -> str:
        candidates = finder.find_all_candidates(package)
        found = [each for each in candidates if str(each.version) == version and each.link.is_wheel == (file == "wheel")]
        if not candidates:
            raise FetchError(f"{package}=={version}: pip's index cannot be reached, or has no such package")
        if not found:
            there = ", ".join(sorted({each.link.filename for each in candidates}))
            raise FetchError(f"{package}=={version}: pip's index has no such {file}; it has {there}")
        return str(next((each.link for each in found if each.link.hash == sha256), found[0].link).url_without_fragment)

    def get(url: str, headers: Mapping[str, str]) -> Response:
        response: Response = session.get(url, headers=headers, stream=True)
        return response

    return Registry(find, get)
