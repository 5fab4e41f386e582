"""`plait serve` as a process: addresses, keys, refusals, and how it ends."""

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_plait import InProcess, RunningPlait, plait_environment
from stand_in_hub import StandInHub

from plait.engine import resolve_model

LONG = {"prompt": "a", "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True}


@contextmanager
def long_answer(server: RunningPlait, **fields: object) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a streamed completion; `{}` stands for the closing [DONE]."""
    with httpx.stream("POST", server.origin + "/v1/completions", json=LONG | fields, timeout=60) as response:
        assert response.status_code == 200, response.read()
        data = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        yield ({} if text == "[DONE]" else json.loads(text) for text in data)


def test_it_prints_the_page_and_the_lines_to_paste(server: RunningPlait) -> None:
    said = "\n".join(server.lines)
    assert f"export OPENAI_BASE_URL={server.origin}/v1" in said
    assert f"export ANTHROPIC_BASE_URL={server.origin}\n" in said
    assert "export OPENAI_API_KEY=YOUR_KEY" in said
    assert "sk-test" not in server.said
    assert httpx.get(server.origin + "/").status_code == 200


def test_keys_guard_everything_but_health(server: RunningPlait) -> None:
    assert httpx.get(server.origin + "/health").status_code == 200
    assert httpx.get(server.origin + "/v1/models").status_code == 401
    answer = httpx.get(server.origin + "/v1/models", headers={"Authorization": "Bearer sk-test"})
    assert answer.json()["data"][0]["id"] == "tiny"


def test_sigterm_lets_a_running_answer_end_and_refuses_new_ones(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    environment = plait_environment(tmp_path_factory.mktemp("drain"))
    with RunningPlait("serve", "--port", "0", environment=environment) as server:
        server.wait_for("ready:")
        with long_answer(server) as events:
            first = next(events)
            server.signal(signal.SIGTERM)
            refused = httpx.post(server.origin + "/v1/completions", json=LONG | {"max_tokens": 1})
            while refused.status_code == 200:
                refused = httpx.post(server.origin + "/v1/completions", json=LONG | {"max_tokens": 1})
            rest = list(events)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert first["choices"][0]["finish_reason"] is None
        assert rest[-1] == {}
        assert [e["choices"][0]["finish_reason"] for e in rest if e.get("choices")][-1] == "length"
        assert server.wait() == 0
        assert server.lines[-1] == "stopped"


@pytest.mark.slow
def test_an_answer_that_outlives_the_drain_ends_with_an_error_that_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    environment = plait_environment(tmp_path_factory.mktemp("cut"))
    with RunningPlait("serve", "--port", "0", "--drain-timeout", "0", environment=environment) as server:
        server.wait_for("ready:")
        with long_answer(server, max_tokens=400) as events:
            next(events)
            server.signal(signal.SIGINT)
            last = [event for event in events if event][-1]
        assert "stopping" in last["error"]["message"]
        assert server.wait() == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = plait_environment(tmp_path_factory.mktemp("at-once"))
    with RunningPlait("serve", "--port", "0", environment=environment) as server:
        server.wait_for("ready:")
        with pytest.raises(httpx.RemoteProtocolError), long_answer(server, max_tokens=400) as events:
            server.signal(signal.SIGTERM)
            for _ in events:
                # Ones that follow the first at once are echoes of it.
                server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT


def test_while_it_downloads_health_says_so_and_a_signal_ends_it(
    hub: StandInHub, environment: dict[str, str]
) -> None:
    tiny = Path(resolve_model("tiny"))
    files = ("config.json", "tokenizer.json", "model.safetensors")
    hub.repositories["someone/small"] = {name: (tiny / name).read_bytes() for name in files}
    hub.weights_may_go.clear()
    environment |= {"HF_ENDPOINT": hub.url}
    with RunningPlait("serve", "someone/small", "--port", "0", environment=environment) as server:
        server.wait_for("ANTHROPIC_AUTH_TOKEN")
        said = ""
        while "downloading" not in said:
            health = httpx.get(server.origin + "/health", timeout=60)
            assert health.status_code == 503
            said = health.text
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_an_unknown_model_ends_it_with_one_sentence(environment: dict[str, str]) -> None:
    with RunningPlait("serve", "/no/such/model", "--port", "0", environment=environment) as server:
        assert server.wait() == 2
        assert server.errors.splitlines()[-1].startswith(
            "plait: '/no/such/model' is neither 'tiny', nor a folder"
        )
        assert "Traceback" not in server.errors


def test_a_busy_port_is_one_sentence(plait: InProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = plait("serve", "--port", str(port))
    assert result.exit_code == 2
    assert result.stderr == (
        f"plait: cannot listen on 127.0.0.1 port {port}: address already in use; "
        "stop what uses it, or choose another with --port (0 takes a free one)\n"
    )


def test_an_address_of_another_machine_is_refused(plait: InProcess) -> None:
    result = plait("serve", "--host", "192.0.2.1", "--port", "0", "--api-key", "k")
    assert result.exit_code == 2
    assert "cannot listen on 192.0.2.1" in result.stderr


def test_it_does_not_listen_to_other_machines_without_a_key(plait: InProcess) -> None:
    result = plait("serve", "--host", "0.0.0.0", "--port", "0")
    assert result.exit_code == 2
    assert "lets other machines in, and no API key is set" in result.stderr
    assert "plait token new" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantization", "awq"), "input should be 'none'"),
        (("--max-num-seqs", "0"), "greater than or equal to 1"),
        (("--policy", "fifo"), "'static', 'orca' or 'paged'"),
        (("tiny", "--model", "other"), "the model is named twice"),
    ],
)
def test_a_bad_flag_is_one_sentence(arguments: tuple[str, ...], said: str, plait: InProcess) -> None:
    result = plait("serve", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_flag_is_refused(plait: InProcess) -> None:
    assert plait("serve", "--tensor-parallel-sizes", "2").exit_code == 2
