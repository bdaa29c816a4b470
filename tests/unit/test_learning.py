"""The model's space: learned from what prompts bring, kept in a file, taken by actors."""

import threading

import numpy as np
import pytest
import torch

from tests.unit.layouts import make_layout
from vllm_retrieval_attn.device.learning import LEARN_TOKENS, SpaceLearner
from vllm_retrieval_attn.plugin.model_space import ModelSpace
from vllm_retrieval_attn.sketch.space import LEARNED, ROTATION, Space, balanced
from vllm_retrieval_attn.store.arena import Arena
from vllm_retrieval_attn.store.space_file import load_space, save_space, space_path
from vllm_retrieval_attn.store.views import Views

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 64


def tokens(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    stretch = torch.logspace(-1, 1, DIM)
    return torch.randn(n, KV_HEADS, DIM) * stretch + 4, torch.randn(n, KV_HEADS * GROUP, DIM) / stretch


def fed(chunks: list[int], name: str = "a", learner: SpaceLearner | None = None, dtype=torch.float32) -> SpaceLearner:
    learner = learner or SpaceLearner(LAYERS)
    keys, queries = (part.to(dtype) for part in tokens(0, sum(chunks)))
    first = 0
    for chunk in chunks:
        learner.begin(name, chunk)
        for layer in range(LAYERS):
            learner.add(layer, keys[first : first + chunk] * (layer + 1), queries[first : first + chunk])
        first += chunk
    return learner


def reference(n: int) -> Space:
    parts = []
    keys, queries = (part.double().numpy() for part in tokens(0, n))
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            mine = keys[:, head] * (layer + 1)
            centred = mine - mine.mean(0)
            asked = queries.reshape(n, KV_HEADS, GROUP, DIM)[:, head].reshape(-1, DIM)
            parts.append((mine.mean(0), centred.T @ centred / n, asked.T @ asked / n))
    return balanced(*(np.stack(part) for part in zip(*parts, strict=True)))


@pytest.mark.parametrize("chunks", [[LEARN_TOKENS], [1000, 1000, 1000, 1096], [64] * 64])
def test_chunks_come_to_the_statistics_of_the_whole(chunks):
    learner = fed(chunks)
    assert learner.complete
    space, wanted = learner.space(), reference(LEARN_TOKENS)
    assert space.heads == LAYERS * KV_HEADS
    np.testing.assert_allclose(space.mean, wanted.mean, rtol=1e-4, atol=1e-4)
    # Eigenvectors may turn; what counts is the metric that they make.
    for mine, theirs in ((space.keys, wanted.keys), (space.queries, wanted.queries)):
        mine, theirs = (part.swapaxes(1, 2) @ part for part in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0.05, atol=0.02 * np.abs(theirs).max())


def test_another_request_starts_anew_and_too_few_are_not_enough():
    learner = fed([LEARN_TOKENS - 100])
    assert not learner.complete
    fed([200], "b", learner)
    assert not learner.complete


def test_keys_that_are_not_finite_are_refused():
    learner = SpaceLearner(1)
    keys, queries = tokens(0, LEARN_TOKENS)
    keys[5] = torch.nan
    learner.begin("a", LEARN_TOKENS)
    learner.add(0, keys, queries)
    with pytest.raises(ValueError, match="finite"):
        learner.space()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RETRIEVAL_CACHE", str(tmp_path))
    return tmp_path


def test_a_kept_space_is_found_by_the_next_start(folder):
    space = fed([LEARN_TOKENS]).space()
    path = space_path("model", 0, 1)
    assert folder in path.parents
    assert load_space(path, space.heads, DIM) is None
    assert save_space(path, space)
    again = load_space(path, space.heads, DIM)
    assert again is not None
    for name in ("mean", "keys", "queries"):
        assert np.array_equal(getattr(again, name), getattr(space, name))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_a_broken_file_is_removed_and_learned_anew(folder, content):
    path = space_path("model", 0, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert load_space(path, 4, DIM) is None
    assert not path.exists()


def test_a_space_of_another_shape_is_not_taken(folder):
    space = fed([LEARN_TOKENS]).space()
    path = space_path("model", 0, 1)
    save_space(path, space)
    assert load_space(path, space.heads + 1, DIM) is None


def test_a_folder_that_can_not_be_written_costs_no_more_than_a_warning(monkeypatch):
    monkeypatch.setenv("VLLM_RETRIEVAL_CACHE", "/proc/nowhere")
    assert not save_space(space_path("model", 0, 1), fed([LEARN_TOKENS]).space())


def test_the_shared_file_carries_each_head_its_own():
    layout = make_layout(kv_heads=KV_HEADS, group=GROUP, dim=DIM, layers=LAYERS, indexed=True)
    views = Views(layout, bytearray(layout.file_bytes))
    space = fed([LEARN_TOKENS]).space()
    views.keep_space(space)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            one = views.learned_space(layer, head)
            number = layer * KV_HEADS + head
            assert np.array_equal(one.mean, space.mean[number])
            assert np.array_equal(one.keys, space.keys[number])
            assert np.array_equal(one.queries, space.queries[number])


# ---- the space of a server


class Slow(SpaceLearner):
    """Waits until it may go on."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.go = threading.Event()

    def space(self) -> Space:
        assert self.go.wait(30)
        return super().space()


@pytest.fixture
def server(folder):
    """An arena and its ModelSpace, which has learned nothing yet."""
    layout = make_layout(kv_heads=KV_HEADS, group=GROUP, dim=DIM, layers=LAYERS, indexed=True)
    arena = Arena(layout, torch.float32, 91)
    yield arena, ModelSpace(space_path("model", 0, 1), arena, None, 0)
    arena.close()


def test_the_prompt_that_is_learned_from_does_not_wait_and_the_next_request_does(server):
    arena, space = server
    learner = space._learner = fed([LEARN_TOKENS], learner=Slow(LAYERS))
    assert arena.open("first", 1).space == ROTATION
    space.end()
    assert arena.open("first", 1).space == ROTATION
    assert not space.path.exists()
    threading.Timer(0.2, learner.go.set).start()
    assert arena.open("second", 1).space == LEARNED
    assert space.path.exists()
    wanted = fed([LEARN_TOKENS]).space()
    assert np.array_equal(arena.views.learned_space(1, 0).keys, wanted.keys[KV_HEADS])
    assert arena.requests["first"].space == ROTATION


def test_what_can_not_be_learned_from_is_said_and_the_next_prompt_is_tried(server, caplog):
    arena, space = server
    learner = space._learner = SpaceLearner(LAYERS)
    keys, queries = tokens(0, LEARN_TOKENS)
    keys[5] = torch.nan
    learner.begin("a", LEARN_TOKENS)
    for layer in range(LAYERS):
        learner.add(layer, keys, queries)
    space.end()
    assert arena.open("next", 1).space == ROTATION
    assert "no space is learned from this prompt" in caplog.text
    assert space._learner is not None
    assert not space._learner.complete
    assert not space.path.exists()
