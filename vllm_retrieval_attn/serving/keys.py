"""Keys of the routes: one to view, one to change. Never vLLM's own, which clients of the model have."""

import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import Header, HTTPException

VIEW, ADMIN = "RETRIEVAL_VIEW_KEY", "RETRIEVAL_ADMIN_KEY"
"""Environment variables with the keys; with ``_FILE`` appended, with the name of a file that holds one."""


def key_from(name: str) -> str | None:
    """The key that the environment names, or None.

    Raises:
        ValueError: it names both, an empty one, or a file that can not be read.
    """
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value is not None and file is not None:
        raise ValueError(f"retrieval: set one of {name} and {name}_FILE, not both")
    if file is not None:
        try:
            value = Path(file).read_text().strip()
        except OSError as error:
            raise ValueError(f"retrieval: {name}_FILE={file} can not be read: {error.strerror}") from None
    if value is not None and not value:
        raise ValueError(f"retrieval: {name} is empty; set a key, or unset it")
    return value


def requires(name: str, key: str | None) -> Callable[[str | None], None]:
    """A dependency of routes that want ``Authorization: Bearer KEY``; without a key they are off."""

    def check(authorization: Annotated[str | None, Header()] = None) -> None:
        if key is None:
            raise HTTPException(403, f"retrieval: this route is off; start the server with {name} set")
        given = (authorization or "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "retrieval: wrong or no key", {"WWW-Authenticate": "Bearer"})

    return check
