# SPDX-License-Identifier: Apache-2.0
"""Captured queries, keys and values against a model's own attention."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from vllm_retrieval_attn.bench import capture, capture_file, recorder
from vllm_retrieval_attn.device.merge import merge_partials
from vllm_retrieval_attn.evaluation import planting
from vllm_retrieval_attn.evaluation.needles import planted_document

VOCABULARY, HEADS, KV_HEADS, DIM = 512, 4, 2, 16
SINK, WINDOW, LENGTH = 8, 24, 150
GIVEN = {"sink": SINK, "window": WINDOW, "prompt_queries": 32, "answer_tokens": 3}


class Words:
    """A stub tokenizer: one token a word, by its hash; 1 stands first."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [2 + sum(word.encode()) % (VOCABULARY - 2) for word in text.split()]


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # attention far from uniform
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3, attn_implementation="eager")).eval()


@pytest.fixture(scope="module")
def gemma():
    """Sliding-window layers 0 and 2, a global one between."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        **SHAPE,
        num_hidden_layers=3,
        layer_types=kinds,
        sliding_window=20,
        query_pre_attn_scalar=7,
        attn_implementation="eager",
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    draw = torch.Generator().manual_seed(1)
    sizes = [LENGTH, 7, 5, 6]
    prompt, *questions, continuation = (
        torch.randint(2, VOCABULARY, (size,), generator=draw).tolist() for size in sizes
    )
    return planting.Tokens(prompt, questions, continuation)


def model_attention(model, layer, ids):
    """What the model's eager attention of ``layer`` gives for each token: (n, heads, d), before o_proj."""
    outputs = []
    attention = model.model.layers[layer].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    hook.remove()
    return outputs[0][0].unflatten(-1, (HEADS, DIM))


def full_attention(head):
    """The recipe of the file's format: (osw, lsw) merged with attention to the indexed keys; (g, t, d)."""
    keys, values = (torch.from_numpy(array[head.sink : head.bound]).float() for array in (head.K, head.V))
    scores = head.scale * torch.from_numpy(head.q).float() @ keys.T
    out, _ = merge_partials(
        torch.from_numpy(head.osw).float(),
        torch.from_numpy(head.lsw),
        torch.softmax(scores, -1) @ values,
        torch.logsumexp(scores, -1),
    )
    return out


@pytest.mark.parametrize(("name", "layers"), [("llama", [0, 2]), ("gemma", [1])])
@pytest.mark.parametrize("chunk", [16, 64, LENGTH])
def test_merged_parts_equal_the_models_own_attention(name, layers, chunk, tokens, request):
    model = request.getfixturevalue(name)
    heads, answers = capture.capture_tokens(model, tokens, "tiny", layers=layers, chunk=chunk, **GIVEN)
    assert [head.name for head in heads] == [f"tiny_L{layer}_h{h}" for layer in layers for h in range(KV_HEADS)]
    # Which tokens each decode query follows: the first answer token comes from the question's last.
    runs = [tokens.prompt + q + answer for q, answer in zip(tokens.questions, answers, strict=True)]
    runs.append(tokens.prompt + tokens.continuation)
    positions = [range(len(run) - GIVEN["answer_tokens"] - 1, len(run) - 1) for run in runs[:-1]]
    positions.append(range(LENGTH, len(runs[-1])))
    for layer in layers:
        truth = [model_attention(model, layer, run)[at] for run, at in zip(runs, map(list, positions), strict=True)]
        expected = torch.cat(truth).transpose(0, 1).unflatten(0, (KV_HEADS, -1))
        for head in (head for head in heads if f"_L{layer}_" in head.name):
            assert head.pos.tolist() == [position for at in positions for position in at]
            got = full_attention(head)
            torch.testing.assert_close(got, expected[int(head.name[-1])], atol=1e-2, rtol=1e-2)
            # The test would see a part left out.
            assert (torch.from_numpy(head.osw).float() - got).abs().max() > 0.1


def test_answers_are_what_the_model_generates(llama, tokens):
    _, answers = capture.capture_tokens(llama, tokens, "tiny", layers=[1], chunk=64, **GIVEN)
    for question, answer in zip(tokens.questions, answers, strict=True):
        given = torch.tensor([tokens.prompt + question])
        expected = llama.generate(given, max_new_tokens=len(answer), do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answer == expected[0, given.shape[1] :].tolist()
    assert llama.config._attn_implementation == "eager"


@pytest.mark.parametrize(("name", "layer"), [("llama", 2), ("gemma", 1)])
def test_chunks_change_nothing(name, layer, tokens, request):
    model = request.getfixturevalue(name)
    whole, answers = capture.capture_tokens(model, tokens, "tiny", layers=[layer], chunk=LENGTH, **GIVEN)
    parts, answers_of_parts = capture.capture_tokens(model, tokens, "tiny", layers=[layer], chunk=33, **GIVEN)
    assert answers == answers_of_parts
    for one, other in zip(whole, parts, strict=True):
        for what, array in asdict(one).items():
            if isinstance(array, np.ndarray):
                np.testing.assert_allclose(asdict(other)[what], array, atol=4e-3, rtol=4e-3)
                assert asdict(other)[what].dtype == array.dtype


def test_prompt_queries_are_the_last_and_evenly_spaced_earlier_ones(llama, tokens):
    (all_queries,), _ = capture.capture_tokens(
        llama, tokens, "tiny", layers=[1], heads=[(1, 1)], **GIVEN | {"prompt_queries": LENGTH}
    )
    (head,), _ = capture.capture_tokens(llama, tokens, "tiny", layers=[1], heads=[(1, 1)], **GIVEN)
    assert all_queries.Qprompt.shape == (2, LENGTH, DIM)
    assert all_queries.Qprompt_strided.shape == (2, 0, DIM)
    np.testing.assert_array_equal(head.Qprompt, all_queries.Qprompt[:, -32:])
    strided = np.linspace(0, LENGTH - 33, 32).astype(int)
    np.testing.assert_array_equal(head.Qprompt_strided, all_queries.Qprompt[:, strided])
    assert (head.sink, head.bound) == (SINK, LENGTH - WINDOW)
    assert math.isclose(head.scale, DIM**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_in_halves(dtype, window):
    torch.manual_seed(0)
    n, m = 40, 90
    q, k, v = (torch.randn(1, h, t, DIM).to(dtype) for h, t in ((HEADS, n), (KV_HEADS, m), (KV_HEADS, m)))
    at, of = torch.arange(m - n, m)[:, None], torch.arange(m)
    mask = (of <= at) & (of > at - (window or m))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), mask, scale=0.3, enable_gqa=True
    )
    got = recorder.attend(q, k, v, 0.3, window)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


def test_file_round_trip(llama, tokens, tmp_path):
    heads, _ = capture.capture_tokens(llama, tokens, "some-model_1.5", layers=[0, 2], **GIVEN)
    path = tmp_path / "new" / "capture.npz"
    capture_file.save(path, heads)
    read = capture_file.load(path)
    assert len(read) == 4
    for one, other in zip(heads, read, strict=True):
        np.testing.assert_equal(asdict(other), asdict(one))
    with np.load(path) as file:
        assert file["some-model_1.5_L2_h1_sink_bound_scale"].tolist() == [SINK, LENGTH - WINDOW, DIM**-0.5]
        kinds = {name.removeprefix("some-model_1.5_L0_h0_"): array.dtype.name for name, array in file.items()}
    assert kinds["K"] == kinds["V"] == kinds["Qprompt"] == kinds["q"] == kinds["osw"] == "float16"
    assert (kinds["lsw"], kinds["pos"]) == ("float32", "int64")


def test_load_refuses_what_is_no_capture(llama, tokens, tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="No such file"):
        capture_file.load(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        capture_file.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="no array named"):
        capture_file.load(path)
    (head, *_), _ = capture.capture_tokens(llama, tokens, "tiny", layers=[0], **GIVEN)
    capture_file.save(path, [replace(head, V=head.V[1:])])
    with pytest.raises(ValueError, match="tiny_L0_h0_V has shape"):
        capture_file.load(path)
    capture_file.save(path, [replace(head, bound=LENGTH + 1)])
    with pytest.raises(ValueError, match=r"K\[8:151\] of 150 keys"):
        capture_file.load(path)
    with np.load(path) as file:
        np.savez(path, **{name: array for name, array in file.items() if not name.endswith("_osw")})
    with pytest.raises(ValueError, match="tiny_L0_h0 lacks osw"):
        capture_file.load(path)


def test_layers_that_can_not_be_captured(llama, gemma):
    assert recorder.choose_layers(llama.config, None) == [0, 1, 2]
    assert recorder.choose_layers(gemma.config, None) == [1]
    assert recorder.choose_layers(LlamaConfig(num_hidden_layers=30), None) == [3, 11, 18, 26]
    assert recorder.choose_layers(llama.config, [2], [(0, 1)]) == [0, 2]
    with pytest.raises(ValueError, match=r"layer 2 is not a global attention layer; these are: \[1\]"):
        recorder.choose_layers(gemma.config, [1, 2])
    with pytest.raises(ValueError, match="KV head 2 is not there"):
        recorder.choose_layers(llama.config, None, [(0, 2)])
    with pytest.raises(ValueError, match="softcap"):
        recorder.Recorder([], [None], np.zeros(0, np.int64), 0, 1)(
            torch.nn.Identity(), *[torch.zeros(1, 1, 1, 8)] * 3, softcap=50.0
        )


def test_values_beyond_float16_are_refused(llama, tokens):
    weight = llama.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight.mul_(1e6)
    try:
        with pytest.raises(ValueError, match="keys or values of layer 0 do not fit float16"):
            capture.capture_tokens(llama, tokens, "tiny", layers=[0], **GIVEN)
    finally:
        with torch.no_grad():
            weight.div_(1e6)


def test_facts_stand_in_the_indexed_part():
    words = " ".join(f"word{number}" for number in range(3000))
    tokens, facts = planting.plant(Words(), words, 1000, sink=100, window=200, decode=20, count=4, seed=3)
    assert (len(tokens.prompt), len(tokens.continuation), len(tokens.questions)) == (1000, 20, 4)
    assert tokens.prompt[0] == 1
    for key, number, position in facts:
        fact = Words().encode(f"The special magic number for {key} is: {number}.", add_special_tokens=False)
        assert tokens.prompt[position : position + len(fact)] == fact
        assert 100 <= position < 800 - len(fact)
    plain = Words().encode(words)
    assert tokens.prompt[-200:] == plain[800:1000]
    assert tokens.continuation == plain[1000:1020]
    without, facts = planting.plant(Words(), words, 1000, sink=100, window=200, decode=20, count=0, seed=3)
    assert (without.prompt + without.continuation, facts) == (plain[:1020], [])


def test_too_little_text():
    with pytest.raises(ValueError, match="the text is too short: it has 50 tokens, 1019 are needed"):
        planting.plant(Words(), "word " * 50, 1000, sink=100, window=200, decode=20, count=4, seed=0)
    with pytest.raises(ValueError, match="400 tokens are too few for 4 questions; at least 557"):
        planting.plant(Words(), "word " * 5000, 400, sink=100, window=200, decode=20, count=4, seed=0)
    with pytest.raises(ValueError, match="30 tokens leave none to index"):
        capture.capture_tokens(None, planting.Tokens([1] * 30, [], [1]), "tiny", layers=[0], **GIVEN)
    with pytest.raises(ValueError, match="no decode query"):
        capture.capture("", None, None, tokens=1000, questions=0, decode=0)


def test_planted_document_without_new_arguments_is_as_before():
    tokenizer = Words()
    document, facts = planted_document(tokenizer, 2000, 3, seed=5)
    longer, same = planted_document(tokenizer, 2000, 3, seed=5, tail=10)
    assert len(document) == 2000
    assert longer[:2000] == document
    assert (len(longer), same) == (2010, facts)
