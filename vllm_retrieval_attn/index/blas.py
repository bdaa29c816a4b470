"""NumPy's linear algebra on one thread: matrices here are small and many.

OpenBLAS would share each among all cores and have the threads wait for each other, busily, at every step. On a machine
whose cores have other work that takes several times as long as one thread does; on an idle one it gains nothing.
"""

from functools import cache
from typing import Any

import numpy  # noqa: F401 (loads the OpenBLAS that is to be found)
from threadpoolctl import ThreadpoolController


@cache
def _openblas() -> Any:
    return ThreadpoolController().select(internal_api="openblas")


def one_blas_thread() -> Any:
    """A context in which OpenBLAS takes one thread, in all threads of this process."""
    return _openblas().limit(limits=1)
