"""Pages of the sketch on the GPU: which request has which. One page holds the codes of one arena page's tokens."""


class CodePages:
    """Gives pages out and takes them back; a request has all its host tokens coded, or none.

    Args:
        pages: capacity.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    def grow(self, held: list[int], need: int) -> bool:
        """Add to ``held`` until it has ``need`` pages. False, and nothing changed, if there are not so many."""
        more = need - len(held)
        if more > len(self._free):
            return False
        held.extend(self._free.pop() for _ in range(more))
        return True

    def release(self, held: list[int]) -> None:
        """Take back all of ``held``."""
        self._free.extend(reversed(held))
        held.clear()
