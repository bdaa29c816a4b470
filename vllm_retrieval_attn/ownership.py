"""Who owns a token: the paged KV cache or the host arena.

Scheduler and worker derive the boundary with the functions below and nobody stores it, so
the two can not disagree. With ``S`` sink tokens, window ``W`` and block size ``B`` (tokens),
a row that has ``c`` computed tokens at schedule time is split into

    paged [0, S) | host [S, W0) | paged [W0, ...)      W0 = max(S, floor((c - W) / B) * B)

``S`` is rounded up to whole blocks first, so that both boundaries fall on block edges.
"""


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)


def sink_end(sink_tokens: int, block_size: int) -> int:
    """First token position after the sink region: ``sink_tokens`` in whole blocks."""
    return cdiv(sink_tokens, block_size) * block_size


def window_start(num_computed: int, sink_tokens: int, window_tokens: int, block_size: int) -> int:
    """``W0``: the first position of the recent window, for a row with ``num_computed`` tokens.

    Never decreases as ``num_computed`` grows, so a block that the scheduler freed on an older
    (smaller) count is never needed again.
    """
    aligned = (num_computed - window_tokens) // block_size * block_size
    return max(sink_end(sink_tokens, block_size), aligned)


def resident_blocks_bound(sink_tokens: int, window_tokens: int, in_flight_tokens: int, block_size: int) -> int:
    """Most blocks that a live request holds in the paged cache, whatever its length.

    ``in_flight_tokens`` (tokens scheduled and not yet settled) may start and end inside a
    block, and so may the window: one block more than the two lengths alone.
    """
    return cdiv(sink_tokens, block_size) + cdiv(window_tokens, block_size) + cdiv(in_flight_tokens, block_size) + 1


def never_leaves_pages(max_tokens: int, sink_tokens: int, window_tokens: int, block_size: int) -> bool:
    """Whether a request of at most ``max_tokens`` tokens never has a token on the host side."""
    last_step = max(0, max_tokens - 1)
    return window_start(last_step, sink_tokens, window_tokens, block_size) == sink_end(sink_tokens, block_size)
