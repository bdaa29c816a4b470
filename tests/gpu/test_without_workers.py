# SPDX-License-Identifier: Apache-2.0
"""Requests that need the CPU workers while there are none: the GPU attends to all of the host itself, where it lies."""

import gc

import pytest
import torch

from tests.gpu.test_sketch_engine import far

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

LENGTHS = (6000, 700, 9000)
TOKENS = 12


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Log-probabilities of greedy tokens of LENGTHS, and steps that the workers were missing in, by way of serving."""
    pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_retrieval_attn.bench.decode import _prompt, write_shape
    from vllm_retrieval_attn.bench.engine import InProcessEngine

    folder = str(write_shape("tiny", tmp_path_factory.mktemp("shape")))
    prompts = [_prompt(length, 1000, seed) for seed, length in enumerate(LENGTHS)]
    knobs = {"host_memory_gb": 0.5}
    exact = {"extra_args": {"retrieval_exact": True}}
    ways = {
        "full": ("FLASH_ATTN", None, {}),
        "pages in the file": ("retrieval", {**knobs, "sketch_gb": 0, "rows": 9000, "max_rows": 9000}, {}),
        "pages in managed memory": ("retrieval", knobs, exact),
    }
    found = {}
    for name, (backend, given, more) in ways.items():
        engine = InProcessEngine(
            folder, given, backend, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=10_000, max_num_seqs=4, max_num_batched_tokens=2048, enable_prefix_caching=False, seed=0,
            kv_cache_memory_bytes=1 << 30,
        )  # fmt: skip
        sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False, "logprobs": 5}
        runs, steps = [engine.run(prompts, **sampling, **more)], []
        if given:
            worker = engine.worker()
            steps.append(worker.stats()["degraded_steps"])
            worker.pool.close()
            runs.append(engine.run(prompts, **sampling, **more))
            steps.append(worker.stats()["degraded_steps"])
            graphs = worker.stats()["graph_steps"]
            assert graphs >= 2 * TOKENS - 8 if name == "pages in the file" else graphs == 0
        found[name] = runs, steps
        engine.close()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


@pytest.mark.parametrize("way", ["pages in the file", "pages in managed memory"])
def test_answers_are_full_attentions(answers, way):
    (with_workers, without), steps = answers[way]
    assert steps[0] == 0
    assert steps[1] >= TOKENS - 4
    for run in (without, with_workers):
        for one, other in zip(answers["full"][0][0], run, strict=True):
            assert far(one, other) < 0.05
    assert [answer.retrieval["degraded_steps"] > 0 for answer in without] == [True, False, True]
