# SPDX-License-Identifier: Apache-2.0
"""Ports and answers of a server on this machine."""

import contextlib
import random
import socket
import urllib.error
import urllib.request


def free_port() -> int:
    """One that nobody has and nobody is given: above Ray's workers' (10,002 to 19,999), below those of the system."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
