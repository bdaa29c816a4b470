# SPDX-License-Identifier: Apache-2.0
"""Which request each row of a batch belongs to.

vLLM does not tell an attention backend. compat.py wraps the place where each model runner builds
attention metadata and publishes the batch's request ids here, just before the builders run.
"""

_current: list[str] | None = None


def publish(request_ids: list[str] | None) -> None:
    """Request ids of the batch about to be built, in row order; None for a dummy or capture run."""
    global _current
    _current = None if request_ids is None else list(request_ids)


def current() -> list[str] | None:
    return _current
