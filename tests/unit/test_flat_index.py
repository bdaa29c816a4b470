# SPDX-License-Identifier: Apache-2.0
"""FlatIndex against brute force in float64, and the import boundary of what is neither vLLM's nor Ray's."""

import ast
from pathlib import Path

import numpy as np
import pytest

import vllm_retrieval_attn
from vllm_retrieval_attn.baselines.flat import FlatIndex

NO_QUERIES = np.empty((1, 0, 1), np.float32)


@pytest.mark.parametrize(("dtype", "dim"), [(np.float32, 64), (np.float16, 80), (np.float16, 128)])
def test_flat_equals_brute_force_after_build_and_append(dtype, dim):
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 333, dim)).astype(dtype)
    queries = rng.standard_normal((3, dim)).astype(np.float32)
    index = FlatIndex(dim**-0.5, dim, dtype)
    assert (index.attend(queries)[1] == -np.inf).all()
    index.build(keys[:300], values[:300], NO_QUERIES)
    index.append(keys[300:], values[300:])
    scores = queries.astype(float) @ keys.astype(float).T * dim**-0.5
    found, rows = index.search(queries, 10)
    np.testing.assert_array_equal(rows, np.argsort(-scores, axis=1)[:, :10])
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :10], atol=1e-4)
    weights = np.exp(scores)
    out, lse = index.attend(queries)
    np.testing.assert_allclose(out, weights @ values.astype(float) / weights.sum(1)[:, None], atol=1e-5)
    np.testing.assert_allclose(lse, np.log(weights.sum(1)), atol=1e-5)
    assert index.touched.keys == 2 * 3 * 333


PACKAGE = Path(vllm_retrieval_attn.__file__).parent
PLAIN = {
    "core": {"core"},
    "sketch": {"sketch"},
    "index": {"core", "index", "sketch"},
    "baselines": {"baselines", "index", "sketch"},
    "store": {"core", "store", "sketch"},
}
"""Folders that know neither vLLM nor Ray, and what of the package they may import."""


@pytest.mark.parametrize("folder", PLAIN)
def test_plain_folders_import_neither_vllm_nor_ray_nor_what_does(folder):
    paths = list((PACKAGE / folder).glob("*.py"))
    assert len(paths) > 2
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"vllm", "ray"}, path.name
            ours = {name.split(".")[1] for name in names if name.startswith("vllm_retrieval_attn.")}
            assert ours <= PLAIN[folder], path.name
