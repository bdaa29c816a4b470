"""How a request wants the host searched: the knobs' defaults, and what it overrides through ``vllm_xargs``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_retrieval_attn.config import COMPARED, COMPARED_BUDGET

if TYPE_CHECKING:
    from vllm_retrieval_attn.config import RetrievalConfig

NAMES = ("retrieval_budget", "retrieval_rerank", "retrieval_tail")
"""Keys of ``extra_args`` (``vllm_xargs`` over HTTP) that a request may set."""


@dataclass(frozen=True)
class SearchOptions:
    """Attributes:
    budget: share of the host keys to scan, 1: exact attention over all of them; 0: as calibrated for each KV head.
    rerank: keys attended to exactly for each KV head. tail: estimate what is not.
    """

    budget: float = 0.0
    rerank: int = 800
    tail: bool = True


def search_options(config: "RetrievalConfig", extra_args: dict[str, Any] | None) -> SearchOptions:
    """The options of a request.

    Raises:
        ValueError: one line that names the argument.
    """
    given = {name: value for name, value in (extra_args or {}).items() if name.startswith("retrieval_")}
    unknown = sorted(given.keys() - set(NAMES))
    if unknown:
        raise ValueError(f"retrieval: unknown request argument {unknown[0]!r}; known are {', '.join(NAMES)}")
    if given and config.index in ("flat", "none"):
        raise ValueError(
            f"retrieval: {sorted(given)[0]} has no meaning with index={config.index!r}; drop it from the request"
        )
    compared = config.index in COMPARED
    for name in ("retrieval_rerank", "retrieval_tail"):
        if compared and name in given:
            raise ValueError(f"retrieval: {name} has no meaning with index={config.index!r}; drop it from the request")
    budget = given.get("retrieval_budget", config.budget or (COMPARED_BUDGET if compared else 0.0))
    if not _is_number(budget) or not 0 <= budget <= 1:
        raise ValueError(f"retrieval: retrieval_budget={budget!r} must be a number from 0 (as calibrated) to 1 (exact)")
    if compared and budget == 0:
        raise ValueError(f"retrieval: retrieval_budget must be above 0 with index={config.index!r}")
    rerank = given.get("retrieval_rerank", config.rerank)
    if not _is_number(rerank) or rerank != int(rerank) or not 1 <= rerank <= 1 << 20:
        raise ValueError(f"retrieval: retrieval_rerank={rerank!r} must be a whole number from 1 to {1 << 20}")
    tail = given.get("retrieval_tail", config.tail)
    if tail not in (0, 1):
        raise ValueError(f"retrieval: retrieval_tail={tail!r} must be true or false (or 1 or 0)")
    return SearchOptions(float(budget), int(rerank), bool(tail))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
