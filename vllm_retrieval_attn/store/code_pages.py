# SPDX-License-Identifier: Apache-2.0
"""Pages of the sketch on the GPU, given out and taken back. One page holds the codes of one arena page's tokens."""

from collections import Counter
from collections.abc import Iterable


class CodePages:
    """Counts who has a page. A request has all its host tokens coded, or none.

    Args:
        pages: capacity. together: pages that live requests may have together, one that several share counted for each
            of them: the kernels' workspace is made for that. Default: ``pages``.
    """

    def __init__(self, pages: int, together: int | None = None) -> None:
        self.pages, self.together = pages, pages if together is None else together
        self._free = list(range(pages - 1, -1, -1))
        self._users: Counter[int] = Counter()

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    def grow(self, held: list[int], need: int) -> bool:
        """Add to ``held`` until it has ``need`` pages. False, and nothing changed, if there are not so many."""
        more = need - len(held)
        if more > len(self._free):
            return False
        for _ in range(more):
            page = self._free.pop()
            self._users[page] = 1
            held.append(page)
        return True

    def share(self, pages: Iterable[int]) -> None:
        """Somebody else has them as well."""
        self._users.update(pages)

    def release(self, held: list[int]) -> None:
        """Take back all of ``held``; free is what nobody has any more."""
        for page in reversed(held):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free.append(page)
        held.clear()
