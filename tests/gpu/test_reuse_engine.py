# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin alike, on a GPU: what is kept on the host, codes included, gives full attention's answers."""

import gc

import pytest
import torch

from tests.gpu.test_sketch_engine import far

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DOCUMENT, QUESTION, TOKENS, AT_ONCE = 9000, 50, 16, 6


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Answers to a document, twice; to another question on it; to several at once on a new one; and after all codes
    were lost."""
    pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_retrieval_attn.bench.decode import _prompt, write_shape
    from vllm_retrieval_attn.bench.engine import InProcessEngine

    folder = str(write_shape("tiny", tmp_path_factory.mktemp("shape")))
    document, other, third = (_prompt(DOCUMENT, 1000, seed) for seed in range(3))
    questions = [_prompt(QUESTION, 1000, 100 + seed) for seed in range(AT_ONCE)]
    knobs = {"host_memory_gb": 0.2, "rows": 1 << 15, "max_rows": 1 << 15, "poison_freed": True}
    # A pool of 20 pages of codes: a document takes nine, so three of them push each other out.
    ways = {
        "full": ("FLASH_ATTN", None),
        "kept": ("retrieval", knobs),
        "codes lost": ("retrieval", {**knobs, "sketch_gb": 0.0056}),
    }
    found = {}
    for name, (backend, given) in ways.items():
        engine = InProcessEngine(
            folder, given, backend, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=10_000, max_num_seqs=8, max_num_batched_tokens=2048, enable_prefix_caching=given is not None,
            seed=0, kv_cache_memory_bytes=1 << 30,
        )  # fmt: skip
        sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False, "logprobs": 5}
        runs = [
            engine.run([prompt], **sampling)
            for prompt in (document, document, document + questions[0], third, document[:5000] + questions[1])
        ]
        runs.append(engine.run([other + question for question in questions], **sampling))
        runs.append(engine.run([document + questions[2]], **sampling))
        found[name] = runs
        if given:
            worker = engine.worker()
            assert worker.arena.used_pages == worker.arena.used_codes() == 0
        engine.close()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


@pytest.mark.parametrize("way", ["kept", "codes lost"])
def test_answers_are_full_attentions(answers, way):
    for one, other in zip(answers["full"], answers[way], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert far(mine, theirs) < 0.05


def test_prompts_begin_where_they_part(answers):
    cached = [[answer.retrieval["cached_tokens"] for answer in run] for run in answers["kept"]]
    assert cached[:5] == [[0], [8992], [9000 // 16 * 16], [0], [4992]]
    assert sorted(cached[5])[:2] == [0, 8992]
    assert {answer.retrieval["path"] for run in answers["kept"] for answer in run} == {"sketch"}
