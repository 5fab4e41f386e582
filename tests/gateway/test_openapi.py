"""The OpenAPI document describes the real requests: what it allows is answered, and never with a 500."""

from collections import Counter

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from plait.engine import EngineOptions
from plait.gateway import GatewayOptions

# Making a request from a large schema takes up to a second, so they are few.
EXAMPLES = {"valid": 4, "invalid": 3, "within reach": 6}
REFUSED = (
    *(
        "model",
        "suffix",
        "functions",
        "function_call",
        "audio",
        "modalities",
        "chat_template",
        "stream_options",
    ),
    *(
        "chat_template_kwargs",
        "prompt_logprobs",
        "previous_response_id",
        "conversation",
        "tools",
        "tool_choice",
    ),
    *(
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "route",
    ),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def small_engine(site, tiny_options):
    """Its answers are short, whatever it is asked: the model has little room."""
    options = EngineOptions(
        folder=tiny_options.folder, kv_cache_bytes=tiny_options.kv_cache_bytes, threads=1, max_model_tokens=24
    )
    return site.engine(options)


def within_reach(case):
    """Take from a valid request what this server refuses anyway, so that what is left reaches the engine."""
    if isinstance(case.body, dict):
        body = {name: value for name, value in case.body.items() if name not in REFUSED}
        if "messages" in body:
            body["messages"] = [{"role": "user", "content": "Hi"}]
        if "prompt" in body:
            body["prompt"] = "Hi"
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if name in body:
                body[name] = 3
        for name in ("n", "best_of"):
            if body.get(name):
                body[name] = 2
        if body.get("min_tokens"):
            body["min_tokens"] = 1
        case.body = body
    return case


def try_operation(operation, cases: SearchStrategy, examples: int) -> Counter[int]:
    """Send generated requests to one operation and check each answer; gives how many had which status."""
    seen: Counter[int] = Counter()
    with requests.Session() as session:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def answers(case):
            response = case.call(timeout=30, session=session)
            seen[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        answers()
    return seen


@pytest.mark.parametrize("kind", ["valid", "invalid", "within reach"])
def test_no_request_is_answered_with_a_server_error(site, small_engine, kind: str):
    origin = site.serve(small_engine, GatewayOptions(max_prompts=8))
    document = schemathesis.openapi.from_url(f"{origin}/openapi.json")
    statuses: dict[str, Counter[int]] = {}
    for found in document.get_all_operations():
        operation = found.ok()
        if kind != "valid" and operation.method != "post":
            # Nothing is sent with the others that could be wrong.
            continue
        mode = GenerationMode.NEGATIVE if kind == "invalid" else GenerationMode.POSITIVE
        cases = operation.as_strategy(generation_mode=mode)
        if kind == "within reach":
            cases = cases.map(within_reach)
        statuses[operation.label] = try_operation(operation, cases, EXAMPLES[kind])
    site.until(lambda: small_engine.status().running == 0)
    assert small_engine.status().kv_blocks_used == 0
    if kind == "within reach":
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"):
            assert statuses[f"POST {path}"][200] > 0, statuses


def test_the_document_names_the_real_fields(http: httpx.Client):
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert {"messages", "max_completion_tokens", "logit_bias", "tools", "top_k"} <= (
        schemas["ChatRequest"]["properties"].keys()
    )
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert {"prompt", "echo", "suffix", "best_of"} <= schemas["CompletionRequest"]["properties"].keys()
