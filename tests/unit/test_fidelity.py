"""Decode steps compared with exact search off the serving path, and calibration that follows generation."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.unit.indexed_ring import LAYERS, SEGMENT, IndexedRing, layout
from vllm_retrieval_attn.attention.fidelity import NOTE_EVERY, DecodeSampler
from vllm_retrieval_attn.index.segment import HEAD_SHARE
from vllm_retrieval_attn.store.layout import (
    ACTOR_PROBES,
    ROW_BUDGET,
    ROW_INDEXED,
    ROW_RERANK,
    ROW_TABLE,
    ROW_TAIL,
    WORD_PROBES,
)
from vllm_retrieval_attn.store.segments import SegmentState
from vllm_retrieval_attn.workers import attended
from vllm_retrieval_attn.workers.attended import AttendedRows
from vllm_retrieval_attn.workers.prober import Prober
from vllm_retrieval_attn.workers.slab_work import drift


class Probed:
    """A ring with one indexed row of 900 tokens in layer 0 (layer 1 holds the same), and its probers."""

    def __init__(self, actors=1, budget=999_999, rerank=1 << 20):
        shape = layout(kv_heads=2, group=2, dim=16, dtype="bfloat16", actors=actors)
        self.ring = ring = IndexedRing(shape, "bfloat16")
        self.message, self.stored = ring.fill(0, [900], 11)
        ring.pages[:, 1] = ring.pages[:, 0]
        ring.index_rows(self.message)
        self.message[:, ROW_BUDGET], self.message[:, ROW_RERANK], self.message[:, ROW_TAIL] = budget, rerank, 0
        ring.start_all()
        self.refreshed = []
        self.sampler = DecodeSampler(shape, ring.views, 1.0, self.refreshed.append)
        self.probers = [  # each with scratch memory of its own, as in the actors
            Prober(shape, ring.views, actor, ring.scale, AttendedRows(shape, ring.views, ring.scale))
            for actor in range(actors)
        ]
        torch.manual_seed(1)
        self.paged, self.paged_lse = torch.randn(1, 4, 16), torch.randn(1, 4) + 5
        self.found = []

    def step(self):
        self.sampler.begin(SimpleNamespace(decode_rows=self.message))
        for layer in range(LAYERS):
            self.ring.client.post(layer, self.message)
            found, lse = self.ring.collect(1)
            self.found = [found, lse]
            if self.sampler.active:
                self.sampler.record(
                    layer, self.ring.queries[self.message[0, 2]][None], found.numpy(), lse.numpy(),
                    self.paged.numpy(), self.paged_lse.numpy(),
                )  # fmt: skip
        self.sampler.end()

    def wait(self):
        words, views = self.ring.views.words, self.ring.views
        deadline = time.monotonic() + 120
        for actor, prober in enumerate(self.probers):
            while words[views.actor_word(actor, ACTOR_PROBES)] != words[WORD_PROBES] and time.monotonic() < deadline:
                assert prober.is_alive()
                time.sleep(0.01)

    def close(self):
        for prober in self.probers:
            if prober.is_alive():
                prober.stop()
            prober._views = prober._pages = prober._attended = None
        self.sampler._views = None
        self.ring.close()


@pytest.fixture
def make():
    made = []

    def one(**options):
        made.append(Probed(**options))
        return made[-1]

    yield one
    for probed in made:
        probed.close()


@pytest.mark.parametrize("actors", [1, 2])
def test_a_full_search_is_found_to_be_exact(make, actors):
    probed = make(actors=actors)
    assert probed.sampler.figures() == {}
    for prober in probed.probers:
        prober.start()
    probed.step()
    probed.wait()
    figures = probed.sampler.figures()
    assert list(figures) == ["layers 0-0", "layers 1-1"]
    for figure in figures.values():
        assert figure["recall"] == 1.0
        assert figure["mass"] == pytest.approx(1.0, abs=1e-4)
        assert figure["output_error"] < 1e-3


def test_the_figures_are_those_of_brute_force(make):
    probed = make(budget=300_000, rerank=80)
    probed.probers[0].start()
    probed.step()
    probed.wait()
    want, want_lse = probed.ring.wanted(probed.message, probed.stored)
    got, got_lse = probed.found

    def merged(out, lse):
        both = torch.logaddexp(lse, probed.paged_lse)
        return out * (lse - both).exp()[..., None] + probed.paged * (probed.paged_lse - both).exp()[..., None]

    exact = merged(want.float(), want_lse.float())
    error = (merged(got, got_lse) - exact).norm(dim=2) / exact.norm(dim=2)
    figure = probed.sampler.figures()["layers 0-0"]
    assert figure["output_error"] == pytest.approx(float(error.mean()), abs=2e-4)
    assert 0.05 < figure["mass"] < 0.95
    # Without a tail the mass attended to is what the log-sum-exp lacks.
    assert figure["mass"] == pytest.approx(float((got_lse - want_lse).exp().mean()), abs=0.05)
    assert 0.1 < figure["recall"] < 1.0


def test_a_probe_whose_request_ended_does_not_count(make):
    probed = make()
    probed.step()
    probed.sampler.forget(int(probed.message[0, ROW_TABLE]))
    probed.ring.views.pages[:] = 0xFF
    probed.probers[0].start()
    probed.wait()
    assert probed.sampler.figures() == {}
    assert probed.ring.views.words[WORD_PROBES] == 1


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_request_that_ends_in_the_middle_of_a_probe_leaves_its_slabs_until_the_probe_is_done(make, when, monkeypatch):
    probed = make()
    (store,) = probed.ring.stores
    index, slabs = probed.ring.index, set(store.slabs.values())
    prober, ended = probed.probers[0], []

    def end():
        if not ended:
            probed.sampler.forget(store.slot)
            index.release(store)  # poisons the request's places in the tables
            assert index.used_slabs == 0
            ended.extend(iter(index._take_slab, None))  # all that there are to take

    search, unit = prober._attended, attended.attend_unit
    if when == "before":
        prober._attended = lambda *arguments: (end(), search(*arguments))[1]
    else:  # the tables have been copied
        monkeypatch.setattr(attended, "attend_unit", lambda *arguments: (end(), unit(*arguments))[1])
    probed.step()
    prober.start()
    probed.wait()
    assert ended
    assert slabs
    assert not slabs & set(ended)
    assert probed.sampler.figures() == {}
    assert set(iter(index._take_slab, None)) == slabs


def test_one_probe_at_a_time(make):
    probed = make()
    probed.step()
    probed.step()
    assert probed.ring.views.words[WORD_PROBES] == 1
    probed.probers[0].start()
    probed.wait()
    probed.step()
    assert probed.ring.views.words[WORD_PROBES] == 2


def test_a_row_without_index_is_not_probed(make):
    probed = make()
    probed.message[0, ROW_INDEXED] = 0
    probed.step()
    assert probed.ring.views.words[WORD_PROBES] == 0


def test_generated_queries_replace_the_samples_and_have_the_calibration_looked_at(make):
    probed = make()
    slot, views, samples = int(probed.message[0, ROW_TABLE]), probed.ring.views, probed.ring.layout.samples
    views.samples[slot] = np.nan
    for _ in range(NOTE_EVERY * samples - 1):
        probed.sampler.begin(SimpleNamespace(decode_rows=probed.message))
        for layer in range(LAYERS) if probed.sampler.active else ():
            queries = probed.ring.queries[probed.message[0, 2]][None]
            one = torch.zeros(1, 4)
            probed.sampler.record(layer, queries, one[..., None].expand(-1, -1, 16).numpy(), one.numpy(),
                                  probed.paged.numpy(), probed.paged_lse.numpy())  # fmt: skip
        probed.sampler.end()
    assert probed.refreshed == []
    probed.step()
    assert probed.refreshed == [slot]
    wanted = probed.ring.queries[probed.message[0, 2]].float().reshape(2, 2, 1, 16).expand(-1, -1, samples, -1)
    for layer in range(LAYERS):
        torch.testing.assert_close(torch.from_numpy(views.samples[slot, layer].copy()), wanted.contiguous())
    assert np.isfinite(views.sample_lse[slot]).all()


def shares(ring, slab):
    lay = ring.layout
    base = lay.slabs_offset - lay.turns_offset + slab * lay.segment_slab_bytes
    return [ring.views.index64[(base + i * lay.slab_bytes) // 8 + HEAD_SHARE] for i in range(LAYERS * lay.kv_heads)]


def test_a_calibration_is_made_anew_where_queries_have_drifted(make):
    probed = make()
    ring, slot = probed.ring, int(probed.message[0, ROW_TABLE])
    (store,) = ring.stores
    slab = store.slabs[0]
    assert store.segments[0].state is SegmentState.INDEXED
    assert shares(ring, slab) == [1.0] * 4  # no samples then: everything is scanned
    keys = ring.stored_keys = probed.stored[0][:, 0].float()
    # Queries along one key: its leaf holds the mass, a small share is enough.
    views = ring.views
    queries = torch.stack([keys[h, :SEGMENT][[5, 50, 100, 200]] * 8 for h in range(2)]).numpy()
    views.samples[slot] = queries[:, None]
    for head in range(2):
        scores = torch.from_numpy(queries[head]) @ keys[head].T * ring.scale
        views.sample_lse[slot, :, head] = scores.logsumexp(1).numpy()

    def refresh():
        before = views.words[views.actor_word(0, 1)]
        ring.index.refresh(store)
        deadline = time.monotonic() + 30
        while views.words[views.actor_word(0, 1)] < before + 3 and time.monotonic() < deadline:
            time.sleep(0.002)

    views.moments[slot] = np.eye(16) * float((queries**2).mean())
    refresh()
    assert shares(ring, slab) == [1.0] * 4  # they look like the prompt's
    views.moments[slot] = np.eye(16)
    refresh()
    assert max(shares(ring, slab)) < 1.0
    assert ring.index.refreshes == 6


def test_drift_of_queries_from_their_own_moment_is_none():
    torch.manual_seed(0)
    queries = torch.randn(3, 4000, 8) @ torch.randn(3, 8, 8)
    moment = queries.mT @ queries / 4000
    torch.testing.assert_close(drift(moment, queries), torch.ones(3, dtype=torch.float64), atol=0.1, rtol=0)
    torch.testing.assert_close(drift(moment, 2 * queries), torch.full((3,), 4.0).double(), atol=0.4, rtol=0)
