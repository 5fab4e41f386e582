"""Health, models, tokens, metrics and the page, as an operator sees them."""

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import plait


def test_the_model_is_listed_under_each_name(client: openai.OpenAI):
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny", "alias"]
    assert client.models.retrieve("alias").model_dump()["root"] == "tiny"
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 1024


def test_health_and_version_are_plain(http: httpx.Client):
    for path in ("/health", "/healthz", "/readyz"):
        assert http.get(path).json() == {"status": "ok"}
    assert http.get("/version").json() == {"version": plait.__version__}


@pytest.mark.parametrize("text", ["", "a", "héllo wörld 🐦", "<|user|>\nhi"])
def test_tokens_of_a_text_give_the_text_back(http: httpx.Client, text: str):
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 1024
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_tokens_of_a_chat_are_the_prompt_it_would_have(http: httpx.Client, client: openai.OpenAI):
    messages = [{"role": "user", "content": "A question?"}]
    counted = http.post("/tokenize", json={"messages": messages}).json()["count"]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert answer.usage is not None
    assert counted == answer.usage.prompt_tokens
    without = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()[
        "count"
    ]
    assert without < counted


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(http: httpx.Client, path: str, body: dict, param: str):
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_long_text_is_counted_beyond_the_models_context(http: httpx.Client):
    assert http.post("/tokenize", json={"prompt": "a bird " * 20_000}).json()["count"] > 20_000


def test_served_requests_show_in_the_metrics(http: httpx.Client, client: openai.OpenAI):
    def sample(name: str, **labels: str) -> float:
        text = http.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    names = ("vllm:generation_tokens_total", "plait_e2e_request_latency_seconds_count")
    before = {name: sample(name) for name in names}
    client.completions.create(model="tiny", prompt="Once", max_tokens=5, extra_body={"ignore_eos": True})
    assert sample("vllm:generation_tokens_total") == before["vllm:generation_tokens_total"] + 5
    assert sample("plait_e2e_request_latency_seconds_count") == (
        before["plait_e2e_request_latency_seconds_count"] + 1
    )
    assert sample("plait_http_responses_total", path="/v1/completions", status="200") >= 1
    http.get("/a-path-that-nobody-knows")
    assert sample("plait_http_responses_total", path="other", status="404") >= 1


def test_metrics_come_in_openmetrics_to_those_who_ask(http: httpx.Client):
    answer = http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_status_has_what_the_page_shows(http: httpx.Client, client: openai.OpenAI):
    client.completions.create(model="tiny", prompt="Once", max_tokens=8, extra_body={"ignore_eos": True})
    status = http.get("/status").json()
    assert status["state"] == "ready"
    assert status["model"] == "tiny"
    assert status["kv_blocks_total"] > 0
    assert status["tokens_per_s"] > 0
    assert {"running", "waiting", "kv_blocks_used", "generated_tokens_total"} <= status.keys()


def test_the_page_and_its_files_are_served_with_a_strict_policy(http: httpx.Client):
    page = http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert http.get("/favicon.ico").status_code in (200, 204)
    assert http.head("/").status_code == 200
