# SPDX-License-Identifier: Apache-2.0
"""The file of a capture: queries, keys and values of KV heads as bench/capture.py took them from a model.

It holds, for every KV head, arrays named
``<tag>_L<layer>_h<head>_<what>``, where ``what`` is one of:

====================  ===================  =============================================================================
``K``, ``V``          (P, d) float16       the prompt's keys (after RoPE) and values
``Qprompt``           (g, n, d) float16    queries (after RoPE) of the last n prompt tokens, by query head of the group
``Qprompt_strided``   (g, m, d) float16    earlier prompt queries, evenly spaced
``q``                 (g, t, d) float16    decode queries
``pos``               (t,) int64           their positions
``osw``               (g, t, d) float16    exact attention output over all that is not indexed: sink, window, and tokens
                                           after the prompt up to the query
``lsw``               (g, t) float32       its natural log-sum-exp
``sink_bound_scale``  (3,) float64         the indexed keys are ``K[sink:bound]``; softmax scale
====================  ===================  =============================================================================
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_ARRAYS = ("K", "V", "Qprompt", "Qprompt_strided", "q", "pos", "osw", "lsw", "sink_bound_scale")
_NAME = re.compile(rf"(.+_L\d+_h\d+)_({'|'.join(_ARRAYS)})")


@dataclass
class Head:
    """One KV head of a capture; shapes and dtypes are in this module's docstring."""

    name: str
    K: npt.NDArray[np.float16]
    V: npt.NDArray[np.float16]
    Qprompt: npt.NDArray[np.float16]
    Qprompt_strided: npt.NDArray[np.float16]
    q: npt.NDArray[np.float16]
    pos: npt.NDArray[np.int64]
    osw: npt.NDArray[np.float16]
    lsw: npt.NDArray[np.float32]
    sink: int
    bound: int
    scale: float


def save(path: Path, heads: list[Head]) -> None:
    """Write a capture."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for head in heads:
        for what in _ARRAYS[:-1]:
            arrays[f"{head.name}_{what}"] = getattr(head, what)
        arrays[f"{head.name}_sink_bound_scale"] = np.array([head.sink, head.bound, head.scale], np.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # a path would get .npz appended where it has another suffix
        # NumPy types the names of arrays as its own options.
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> list[Head]:
    """The heads of a capture, in the file's order.

    Raises:
        ValueError: the file is not a capture.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an .npz file"
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: not an .npz file")
    with file:
        found: dict[str, set[str]] = {}
        for array in file.files:
            if match := _NAME.fullmatch(array):
                found.setdefault(match[1], set()).add(match[2])
        if not found:
            raise ValueError(f"{path}: not a capture: it has no array named <tag>_L<layer>_h<head>_K")
        heads = []
        for name, names in found.items():
            if missing := [what for what in _ARRAYS if what not in names]:
                raise ValueError(f"{path}: {name} lacks {', '.join(missing)}")
            data = {what: file[f"{name}_{what}"] for what in _ARRAYS}
            if wrong := _misshapen(data):
                raise ValueError(f"{path}: {name}_{wrong} has shape {data[wrong].shape}, which does not fit the others")
            sink, bound, scale = (float(value) for value in data.pop("sink_bound_scale"))
            if not 0 <= sink < bound <= len(data["K"]):
                raise ValueError(f"{path}: {name}: K[{sink:.0f}:{bound:.0f}] of {len(data['K'])} keys is no range")
            heads.append(Head(name, **data, sink=int(sink), bound=int(bound), scale=scale))
    return heads


def _misshapen(data: dict[str, npt.NDArray[Any]]) -> str | None:
    """The first array whose shape contradicts K's and q's, if one does."""
    keys, queries = data["K"].shape, data["q"].shape
    if len(keys) != 2:
        return "K"
    if len(queries) != 3 or queries[2] != keys[1]:
        return "q"
    for what in ("Qprompt", "Qprompt_strided"):
        shape = data[what].shape
        if len(shape) != 3 or (shape[0], shape[2]) != (queries[0], queries[2]):
            return what
    expected = {"V": keys, "pos": queries[1:2], "osw": queries, "lsw": queries[:2], "sink_bound_scale": (3,)}
    return next((what for what, shape in expected.items() if data[what].shape != shape), None)
