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

RIDGE = 1e-3
"""Share of the mean variance added to every dimension, so that few queries do not make a direction free."""


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    if matrix.device.type == "cpu":  # by NumPy: see Spaces.of in index/build.py
        return torch.from_numpy(np.linalg.cholesky(matrix.numpy()))
    factor, _ = torch.linalg.cholesky_ex(matrix)  # does not wait for the GPU
    return factor


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if matrix.device.type == "cpu":
        values, vectors = np.linalg.eigh(matrix.numpy())
        return torch.from_numpy(values), torch.from_numpy(vectors)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _ridged(matrix: torch.Tensor) -> torch.Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    return matrix + RIDGE * mean[..., None, None] * torch.eye(
        matrix.shape[-1], dtype=matrix.dtype, device=matrix.device
    )


@cache
def rotation(dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A fixed random orthogonal matrix, (dim, dim) float64."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.from_numpy(np.linalg.qr(noise.numpy())[0]).to(device)


def query_transform(keys: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The transform of queries into the balanced space; its inverse transpose is that of keys.

    Args:
        keys: (H, n, d) keys of H heads. moment: (H, d, d) second moment of their queries, E[q q^T].

    Returns:
        (H, d, d) float32, for column vectors: ``q~ = T^-T q``.
    """
    centred = keys.float() - keys.float().mean(1, keepdim=True)
    root = _cholesky(_ridged((centred.mT @ centred / keys.shape[1]).double()))
    # With Sk = L L^T and L^T Sq L = U w U^T, M is L^-T U w^1/2 U^T L^-1: M^1/2 is w^1/4 U^T L^-1 but for a rotation.
    values, vectors = _eigh(root.mT @ _ridged(moment.double()) @ root)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-7)
    turned = rotation(keys.shape[-1], keys.device) * values.pow(-0.25)[..., None, :]
    return (turned @ vectors.mT @ root.mT).float()
