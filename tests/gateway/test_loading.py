"""What clients see while the model loads, when that fails, and when the server drains."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from plait.errors import BadSetup
from plait.gateway import GatewayOptions
from plait.worker import LoadProgress

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


class SlowLoad:
    """Options that are decided only when the test says so."""

    def __init__(self, options) -> None:
        self.go_on = threading.Event()
        self._options = options

    def __call__(self, on_progress):
        on_progress(LoadProgress("downloading", 25, 100))
        self.go_on.wait(30)
        return self._options


@pytest.fixture
def loading(site, tiny_options):
    """An engine that is loading, and what lets it go on."""
    slow = SlowLoad(tiny_options)
    engine = site.engine(slow, settled=False)
    site.until(lambda: engine.load_progress.done_bytes == 25)
    yield engine, slow.go_on
    slow.go_on.set()


def test_health_tells_how_far_loading_is(site, loading):
    engine, go_on = loading
    origin = site.serve(engine)
    for path in ("/health", "/readyz"):
        answer = httpx.get(origin + path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        body = answer.json()
        assert body["error"] == {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        assert body["loading"] == {
            "state": "loading",
            "stage": "downloading",
            "percent": 25.0,
            "done_bytes": 25,
            "total_bytes": 100,
        }
    assert httpx.get(f"{origin}/healthz").status_code == 200
    go_on.set()
    site.until(lambda: engine.state == "ready")
    assert httpx.get(f"{origin}/health").status_code == 200


def test_models_version_metrics_and_status_answer_while_loading(site, loading):
    engine, _ = loading
    with httpx.Client(base_url=site.serve(engine)) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny", "alias"]
        assert http.get("/v1/models/tiny").json()["max_model_len"] is None
        assert http.get("/version").status_code == 200
        assert http.get("/metrics").status_code == 200
        assert http.get("/status").json()["state"] == "loading"
        assert http.post("/v1/chat/completions", json={**ASK, "model": "other"}).status_code == 404


def test_a_request_waits_for_the_model_and_is_then_answered(site, loading):
    engine, go_on = loading
    origin = site.serve(engine)
    with ThreadPoolExecutor() as threads:
        answers = [
            threads.submit(
                httpx.post, f"{origin}/v1/chat/completions", json={**ASK, "stream": stream}, timeout=30
            )
            for stream in (False, True)
        ]
        counted = httpx.get(f"{origin}/metrics").text
        assert "plait_num_requests_running" in counted
        go_on.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_a_request_that_waited_too_long_is_503_with_retry_after(site, loading):
    engine, _ = loading
    origin = site.serve(engine, GatewayOptions(load_wait_s=0.05))
    with openai.OpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=ASK["messages"])
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert "loading" in caught.value.message
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/v1/messages", None),
    ):
        messages = {"model": "tiny", "max_tokens": 2, "messages": ASK["messages"]}
        assert httpx.post(origin + path, json=body or messages).status_code in (503, 529), path


def test_a_failed_load_is_told_with_its_reason(site):
    def fail(_):
        raise BadSetup("model.safetensors is truncated; download it again")

    engine = site.engine(fail)
    with httpx.Client(base_url=site.serve(engine)) as http:
        for path in ("/health", "/healthz", "/readyz"):
            answer = http.get(path)
            assert answer.status_code == 503
            assert "model.safetensors is truncated" in answer.json()["error"]["message"]
        answer = http.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 503
        assert "model.safetensors is truncated" in answer.json()["error"]["message"]
        assert http.get("/status").json()["failure"] is not None


def test_draining_refuses_new_requests_and_lets_the_running_end(site, tiny_options):
    engine = site.engine(tiny_options)
    origin = site.serve(engine)
    with openai.OpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0) as client:
        running = client.chat.completions.create(
            model="tiny",
            messages=ASK["messages"],
            max_tokens=60,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(running)
        with ThreadPoolExecutor() as threads:
            drained = threads.submit(site.run, engine.drain(30))
            site.until(lambda: engine.state == "draining")
            refused = httpx.post(f"{origin}/v1/chat/completions", json=ASK)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert httpx.get(f"{origin}/health").status_code == 503
            ends = [chunk.choices[0].finish_reason for chunk in running]
            assert ends[-1] == "length"
            assert drained.result() is True
