"""Builds and the forward pass take turns on the GPU: here they write into one list instead."""

import threading
import time

import pytest

from vllm_retrieval_attn.attention.build_gaps import LARGE, BuildGaps


class Gaps(BuildGaps):
    """Streams are lists of what their thread put on them: marks, and marks that they wait for."""

    def __init__(self):
        super().__init__()
        self.streams = {}

    def stream(self):
        return self.streams.setdefault(threading.get_ident(), [])

    def _mark(self):
        mark = object()
        self.stream().append(("mark", mark))
        return mark

    def _follow(self, event):
        self.stream().append(("wait", event))


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr("vllm_retrieval_attn.attention.build_gaps._PATIENCE_S", 60.0)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_build_runs_after_one_layer_and_before_the_next(patient):
    gaps = Gaps()
    gaps.before_layer(LARGE)  # a prefill is running

    def build():
        for _ in range(20):
            with gaps.gap():
                gaps.stream().append(("build",))

    thread = threading.Thread(target=build)
    thread.start()
    while thread.is_alive():
        gaps.before_layer(LARGE)
        gaps.stream().append(("layer",))
        time.sleep(0.001)
    thread.join()
    forward, builder = gaps.streams[threading.get_ident()], gaps.streams[thread.ident]
    assert [kind for kind, *_ in builder] == ["wait", "build", "mark"] * 20
    waits = [mark for kind, *rest in builder if kind == "wait" for mark in rest]
    ends = [mark for kind, *rest in builder if kind == "mark" for mark in rest]
    told = [entry for entry in forward if entry != ("layer",)]
    assert told == [entry for begin, end in zip(waits, ends, strict=True) for entry in (("mark", begin), ("wait", end))]
    for place, entry in enumerate(forward):
        if entry[0] == "mark":
            assert forward[place + 1][0] == "wait"  # no layer in between


@pytest.mark.parametrize("tokens", [None, 1, LARGE - 1])
def test_beside_small_batches_a_build_runs_as_it_comes(patient, tokens):
    gaps = Gaps()
    if tokens is not None:
        gaps.before_layer(LARGE)
        gaps.before_layer(tokens)
    with gaps.gap():
        pass
    assert gaps.streams == {}


def test_a_build_that_waits_goes_on_where_the_prefill_ends(patient):
    gaps = Gaps()
    gaps.before_layer(LARGE)
    done = threading.Event()

    def build():
        with gaps.gap():
            done.set()

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: gaps._wanted)
    assert not done.is_set()
    gaps.before_layer(1)
    assert done.wait(30)
    thread.join()
    assert gaps.streams == {}


def test_a_build_does_not_wait_for_a_prefill_that_stands_still():
    gaps = Gaps()
    gaps.before_layer(LARGE)
    with gaps.gap():
        pass
    gaps.before_layer(LARGE)  # nobody asks any more
    assert gaps.streams == {}


def test_the_forward_pass_does_not_wait_for_ever(patient, monkeypatch):
    monkeypatch.setattr("vllm_retrieval_attn.attention.build_gaps._LAUNCH_S", 0.05)
    gaps, go = Gaps(), threading.Event()
    gaps.before_layer(LARGE)

    def build():
        with gaps.gap():
            assert go.wait(30)

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: gaps._wanted)
    begin = time.monotonic()
    gaps.before_layer(LARGE)
    assert time.monotonic() - begin < 5
    go.set()
    thread.join()
    gaps.before_layer(LARGE)  # the late end belongs to no gap
    assert gaps.stream()[-1][0] == "mark"


def test_a_build_that_fails_ends_its_gap(patient):
    gaps = Gaps()
    gaps.before_layer(LARGE)
    failed = []

    def build():
        try:
            with gaps.gap():
                raise RuntimeError("no memory")
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: gaps._wanted)
    gaps.before_layer(LARGE)
    thread.join()
    assert failed
    assert gaps.stream()[-1][0] == "wait"
