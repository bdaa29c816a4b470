"""The routes under /retrieval, over a client that is made up."""

import asyncio
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_retrieval_attn.plugin import stats
from vllm_retrieval_attn.serving import endpoints, keys
from vllm_retrieval_attn.serving.endpoints import RetrievalEndpoints

VIEWING = [("GET", "/retrieval/status"), ("GET", "/retrieval/config"), ("GET", "/retrieval/workers"),
           ("GET", "/retrieval/fidelity")]  # fmt: skip
CHANGING = [("POST", "/retrieval/drain"), ("POST", "/retrieval/undrain")]
NOW = {
    "healthy": 1.0, "workers|wanted": 2.0, "workers|alive": 2.0, "workers_given_up": 0.0, "arena_bytes|used": 1e9,
    "arena_bytes|capacity": 4e9, "host_tokens": 5000.0, "host_requests": 3.0, "recall|8-15": 0.8, "mass|8-15": 0.7,
    "output_error|8-15": 0.01, "lse_bias|8-15": 0.001, "recall|0-7": 0.9, "mass|0-7": 0.6, "output_error|0-7": 0.02,
    "lse_bias|0-7": -0.001, "prefix_bytes": 2e9,
}  # fmt: skip


class Config:
    def __init__(self) -> None:
        self.model_config = SimpleNamespace(served_model_name="m", model="folder")


@pytest.fixture
def server(monkeypatch):
    """A function that makes the app with the given keys, and its engine client."""
    monkeypatch.setattr(stats, "told", {})
    monkeypatch.setattr("vllm_retrieval_attn.serving.routes.told", stats.told)
    knobs = SimpleNamespace(model_dump=lambda: {"rows": 1024})
    monkeypatch.setattr("vllm_retrieval_attn.serving.routes.resolved_config", lambda config: knobs)
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
        processor = SimpleNamespace(get_num_unfinished_requests=lambda: 4)
        client = SimpleNamespace(
            vllm_config=Config(), errored=False, output_processor=processor, shutdown=lambda timeout: timeout
        )
        app.state.engine_client = client
        http = TestClient(app)
        asyncio.run(plugin.init_state(client, app.state, None))
        client.plugin = plugin
        return http, client

    return made


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), VIEWING + CHANGING)
def test_each_route_wants_its_own_key(server, method, path):
    right, other = ("view", "admin") if method == "GET" else ("admin", "view")
    http, _ = server(RETRIEVAL_VIEW_KEY="view", RETRIEVAL_ADMIN_KEY="admin")
    assert http.request(method, path).status_code == 401
    assert http.request(method, path, headers=bearer("wrong")).status_code == 401
    assert http.request(method, path, headers=bearer(other)).status_code == 401
    assert http.request(method, path, headers=bearer(right)).status_code == 200


@pytest.mark.parametrize(("method", "path"), VIEWING + CHANGING)
def test_without_a_key_a_route_is_off_and_says_how_to_switch_it_on(server, method, path):
    http, _ = server()
    reply = http.request(method, path, headers=bearer(""))
    assert reply.status_code == 403
    assert ("RETRIEVAL_VIEW_KEY" if method == "GET" else "RETRIEVAL_ADMIN_KEY") in reply.json()["detail"]


def test_keys_may_lie_in_files(server, tmp_path):
    (tmp_path / "key").write_text("from a file\n")
    http, _ = server(RETRIEVAL_VIEW_KEY_FILE=str(tmp_path / "key"))
    assert http.get("/retrieval/config", headers=bearer("from a file")).json() == {"rows": 1024}


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
    total = {"steps|sketch": 7.0, "rows_read": 1000.0, "worker_restarts": 1.0, "requests_failed": 2.0}
    stats.told[0] = stats.Told({**NOW, "sample_timestamp_seconds": time.time() - 5}, total)
    (engine,) = http.get("/retrieval/status", headers=bearer("view")).json()["engines"]
    assert engine["workers"] == {"wanted": 2, "alive": 2, "restarts": 1, "given_up": False}
    assert engine["arena"] == {"used": 1e9, "capacity": 4e9}
    assert engine["sketch"] is None
    assert engine["steps"] == {"sketch": 7, "faiss": 0, "exact": 0, "degraded": 0, "none": 0}
    assert 5 <= engine["sample_age_s"] < 10
    assert [group["layers"] for group in engine["fidelity"]] == ["0-7", "8-15"]
    assert (engine["rows_read"], engine["requests_failed"], engine["prefix_bytes"]) == (1000, 2, 2e9)


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
