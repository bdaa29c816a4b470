# SPDX-License-Identifier: Apache-2.0
"""The routes under /retrieval, over a client that is made up."""

import asyncio
import contextlib
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_retrieval_attn.core.config import RetrievalConfig
from vllm_retrieval_attn.plugin import stats
from vllm_retrieval_attn.plugin.live_defaults import LiveDefaults
from vllm_retrieval_attn.plugin.resolved import EXTENSION
from vllm_retrieval_attn.serving import control, drain, endpoints, events, keys, routes, state
from vllm_retrieval_attn.serving.endpoints import RetrievalEndpoints

VIEWING = ["status", "config", "workers", "fidelity", "requests", "events"]
CHANGING = [("POST", "drain"), ("POST", "undrain"), ("POST", "workers/0/1/restart"), ("PATCH", "config"),
            ("POST", "requests/a-1/abort")]  # fmt: skip
ALL = [("GET", path) for path in VIEWING] + CHANGING
NOW = {
    "healthy": 1.0, "workers|wanted": 2.0, "workers|alive": 2.0, "workers_given_up": 0.0, "arena_bytes|used": 1e9,
    "arena_bytes|capacity": 4e9, "host_tokens": 5000.0, "host_requests": 3.0, "recall|8-15": 0.8, "mass|8-15": 0.7,
    "output_error|8-15": 0.01, "lse_bias|8-15": 0.001, "recall|0-7": 0.9, "mass|0-7": 0.6, "output_error|0-7": 0.02,
    "lse_bias|0-7": -0.001, "prefix_bytes": 2e9,
}  # fmt: skip


LIVE = {"id": "a-1", "state": "running", "arrived": 1e9, "prompt_tokens": 900, "output_tokens": 3,
        "host_tokens": 500, "paged_tokens": 402, "cached_tokens": 64}  # fmt: skip
ENDED = {"id": "b-2", "finish": "stop", "arrived": 1e9, "seconds": 2.5, "prompt_tokens": 900, "output_tokens": 30,
         "paged_blocks": 20, "host_tokens": 500, "paged_tokens": 402, "cached_tokens": 0, "path": "sketch",
         "rows_read": 80, "degraded_steps": 0}  # fmt: skip


class Client:
    """What the routes use of vLLM's engine client."""

    def __init__(self):
        parallel = SimpleNamespace(worker_extension_cls=EXTENSION, _api_process_count=1)
        model = SimpleNamespace(served_model_name="m", model="folder")
        self.vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel)
        self.errored, self.aborted, self.called = False, [], []
        self.output_processor = SimpleNamespace(
            get_num_unfinished_requests=lambda: 4, request_states={"a-1": None}, external_req_ids={"a": ["a-1"]}
        )
        self.answers = [True, None]

    def shutdown(self, timeout):
        return timeout

    async def abort(self, name, internal=False):
        self.aborted.append((name, internal))

    async def collective_rpc(self, method, args):
        self.called.append((method, *args))
        return self.answers


@pytest.fixture
def server(monkeypatch):
    """A function that makes the app with the given keys, and its engine client."""
    monkeypatch.setattr(stats, "told", {})
    for module in (state, events):
        monkeypatch.setattr(module, "told", stats.told)
    knobs = RetrievalConfig(rows=1024, tau=0.001, max_rows=2048)
    live = LiveDefaults()
    for module in (routes, control):
        monkeypatch.setattr(module, "resolved_config", lambda config: knobs)
        monkeypatch.setattr(module, "live_defaults", live)
    monkeypatch.setattr(endpoints, "find_resolved_config", lambda config: knobs)

    def made(**given):
        for name in (keys.VIEW, keys.ADMIN):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(f"{name}_FILE", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        app, plugin = FastAPI(), RetrievalEndpoints()

        @app.post("/v1/completions")
        def complete() -> str:
            return "text"

        plugin.attach_router(app)
        client = Client()
        app.state.engine_client = client
        http = TestClient(app)
        asyncio.run(plugin.init_state(client, app.state, None))
        client.plugin = plugin
        return http, client

    return made


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(autouse=True)
def _one_event(monkeypatch):
    """Streams end after their first events."""

    async def sleep(seconds):
        raise asyncio.CancelledError

    monkeypatch.setattr(events, "asyncio", SimpleNamespace(sleep=sleep))


def asked(http, method, path, key=None):
    """The status of a route's answer, and what it says."""
    body = {"json": {}} if method == "PATCH" else {}
    with contextlib.suppress(asyncio.CancelledError):
        reply = http.request(method, f"/retrieval/{path}", headers=bearer(key) if key is not None else {}, **body)
        return reply.status_code, reply.text
    return 200, ""  # a stream, cut off


@pytest.mark.parametrize(("method", "path"), ALL)
def test_each_route_wants_its_own_key(server, method, path):
    right, other = ("view", "admin") if method == "GET" else ("admin", "view")
    http, client = server(RETRIEVAL_VIEW_KEY="view", RETRIEVAL_ADMIN_KEY="admin")
    for key in (None, "", "wrong", other, right + "x"):
        assert asked(http, method, path, key)[0] == 401
    assert not client.called
    assert not client.aborted
    assert asked(http, method, path, right)[0] == 200


@pytest.mark.parametrize(("method", "path"), ALL)
def test_without_a_key_a_route_is_off_and_says_how_to_switch_it_on(server, method, path):
    http, _ = server()
    code, said = asked(http, method, path, "")
    assert code == 403
    assert ("RETRIEVAL_VIEW_KEY" if method == "GET" else "RETRIEVAL_ADMIN_KEY") in said


def test_no_route_is_without_a_key_but_the_probe_and_the_page(server):
    http, _ = server(RETRIEVAL_VIEW_KEY="view", RETRIEVAL_ADMIN_KEY="admin")
    ours = {
        (method.upper(), path.removeprefix("/retrieval/"))
        for path, methods in http.get("/openapi.json").json()["paths"].items()
        for method in methods
        if path.startswith("/retrieval/")
    }
    open_ones = {("GET", ""), ("GET", "ready")}
    tried = {(method, path.replace("0/1", "{rank}/{number}").replace("a-1", "{name}")) for method, path in ALL}
    assert ours == tried | open_ones


def test_keys_may_lie_in_files(server, tmp_path):
    (tmp_path / "key").write_text("from a file\n")
    http, _ = server(RETRIEVAL_VIEW_KEY_FILE=str(tmp_path / "key"))
    assert http.get("/retrieval/config", headers=bearer("from a file")).json()["rows"] == 1024


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RETRIEVAL_VIEW_KEY": ""}, "is empty"),
        ({"RETRIEVAL_VIEW_KEY_FILE": "/nowhere"}, "can not be read"),
        ({"RETRIEVAL_ADMIN_KEY": "a", "RETRIEVAL_ADMIN_KEY_FILE": "/b"}, "not both"),
    ],
)
def test_keys_that_are_none_are_refused_at_start(server, given, said):
    with pytest.raises(ValueError, match=said):
        server(**given)


def test_routes_without_the_backend_are_refused_at_start(server, monkeypatch):
    _, client = server()
    monkeypatch.setattr(endpoints, "find_resolved_config", lambda config: None)
    with pytest.raises(ValueError, match="--attention-backend retrieval"):
        asyncio.run(client.plugin.init_state(client, None, None))


def test_status_tells_what_the_engines_told(server):
    http, _ = server(RETRIEVAL_VIEW_KEY="view")
    empty = http.get("/retrieval/status", headers=bearer("view")).json()
    assert (empty["model"], empty["running"], empty["engines"]) == ("m", 4, [])
    total = {"steps|sketch": 7.0, "rows_read": 1000.0, "worker_restarts|died": 1.0, "requests_failed|search": 2.0,
             "searches": 50.0, "requests_refused|draining": 3.0}  # fmt: skip
    stats.told[0] = stats.Told({**NOW, "sample_timestamp_seconds": time.time() - 5}, total)
    (engine,) = http.get("/retrieval/status", headers=bearer("view")).json()["engines"]
    assert engine["workers"] == {"wanted": 2, "alive": 2, "restarts": 1, "given_up": False}
    assert engine["arena"] == {"used": 1e9, "capacity": 4e9}
    assert engine["sketch"] is None
    assert engine["steps"] == {"sketch": 7, "faiss": 0, "exact": 0, "degraded": 0, "paged": 0}
    assert 5 <= engine["sample_age_s"] < 10
    assert [group["layers"] for group in engine["fidelity"]] == ["0-7", "8-15"]
    assert (engine["searches"], engine["requests_refused"]["draining"]) == (50, 3)
    assert (engine["rows_read"], engine["requests_failed"], engine["prefix_bytes"]) == (1000, 2, 2e9)


def test_workers_are_told_one_by_one(server):
    http, _ = server(RETRIEVAL_VIEW_KEY="view")
    lists = {"0": {"workers": [{"number": 0, "pid": 7, "state": "alive"}]},
             "1": {"workers": [{"number": 0, "pid": 0, "state": "absent"}]}}  # fmt: skip
    stats.told[0] = stats.Told(NOW, {"worker_restarts|asked": 2.0}, lists=lists)
    found = http.get("/retrieval/workers", headers=bearer("view")).json()["0"]
    assert [(one["rank"], one["pid"], one["state"]) for one in found["each"]] == [(0, 7, "alive"), (1, 0, "absent")]
    assert (found["restarts"], found["restarts_by_reason"]["asked"], found["wanted"]) == (2, 2, 2)


def test_requests_are_told_while_they_live_and_when_they_ended(server):
    http, _ = server(RETRIEVAL_VIEW_KEY="view")
    stats.told[0] = told = stats.Told()
    told.take({"lists": {"scheduler": {"requests": [LIVE]}}, "ended": [ENDED, {**ENDED, "id": "c", "seconds": 9.0}]})
    found = http.get("/retrieval/requests", headers=bearer("view")).json()
    (live,) = found["live"]
    assert (live["id"], live["state"], live["host_tokens"], live["path"]) == ("a-1", "running", 500, None)
    assert [one["id"] for one in found["ended"]] == ["c", "b-2"]
    assert (found["ended"][1]["state"], found["ended"][1]["rows_read"]) == ("stop", 80)


def test_events_are_the_status_and_requests_that_ended_since(server):
    _, client = server()
    stats.told[0] = told = stats.Told()
    told.take({"lists": {}, "ended": [ENDED]})

    async def heard():
        stream = events.Events(drain.Drain()).listen(lambda: state.status(client, drain.Drain()))
        first = await anext(stream)
        told.take({"lists": {}, "ended": [{**ENDED, "id": "new"}]})
        return first, await anext(stream)

    first, second = asyncio.run(heard())
    assert first.startswith("event: status\ndata: {")
    assert '"running":4' in first
    assert second.startswith("event: request\ndata: {")
    assert '"id":"new"' in second


def test_a_stream_ends_with_the_server_and_only_so_many_listen(server):
    _, client = server()
    ending = drain.Drain()
    ending.ending = True
    heard = events.Events(ending)

    async def all_of(stream):
        return [event async for event in stream]

    streams = [heard.listen(lambda: state.status(client, ending)) for _ in range(events.MOST_LISTENERS)]
    with pytest.raises(events.TooMany):
        heard.listen(lambda: None)
    assert asyncio.run(all_of(streams[0])) == []
    heard.listen(lambda: None)


def test_what_is_wrong_is_said_with_what_to_do(server):
    http, _ = server(RETRIEVAL_VIEW_KEY="view", RETRIEVAL_ADMIN_KEY="admin")

    def said():
        found = http.get("/retrieval/status", headers=bearer("view")).json()["problems"]
        assert all(problem["do"] for problem in found)
        return [problem["what"] for problem in found]

    stats.told[0] = stats.Told({**NOW, "sample_timestamp_seconds": time.time()})
    assert said() == []
    now = stats.told[0].now
    now |= {"workers|alive": 1.0, "arena_bytes|used": 3.9e9, "sketch_bytes|used": 1.0, "sketch_bytes|capacity": 1.0,
            "output_error|0-7": 0.25, "sample_timestamp_seconds": time.time() - 60}  # fmt: skip
    http.post("/retrieval/drain", headers=bearer("admin"))
    words = (
        "1 of 2 CPU workers",
        "Host memory",
        "GPU memory",
        "differs from exact attention by 25%",
        "told nothing",
        "draining",
    )
    assert len(said()) == len(words)
    assert all(word in what for word, what in zip(words, said(), strict=True))
    now["workers_given_up"] = 1.0
    assert "died so often" in said()[0]


def test_knobs_change_all_or_none_and_the_answer_has_old_and_new(server):
    http, client = server(RETRIEVAL_VIEW_KEY="view", RETRIEVAL_ADMIN_KEY="admin")

    def change(**body):
        return http.patch("/retrieval/config", headers=bearer("admin"), json=body)

    old = {"rows": 1024, "tau": 0.001, "fidelity": 0.002}
    assert change(rows=512, fidelity=0.5).json() == {"old": old, "new": {**old, "rows": 512, "fidelity": 0.5}}
    assert client.called == [("retrieval_fidelity", 0.5)]
    config = http.get("/retrieval/config", headers=bearer("view")).json()
    assert (config["rows"], config["fidelity"], config["tau"]) == (512, 0.5, 0.001)
    for wrong, said in (({"rows": 4096}, "max_rows=2048"), ({"tau": 2.0}, "retrieval_tau=2.0"), ({"fidelity": 2}, "1"),
                        ({"row": 5}, "row"), ({"rows": 100, "tau": 0}, "retrieval_tau"), ({"rows": True}, "integer"),
                        ({"rows": "512"}, "integer"), ({"tau": "0.1"}, "number"), ({"fidelity": True}, "number"),
                        ):  # fmt: skip
        reply = change(**wrong)
        assert reply.status_code == 422
        assert said in reply.text
    assert change().json()["new"]["rows"] == 512
    assert len(client.called) == 1


def test_a_worker_is_restarted_and_a_missing_one_is_named(server):
    http, client = server(RETRIEVAL_ADMIN_KEY="admin")

    def restart():
        return http.post("/retrieval/workers/0/1/restart", headers=bearer("admin"))

    assert restart().json() == {"rank": 0, "number": 1}
    assert client.called == [("retrieval_restart", 0, 1)]
    client.answers = [None, None]
    assert (restart().status_code, "no CPU worker 1 of rank 0" in restart().text) == (404, True)
    client.answers = [None, False]
    assert (restart().status_code, "not alive" in restart().text) == (409, True)
    client.vllm_config.parallel_config.worker_extension_cls = "mine.Own"
    assert (restart().status_code, "--worker-extension-cls mine.Own" in restart().text) == (409, True)


def test_a_request_is_ended_by_either_of_its_names(server):
    http, client = server(RETRIEVAL_ADMIN_KEY="admin")

    def abort(name):
        return http.post(f"/retrieval/requests/{name}/abort", headers=bearer("admin"))

    assert abort("a-1").json() == {"id": "a-1"}
    assert abort("a").status_code == 200
    assert client.aborted == [("a-1", True), ("a", False)]
    assert (abort("other").status_code, "no request 'other'" in abort("other").text) == (404, True)


def test_one_of_several_api_servers_changes_nothing(server):
    http, client = server(RETRIEVAL_ADMIN_KEY="admin")
    client.vllm_config.parallel_config._api_process_count = 3
    reply = http.post("/retrieval/drain", headers=bearer("admin"))
    assert (reply.status_code, "SIGTERM" in reply.json()["detail"]) == (409, True)
    assert http.get("/retrieval/ready").status_code == 200


def test_the_page_is_small_and_asks_its_own_server_only(server):
    http, _ = server()
    reply = http.get("/retrieval/")
    assert reply.headers["content-type"].startswith("text/html")
    assert len(reply.content) <= 100_000
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert "//" not in reply.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


def test_a_drained_server_takes_no_new_request_and_says_so(server):
    http, _ = server(RETRIEVAL_ADMIN_KEY="admin")
    assert http.get("/retrieval/ready").json() == {"ready": True, "reason": None}
    assert http.post("/v1/completions").text == '"text"'
    assert http.post("/retrieval/drain", headers=bearer("admin")).json() == {"draining": True, "running": 4}
    ready, refused = http.get("/retrieval/ready"), http.post("/v1/completions")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["message"].startswith("retrieval: ")
    assert http.post("/retrieval/undrain", headers=bearer("admin")).json() == {"draining": False, "running": 4}
    assert http.post("/v1/completions").status_code == http.get("/retrieval/ready").status_code == 200


def test_a_server_that_shuts_down_is_drained_for_good(server):
    http, client = server(RETRIEVAL_ADMIN_KEY="admin")
    assert client.shutdown(timeout=30) == 30
    assert http.post("/v1/completions").status_code == http.get("/retrieval/ready").status_code == 503
    assert http.post("/retrieval/undrain", headers=bearer("admin")).status_code == 409


def test_an_engine_that_failed_is_not_ready(server):
    http, client = server()
    client.errored = True
    reply = http.get("/retrieval/ready")
    assert (reply.status_code, "log" in reply.json()["reason"]) == (503, True)
