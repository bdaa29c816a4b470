"""The space that codes and clusters live in: attention scores survive, coding noise hurts them least.

For an invertible T, ``q . k = (T^-T q) . (T k)``, so keys may be coded in any space as long as queries go along. The
balanced space takes ``T = R M^1/2`` with ``M = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2``, the geometric mean of the
queries' second moment Sq and the inverse covariance Sk of the keys: among all T it minimises the score error that
noise of equal size in every dimension causes, summed over both sides. R is a random rotation, which makes dimensions
alike.
"""

from functools import cache

import numpy as np
import torch

RIDGE = 1e-3
"""Share of the mean variance added to every dimension, so that few queries do not make a direction free."""


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    if matrix.device.type == "cpu":  # by NumPy: see Spaces.of in index/build.py
        values, vectors = (torch.from_numpy(part) for part in np.linalg.eigh(matrix.numpy()))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-7)
    return (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT


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


def balanced(keys: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transforms of keys and queries into the balanced space.

    Args:
        keys: (H, n, d) keys of H heads. moment: (H, d, d) second moment of their queries, E[q q^T].

    Returns:
        (H, d, d) float32 each, for column vectors: ``y = to_keys @ (k - mean)``, ``q~ = to_queries @ q``.
    """
    dim = keys.shape[-1]
    centred = keys.float() - keys.float().mean(1, keepdim=True)
    spread = _ridged((centred.mT @ centred / keys.shape[1]).double())
    root = _power(spread, 0.5)
    inverse = _power(spread, -0.5)
    metric = inverse @ _power(root @ _ridged(moment.double()) @ root, 0.5) @ inverse
    turn = rotation(dim, keys.device)
    return (turn @ _power(metric, 0.5)).float(), (turn @ _power(metric, -0.5)).float()
