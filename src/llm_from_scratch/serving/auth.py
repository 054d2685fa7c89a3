"""Who may ask: whoever bears the key, where there is one.

The key lies in a file, as container platforms hand out secrets; what is passed around is the file's path, so no parameter, image,
command line or log holds the key. One key for all is what it is: it tells no two clients apart.
"""

from __future__ import annotations

import hmac
from pathlib import Path

from llm_from_scratch.serving.errors import ApiError


def read_key(file: Path) -> str:
    """The key that `file` holds, on one line. Raises ValueError where there is none: a server that was to be closed never opens."""
    try:
        key = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain ASCII"
        raise ValueError(f"cannot read an API key from {file} ({reason}); write one line of letters and digits there") from None
    if not key or len(key.split()) > 1:
        raise ValueError(f"{file} holds {'more than one word' if key else 'no API key'}; write one line of letters and digits there")
    return key


def require_key(authorization: str, key: str) -> None:
    """Raises ApiError 401 where a header is not `Bearer` and the key; an empty `key` lets everybody in."""
    scheme, _, given = authorization.partition(" ")
    if key and not (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())):
        raise ApiError(401, "this server wants its API key, in the header Authorization: Bearer …", "invalid_api_key")
