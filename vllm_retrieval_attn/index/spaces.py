"""The space that codes and clusters live in: attention scores survive, coding noise hurts them least.

For an invertible T, ``q . k = (T^-T q) . (T k)``, so keys may be coded in any space as long as queries go along. The
balanced space takes ``T = R M^1/2`` with ``M = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2``, the geometric mean of the
queries' second moment Sq and the inverse covariance Sk of the keys: among all T it minimises the score error that
noise of equal size in every dimension causes, summed over both sides. R is any rotation; a random one makes dimensions
alike.
"""

from functools import cache

import numpy as np
import torch

from vllm_retrieval_attn.index.blas import one_blas_thread

RIDGE = 1e-3
"""Share of the mean variance added to every dimension, so that few queries do not make a direction free."""


def _ridged(matrix: torch.Tensor) -> torch.Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    return matrix + RIDGE * mean[..., None, None] * torch.eye(
        matrix.shape[-1], dtype=matrix.dtype, device=matrix.device
    )


@cache
def rotation(dim: int) -> torch.Tensor:
    """A fixed random orthogonal matrix, (dim, dim) float64."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.from_numpy(np.linalg.qr(noise.numpy())[0])


def query_transform(keys: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The transform of queries into the balanced space; its inverse transpose is that of keys.

    Args:
        keys: (H, n, d) keys of H heads. moment: (H, d, d) second moment of their queries, E[q q^T].

    Returns:
        (H, d, d) float32, for column vectors: ``q~ = T^-T q``.
    """
    centred = keys.float() - keys.float().mean(1, keepdim=True)
    spread, moment = (part.cpu().double() for part in (centred.mT @ centred / keys.shape[1], moment))
    # By NumPy, as in Spaces.of of index/build.py; of a GPU's keys, too: there each matrix is decomposed by many small
    # kernels, one matrix after the other, each of which waits for what else the GPU does.
    one_blas_thread()
    root = torch.from_numpy(np.linalg.cholesky(_ridged(spread).numpy()))
    found = np.linalg.eigh((root.mT @ _ridged(moment) @ root).numpy())
    # With Sk = L L^T and L^T Sq L = U w U^T, M is L^-T U w^1/2 U^T L^-1: M^1/2 is w^1/4 U^T L^-1 but for a rotation.
    values, vectors = (torch.from_numpy(part) for part in found)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-7)
    turned = rotation(keys.shape[-1]) * values.pow(-0.25)[..., None, :]
    return (turned @ vectors.mT @ root.mT).float().to(keys.device)
