# SPDX-License-Identifier: Apache-2.0
"""A model's learned space, kept from one start to the next in the cache folder."""

import contextlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np

from vllm_retrieval_attn.core.caches import cache_folder
from vllm_retrieval_attn.sketch.space import Space

logger = logging.getLogger("vllm.retrieval.memory")


def space_path(identity: str, rank: int, ranks: int) -> Path:
    """Where the space of a model's rank is kept."""
    return cache_folder() / "spaces" / f"{identity}-{rank}of{ranks}.npz"


def save_space(path: Path, space: Space, tokens: int) -> bool:
    """Keep a space, learned from ``tokens`` of a prompt. False where the folder can not be written, which costs the
    next start its learning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, mean=space.mean, keys=space.keys, queries=space.queries, tokens=tokens)
        partial.replace(path)
    except OSError as error:
        logger.warning("retrieval: the learned space can not be kept in %s: %s", path.parent, error)
        return False
    return True


def load_space(path: Path, heads: int, dim: int) -> tuple[Space, int] | None:
    """The space kept there and the tokens that it was learned from. None: there is none, or it does not fit and is
    removed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            space = Space(*(np.asarray(file[name], np.float32) for name in ("mean", "keys", "queries")))
            tokens = int(file["tokens"])
        shapes = space.mean.shape, space.keys.shape, space.queries.shape
        if shapes != ((heads, dim), (heads, dim, dim), (heads, dim, dim)):
            raise ValueError(f"shapes {shapes} are not those of {heads} KV heads of size {dim}")
        if not all(np.isfinite(part).all() for part in (space.mean, space.keys, space.queries)):
            raise ValueError("it holds numbers that are not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("retrieval: the learned space in %s is learned anew: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return space, tokens
