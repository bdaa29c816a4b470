"""NumPy's linear algebra on one thread: matrices here are small and many.

OpenBLAS would share each among all cores and have the threads wait for each other, busily, at every step. On a machine
whose cores have other work that takes several times as long as one thread does; on an idle one it gains nothing.
"""

from functools import cache

import numpy  # noqa: F401 (loads the OpenBLAS that is to be found)
from threadpoolctl import ThreadpoolController


@cache
def one_blas_thread() -> None:
    """Set OpenBLAS, in this process and for good, to one thread; at the first call. A limit for a while would be
    undone by one thread while another still computes."""
    for library in ThreadpoolController().select(internal_api="openblas").lib_controllers:
        library.set_num_threads(1)
