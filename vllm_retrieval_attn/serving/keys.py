# SPDX-License-Identifier: Apache-2.0
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
        ValueError: it names both, an empty one, a file that can not be read, or a key that no header can carry.
    """
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value is not None and file is not None:
        raise ValueError(f"retrieval: set one of {name} and {name}_FILE, not both")
    if file is not None:
        try:
            value = Path(file).read_bytes().decode("latin-1")
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"retrieval: {name}_FILE={file} can not be read: {why}; name a file with a key, or unset it"
            ) from None
    if value is None:
        return None
    where = name if file is None else f"{name}_FILE={file}"
    value = value.strip()  # as that of a header is
    if not value:
        raise ValueError(f"retrieval: {where} is empty; set a key, or unset it")
    if not (value.isascii() and value.isprintable()):
        raise ValueError(f"retrieval: {where} has characters that no header carries; use letters and digits of ASCII")
    return value


def both_keys() -> tuple[str | None, str | None]:
    """The keys to view and to change.

    Raises:
        ValueError: one is no key, or they are the same.
    """
    view, admin = key_from(VIEW), key_from(ADMIN)
    if view is not None and view == admin:
        raise ValueError(f"retrieval: {VIEW} and {ADMIN} are the same, so who may view could change; set two keys")
    return view, admin


def requires(name: str, key: str | None) -> Callable[[str | None], None]:
    """A dependency of routes that want ``Authorization: Bearer KEY``; without a key they are off."""

    def check(authorization: Annotated[str | None, Header()] = None) -> None:
        if key is None:
            raise HTTPException(403, f"retrieval: this route is off; start the server with {name} set")
        given = (authorization or "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "retrieval: wrong or no key", {"WWW-Authenticate": "Bearer"})

    return check
