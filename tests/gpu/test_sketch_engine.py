# SPDX-License-Identifier: Apache-2.0
"""Decode steps as one CUDA graph, in an engine: all rows read give what full attention gives; batches of all kinds."""

import gc

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

LENGTHS = (6000, 700, 5000, 90, 9000)
SHORT = (1000, 4096 - 8)
"""A batch that no row of attends to the host, until one of them leaves its resident tokens behind."""
TOKENS = 24


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Log-probabilities of greedy tokens in one batch of LENGTHS, by way of serving."""
    pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_retrieval_attn.bench.decode import _prompt, write_shape
    from vllm_retrieval_attn.bench.engine import InProcessEngine

    folder = str(write_shape("tiny", tmp_path_factory.mktemp("shape")))
    prompts = [_prompt(length, 1000, seed) for seed, length in enumerate(LENGTHS)]
    short = [_prompt(length, 1000, seed) for seed, length in enumerate(SHORT)]
    knobs = {"host_memory_gb": 0.5, "rows": 1 << 15, "max_rows": 1 << 15, "poison_freed": True}
    ways = {
        "full": ("FLASH_ATTN", None),
        "sketch": ("retrieval", knobs),
        "sampled": ("retrieval", {**knobs, "rows": 256, "tau": 1e-5}),
        "tight": ("retrieval", {**knobs, "sketch_gb": 0.002}),
    }
    found = {}
    for name, (backend, given) in ways.items():
        engine = InProcessEngine(
            folder, given, backend, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=10_000, max_num_seqs=8, max_num_batched_tokens=2048, enable_prefix_caching=False, seed=0,
            kv_cache_memory_bytes=1 << 30,
        )  # fmt: skip
        sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False, "logprobs": 5}
        first = engine.run(prompts, **sampling)
        second = engine.run(prompts, **sampling)
        worker = engine.worker() if given else None
        before = worker.paged_steps if worker else 0
        third = engine.run(short, **sampling)
        steps = (worker.graph_steps, worker.paged_steps - before) if worker else (0, 0)
        found[name] = first, second, steps, third
        if worker:
            assert worker.arena.used_pages == worker.sketch.codes.used == 0
        engine.close()
        del engine, worker
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


def far(one, other):
    """Largest difference of log-probabilities, up to where greedy tokens part for good reason."""
    worst = 0.0
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        shared = a.keys() & b.keys()
        worst = max([worst, *(abs(a[token] - b[token]) for token in shared)])
        if max(a, key=a.get) != max(b, key=b.get):
            break
    return worst


def test_all_rows_read_in_graphs_give_full_attention(answers):
    for one, other in zip(answers["full"][0], answers["sketch"][0], strict=True):
        assert far(one, other) < 0.05
    assert answers["sketch"][2][0] >= 2 * (TOKENS - 4)


def test_what_steps_without_the_host_wrote_is_there_once_it_is_needed(answers):
    for one, other in zip(answers["full"][3], answers["sketch"][3], strict=True):
        assert far(one, other) < 0.05
    assert 4 <= answers["sketch"][2][1] <= 10
    assert [answer.retrieval["path"] for answer in answers["sketch"][3]] == ["paged", "sketch"]


def test_the_same_batch_gives_the_same_tokens(answers):
    for name in ("sketch", "sampled"):
        for one, other in zip(*answers[name][:2], strict=True):
            assert one.tokens == other.tokens


def test_responses_tell_the_path_and_the_rows(answers):
    paths = [answer.retrieval["path"] for answer in answers["sampled"][0]]
    assert paths == ["sketch", "paged", "sketch", "paged", "sketch"]
    for answer, path in zip(answers["sampled"][0], paths, strict=True):
        assert (answer.retrieval["rows_read"] > 0) == (path == "sketch")
        assert answer.retrieval["rows_read"] < 300


def test_what_the_pool_can_not_hold_is_searched_by_faiss(answers):
    paths = {answer.retrieval["path"] for answer in answers["tight"][0]}
    assert "faiss" in paths
    for one, other in zip(answers["full"][0], answers["tight"][0], strict=True):
        assert far(one, other) < 0.05
