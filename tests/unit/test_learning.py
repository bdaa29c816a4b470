# SPDX-License-Identifier: Apache-2.0
"""The model's space: learned from what prompts bring, kept in a file, taken by actors."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.unit.layouts import make_layout
from vllm_retrieval_attn.device.learning import LEARN_TOKENS, SpaceLearner
from vllm_retrieval_attn.device.plan import StepPlan
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
    assert learner.enough
    space, wanted = learner.space(), reference(LEARN_TOKENS)
    assert space.heads == LAYERS * KV_HEADS
    np.testing.assert_allclose(space.mean, wanted.mean, rtol=1e-4, atol=1e-4)
    # Eigenvectors may turn; what counts is the metric that they make.
    for mine, theirs in ((space.keys, wanted.keys), (space.queries, wanted.queries)):
        mine, theirs = (part.swapaxes(1, 2) @ part for part in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0.05, atol=0.02 * np.abs(theirs).max())


def test_another_request_starts_anew_and_too_few_are_not_enough():
    learner = fed([LEARN_TOKENS - 100])
    assert not learner.enough
    fed([200], "b", learner)
    assert not learner.enough


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
    assert save_space(path, space, 7000)
    found = load_space(path, space.heads, DIM)
    assert found is not None
    again, learned_from = found
    assert learned_from == 7000
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
    save_space(path, space, 7000)
    assert load_space(path, space.heads + 1, DIM) is None


def test_a_folder_that_can_not_be_written_costs_no_more_than_a_warning():
    assert not save_space(Path("/proc/nowhere/space.npz"), fed([LEARN_TOKENS]).space(), 7000)


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
    space.look(())
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
    space.look(())
    assert arena.open("next", 1).space == ROTATION
    assert "no space is learned from this prompt" in caplog.text
    assert space._learner is not None
    assert not space._learner.enough
    assert not space.path.exists()


def step(space, rows):
    """A step of the given (request, computed, new tokens); returns the batch tokens that are learned from."""
    names, computed, lens = zip(*rows, strict=True)
    starts = np.concatenate(([0], np.cumsum(lens)))
    metadata = SimpleNamespace(
        request_ids=list(names), computed=np.array(computed), query_lens=np.array(lens), query_start=starts
    )
    plan = StepPlan()
    space.look(names)
    space.begin(metadata, plan)
    keys, queries = tokens(sum(computed), int(starts[-1]))
    for layer in range(LAYERS):
        space.add(layer, keys, queries, plan)
    return plan.learned


def test_a_prompt_is_learned_from_to_its_end_whatever_runs_beside_it(server):
    arena, space = server
    assert step(space, [("short", 0, 20)]) == (0, 0)
    assert step(space, [("short", 20, 1), ("long", 0, LEARN_TOKENS)]) == (1, LEARN_TOKENS + 1)
    assert step(space, [("other", 0, 2000), ("long", LEARN_TOKENS, 300)]) == (2000, 2300)
    assert arena.open("other", 1).space == ROTATION  # which does not end what is learned from the long one
    assert space._learner._tokens == LEARN_TOKENS + 300
    assert step(space, [("other", 2000, 500), ("long", LEARN_TOKENS + 300, 1)]) == (0, 0)
    assert arena.open("next", 1).space == LEARNED


def test_a_prompt_that_was_too_short_makes_room_for_another(server):
    arena, space = server
    assert step(space, [("a", 0, 1000)]) == (0, 1000)
    assert step(space, [("a", 1000, 1), ("b", 0, 900)]) == (1, 901)
    assert step(space, [("c", 0, LEARN_TOKENS)]) == (0, LEARN_TOKENS)
    space.finish()
    assert arena.open("next", 1).space == LEARNED


def test_requests_much_longer_than_what_was_learned_from_are_coded_in_the_rotation(server):
    arena, space = server
    space._learner = fed([LEARN_TOKENS])
    space.finish()
    assert arena.open("as long", 1, 2 * LEARN_TOKENS).space == LEARNED
    assert arena.open("longer", 1, 2 * LEARN_TOKENS + 1).space == ROTATION
