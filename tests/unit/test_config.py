# SPDX-License-Identifier: Apache-2.0
"""Knobs: what is wrong is refused in one line that names the knob; defaults are filled in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.one_line import assert_clear
from vllm_retrieval_attn.core import config
from vllm_retrieval_attn.core.config import RetrievalConfig, default_threads, parse, resolve

MODEL = {"bytes_per_token": 1000, "kv_heads": 4, "block_size": 16, "ranks": 1}


@pytest.fixture(autouse=True)
def ten_free_gigabytes(monkeypatch):
    monkeypatch.setattr(config, "available_memory", lambda: 10 * config.GB)


def refusal(call) -> str:
    """The message of the ValueError that ``call`` raises; one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert_clear(text)
    return text


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"sink": 5}, "sink"),
        ({"window_tokens": "many"}, "window_tokens"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"sink_tokens": 1.5}, "sink_tokens"),
        ({"resident_tokens": -1}, "resident_tokens"),
        ({"resident_tokens": "all"}, "resident_tokens"),
        ({"index": "lsh"}, "index"),
        ({"rows": 0}, "rows"),
        ({"rows": 1 << 17, "max_rows": 1 << 16}, "rows"),
        ({"max_rows": 1 << 17}, "max_rows"),
        ({"tau": 0}, "tau"),
        ({"tau": 1.5}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"min_tau": 0}, "min_tau"),
        ({"candidates": 63}, "candidates"),
        ({"allow_exact": "perhaps"}, "allow_exact"),
        ({"fidelity": 1.1}, "fidelity"),
        ({"page_tokens": 0}, "page_tokens"),
        ({"page_tokens": 32}, "page_tokens"),
        ({"page_tokens": 1 << 17}, "page_tokens"),
        ({"host_memory_gb": float("inf")}, "host_memory_gb"),
        ({"host_memory_gb": 0}, "host_memory_gb"),
        ({"host_memory_gb": [1]}, "host_memory_gb"),
        ({"workers": 0}, "workers"),
        ({"threads": 0}, "threads"),
        ({"ray_address": 7}, "ray_address"),
        ({"worker_timeout_s": 0}, "worker_timeout_s"),
        ({"restart_timeout_s": 30}, "use 'answer_timeout_s'"),
    ],
)
def test_a_bad_knob_is_refused_in_one_line_that_names_it(knobs, named):
    assert named in refusal(lambda: parse({"retrieval": knobs}))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("rows", True, "valid integer"),
        ("rows", "512", "valid integer"),
        ("rows", None, "valid integer"),
        ("rows", [1] * 3000, "valid integer"),
        ("rows", {"rows": 1}, "valid integer"),
        ("rows", 10**400, "less than or equal to"),
        ("sink_tokens", 10**400, "less than or equal to"),
        ("window_tokens", "", "valid integer"),
        ("resident_tokens", 10**18, "less than or equal to"),
        ("threads", 10**18, "less than or equal to"),
        ("workers", "1", "valid integer"),
        ("tau", True, "valid number"),
        ("tau", "0.1", "valid number"),
        ("tau", None, "valid number"),
        ("fidelity", float("nan"), "finite number"),
        ("fidelity", True, "valid number"),
        ("host_memory_gb", "64", "valid number"),
        ("host_memory_gb", float("-inf"), "finite number"),
        ("sketch_gb", -1, "greater than or equal to 0"),
        ("sketch_gb", False, "valid number"),
        ("answer_timeout_s", 1e300, "less than or equal to"),
        ("answer_timeout_s", 1e-300, "greater than or equal to"),
        ("worker_timeout_s", 1e300, "less than or equal to"),
        ("worker_timeout_s", 1e-300, "greater than or equal to"),
        ("allow_exact", 1, "valid boolean"),
        ("allow_exact", "yes", "valid boolean"),
        ("poison_freed", None, "valid boolean"),
        ("index", None, "'attention', 'flat' or 'none'"),
        ("index", "Flat", "'attention', 'flat' or 'none'"),
        ("index", "a\nb", "'attention', 'flat' or 'none'"),
        ("index", "x" * 5000, "'attention', 'flat' or 'none'"),
        ("ray_address", "", "host:port"),
        ("ray_address", "local", "leave it out"),
        ("ray_address", "127.0.0.1", "host:port"),
        ("ray_address", "127.0.0.1:0", "host:port"),
        ("ray_address", "ray://127.0.0.1:10001", "host:port"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_kind_it_should_be(name, value, wanted):
    assert_clear(refusal(lambda: parse({"retrieval": {name: value}})), f"{name}=", wanted)


@pytest.mark.parametrize("rows", [512, 512.0])
def test_a_whole_number_may_be_written_as_json_likes(rows):
    found = parse({"retrieval": {"rows": rows, "host_memory_gb": 2}})
    assert (found.rows, type(found.rows), type(found.host_memory_gb)) == (512, int, float)


@pytest.mark.parametrize(
    ("additional", "name", "do"),
    [
        ([], "--additional-config", "JSON object"),
        ([{"retrieval": {}}], "--additional-config", "JSON object"),
        ("rows=5", "--additional-config", "JSON object"),
        (5, "--additional-config", "JSON object"),
        ({"rows": 512}, "'rows'", '{"retrieval": {"rows": ...}}'),
        ({"retrieval": {}, "tau": 0.1}, "'tau'", '{"retrieval": {"tau": ...}}'),
        ({"budget": 0.1}, "'budget'", '{"retrieval": {"budget": ...}}'),
        ({"Retrieval": {"rows": 5}}, "'Retrieval'", 'write "retrieval"'),
        ({"retrieval ": {"rows": 5}}, "'retrieval '", 'write "retrieval"'),
        ({"retrieval": {"retrieval": {"rows": 5}}}, "unknown knob 'retrieval'", "known: "),
        ({"retrieval": {"": 1}}, "unknown knob ''", "known: "),
        ({"retrieval": {"ROWS": 1}}, "unknown knob 'ROWS'", "known: "),
        ({"retrieval": {"host-memory-gb": 1}}, "'host-memory-gb'", "host_memory_gb"),
        ({"retrieval": '{"rows": 5}'}, 'additional_config["retrieval"]', "JSON object"),
        ({"retrieval": {1: 2}}, "1", "strings"),
    ],
)
def test_knobs_in_a_wrong_place_are_refused_with_the_right_one(additional, name, do):
    assert_clear(refusal(lambda: parse(additional)), name, do)


def test_what_other_plugins_have_beside_is_theirs():
    assert parse({"retrieval": {"rows": 5}, "other": {"rows": 1}, "retrieval-attn": 1}).rows == 5


@pytest.mark.parametrize("index", ["ivf", "hnsw", "roar"])
def test_kinds_to_compare_with_are_not_served(index):
    text = refusal(lambda: parse({"retrieval": {"index": index}}))
    assert f"index='{index}'" in text
    assert "'attention', 'flat' or 'none'" in text


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("budget", "rows"),
        ("rerank", "rows"),
        ("tail", "rows"),
        ("segment_tokens", "page_tokens"),
        ("build_on", "threads"),
    ],
)
def test_a_knob_of_earlier_versions_is_answered_with_the_one_to_use_now(old, now):
    assert refusal(lambda: parse({"retrieval": {old: 1}})) == f"retrieval: knob '{old}' is no more; use '{now}'"


@pytest.mark.parametrize("tokens", [100, 96, 192, 1000, 8192 + 64])
def test_pages_are_powers_of_two(tokens):
    assert "page_tokens" in refusal(lambda: parse({"retrieval": {"page_tokens": tokens}}))


@pytest.mark.parametrize("exponent", range(6, 17))
def test_every_power_of_two_from_64_is_a_page(exponent):
    assert parse({"retrieval": {"page_tokens": 1 << exponent}}).page_tokens == 1 << exponent


def test_defaults_beyond_what_requests_may_ask_for_are_refused():
    assert "rows=3000 is above max_rows=2000" in refusal(lambda: parse({"retrieval": {"rows": 3000, "max_rows": 2000}}))
    assert parse({"retrieval": {"rows": 2000, "max_rows": 2000}}).rows == 2000
    assert "tau=0.001 is below min_tau=0.1" in refusal(lambda: parse({"retrieval": {"min_tau": 0.1}}))
    assert parse({"retrieval": {"min_tau": 0.1, "tau": 0.1}}).tau == 0.1


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
    assert "page_tokens" in text


def test_a_machine_without_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(config, "available_memory", lambda: 3 * config.GB)
    assert_clear(refusal(lambda: resolve(RetrievalConfig(), **MODEL)), "3.0 GB of memory", "set host_memory_gb")


def test_index_none_takes_no_host_memory_and_has_no_longest_request():
    resolved = resolve(RetrievalConfig(index="none", host_memory_gb=99), **MODEL)
    assert resolved.host_pages == 0
    assert resolved.longest_request is None


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pages_of_all_ranks_fit_the_host_memory(ranks):
    resolved = resolve(RetrievalConfig(host_memory_gb=1.5), **{**MODEL, "ranks": ranks})
    page = 1000 * resolved.page_tokens
    assert resolved.host_pages * page * ranks <= 1.5e9 < (resolved.host_pages + 1) * page * ranks


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("codes", [0, 125, 3000])
def test_codes_are_part_of_the_host_memory(codes, ranks):
    knobs = RetrievalConfig(host_memory_gb=1.5)
    resolved = resolve(knobs, **{**MODEL, "ranks": ranks}, index_bytes_per_token=codes)
    page = (1000 + codes) * resolved.page_tokens
    assert resolved.index_bytes_per_token == codes
    assert resolved.host_pages * page * ranks <= 1.5e9 < (resolved.host_pages + 1) * page * ranks


def test_codes_may_leave_no_room_for_a_page():
    knobs = RetrievalConfig(host_memory_gb=1500 * 1024 / config.GB)
    assert resolve(knobs, **MODEL).host_pages == 1
    assert "host_memory_gb" in refusal(lambda: resolve(knobs, **MODEL, index_bytes_per_token=600))


def test_default_host_memory_leaves_a_reserve():
    assert resolve(RetrievalConfig(), **MODEL).host_memory_gb == pytest.approx(6.0)
    assert resolve(RetrievalConfig(), spoken_for=config.GB, **MODEL).host_memory_gb == pytest.approx(5.0)


def test_sinks_round_up_to_blocks_and_bound_the_longest_request():
    resolved = resolve(RetrievalConfig(host_memory_gb=1, sink_tokens=100), **MODEL)
    assert resolved.sink_end == 112
    assert resolved.longest_request == 112 + resolved.host_pages * resolved.page_tokens


@pytest.mark.parametrize(
    ("resident", "window", "longest"), [(4096, 512, 4096), (0, 512, 128 + 1024), (0, 2000, 128 + 2000)]
)
def test_the_longest_request_fills_the_host_or_stays_in_pages(resident, window, longest):
    knobs = RetrievalConfig(host_memory_gb=1.1e-3, resident_tokens=resident, window_tokens=window)
    resolved = resolve(knobs, **MODEL)
    assert resolved.host_pages == 1
    assert resolved.longest_request == longest
    if longest != 128 + 1024:
        assert resolved.split.never_leaves_pages(longest)


def test_the_split_is_that_of_the_knobs():
    knobs = RetrievalConfig(host_memory_gb=1, sink_tokens=100, window_tokens=200, resident_tokens=300)
    split = resolve(knobs, **MODEL).split
    assert (split.sink_tokens, split.window_tokens, split.resident_tokens, split.block_size) == (100, 200, 300, 16)


@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 8))
def test_default_threads_never_oversubscribe_a_machine_with_enough_cores(cpus, ranks, workers):
    threads = default_threads(cpus, ranks, workers)
    assert threads >= 1
    assert threads == 1 or threads * ranks * workers + ranks <= cpus


def test_knobs_survive_resolution_and_json():
    knobs = RetrievalConfig(
        sink_tokens=7,
        window_tokens=99,
        resident_tokens=55,
        page_tokens=128,
        host_memory_gb=1,
        threads=3,
        index="flat",
        rows=77,
        tau=0.5,
        candidates=99,
        max_rows=88,
        min_tau=0.25,
        allow_exact=False,
        fidelity=0.75,
    )
    resolved = resolve(knobs, **MODEL)
    assert {name: getattr(resolved, name) for name in RetrievalConfig.model_fields} == {
        **knobs.model_dump(),
        "workers": 1,
    }
    assert type(resolved).model_validate_json(resolved.model_dump_json()) == resolved
