"""Knobs: what is wrong is refused in one line that names the knob; defaults are filled in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_retrieval_attn import config
from vllm_retrieval_attn.config import RetrievalConfig, default_threads, parse, resolve

MODEL = {"bytes_per_token": 1000, "kv_heads": 4, "block_size": 16, "ranks": 1}


@pytest.fixture(autouse=True)
def ten_free_gigabytes(monkeypatch):
    monkeypatch.setattr(config, "available_memory", lambda: 10 * config.GB)


def refusal(call) -> str:
    """The message of the ValueError that ``call`` raises; one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert text.startswith("retrieval: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"sink": 5}, "sink"),
        ({"window_tokens": "many"}, "window_tokens"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"sink_tokens": 1.5}, "sink_tokens"),
        ({"segment_tokens": 100}, "segment_tokens"),
        ({"segment_tokens": 0}, "segment_tokens"),
        ({"index": "lsh"}, "index"),
        ({"host_memory_gb": 0}, "host_memory_gb"),
        ({"host_memory_gb": [1]}, "host_memory_gb"),
        ({"workers": 0}, "workers"),
        ({"threads": 0}, "threads"),
        ({"ray_address": 7}, "ray_address"),
        ({"worker_timeout_s": 0}, "worker_timeout_s"),
        ({"restart_timeout_s": None}, "restart_timeout_s"),
    ],
)
def test_a_bad_knob_is_refused_in_one_line_that_names_it(knobs, named):
    assert named in refusal(lambda: parse({"retrieval": knobs}))


def test_an_unknown_knob_is_answered_with_the_known_ones():
    text = refusal(lambda: parse({"retrieval": {"windw_tokens": 5}}))
    assert "windw_tokens" in text
    assert "window_tokens" in text


def test_several_bad_knobs_are_all_named():
    text = refusal(lambda: parse({"retrieval": {"sink_tokens": -1, "foo": 1}}))
    assert "sink_tokens" in text
    assert "foo" in text


@pytest.mark.parametrize("knobs", [5, "flat", [1], None])
def test_knobs_that_are_no_object_are_refused(knobs):
    assert "additional_config" in refusal(lambda: parse({"retrieval": knobs}))


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"retrieval": {}}])
def test_no_knobs_give_the_defaults(additional):
    assert parse(additional) == RetrievalConfig()


def test_more_workers_than_kv_heads_are_refused():
    assert "workers=5" in refusal(lambda: resolve(RetrievalConfig(workers=5), **MODEL))
    assert resolve(RetrievalConfig(workers=4), **MODEL).workers == 4


def test_more_host_memory_than_is_free_is_refused():
    assert "host_memory_gb=11" in refusal(lambda: resolve(RetrievalConfig(host_memory_gb=11), **MODEL))
    assert "host_memory_gb=9" in refusal(
        lambda: resolve(RetrievalConfig(host_memory_gb=9), spoken_for=2 * config.GB, **MODEL)
    )


@pytest.mark.parametrize("gigabytes", [1e-3, 1e-6])
def test_host_memory_without_room_for_a_page_is_refused(gigabytes):
    text = refusal(lambda: resolve(RetrievalConfig(host_memory_gb=gigabytes), **MODEL))
    assert "host_memory_gb" in text
    assert "segment_tokens" in text


def test_a_machine_without_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(config, "available_memory", lambda: 3 * config.GB)
    assert "host_memory_gb" in refusal(lambda: resolve(RetrievalConfig(), **MODEL))


def test_index_none_takes_no_host_memory_and_has_no_longest_request():
    resolved = resolve(RetrievalConfig(index="none", host_memory_gb=99), **MODEL)
    assert resolved.host_pages == 0
    assert resolved.longest_request is None


@given(st.integers(1, 400).map(lambda n: 64 * n))
def test_a_page_divides_a_segment_and_is_whole_tiles(segment_tokens):
    page = RetrievalConfig(segment_tokens=segment_tokens, index="flat").page_tokens
    assert segment_tokens % page == 0
    assert page % 64 == 0
    assert page <= 1024


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pages_of_all_ranks_fit_the_host_memory(ranks):
    resolved = resolve(RetrievalConfig(host_memory_gb=1.5), **{**MODEL, "ranks": ranks})
    page = 1000 * resolved.page_tokens
    assert resolved.host_pages * page * ranks <= 1.5e9 < (resolved.host_pages + 1) * page * ranks


def test_indexes_are_part_of_the_host_memory():
    knobs = RetrievalConfig(host_memory_gb=1.5)
    without, indexed = resolve(knobs, **MODEL), resolve(knobs, **MODEL, index_bytes_per_segment=1_200_000)
    page = 1000 * indexed.page_tokens
    assert without.index_slabs == 0
    assert 0.85 < indexed.host_pages / without.host_pages < 0.9
    assert indexed.index_slabs == indexed.host_pages * indexed.page_tokens // 8192
    assert indexed.host_pages * page + indexed.index_slabs * 1_200_000 <= 1.5e9


@pytest.mark.parametrize("tokens", [64, 8192 + 64, 65536])
def test_a_segment_that_the_index_can_not_have_is_refused(tokens):
    assert "a multiple of 256 below 65536" in refusal(lambda: parse({config.KEY: {"segment_tokens": tokens}}))
    assert parse({config.KEY: {"segment_tokens": tokens, "index": "flat"}}).segment_tokens == tokens


def test_default_host_memory_leaves_a_reserve():
    assert resolve(RetrievalConfig(), **MODEL).host_memory_gb == pytest.approx(6.0)
    assert resolve(RetrievalConfig(), spoken_for=config.GB, **MODEL).host_memory_gb == pytest.approx(5.0)


def test_sinks_round_up_to_blocks_and_bound_the_longest_request():
    resolved = resolve(RetrievalConfig(host_memory_gb=1, sink_tokens=100), **MODEL)
    assert resolved.sink_end == 112
    assert resolved.longest_request == 112 + resolved.host_pages * resolved.page_tokens


@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 8))
def test_default_threads_never_oversubscribe_a_machine_with_enough_cores(cpus, ranks, workers):
    threads = default_threads(cpus, ranks, workers)
    assert threads >= 1
    assert threads == 1 or threads * ranks * workers + ranks <= cpus


def test_knobs_survive_resolution_and_json():
    knobs = RetrievalConfig(
        sink_tokens=7, window_tokens=99, segment_tokens=640, host_memory_gb=1, threads=3, index="flat"
    )
    resolved = resolve(knobs, **MODEL)
    assert {name: getattr(resolved, name) for name in RetrievalConfig.model_fields} == {
        **knobs.model_dump(),
        "workers": 1,
    }
    assert type(resolved).model_validate_json(resolved.model_dump_json()) == resolved
