"""`plait demo`, which is what `make run` runs."""

import signal
import socket

import httpx
import pytest
from running_plait import InProcess, RunningPlait


def test_it_asks_itself_one_question_and_stays_up(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with RunningPlait("demo", "--port", str(port), environment=environment) as demo:
            asked = demo.wait_for("asking tiny through")
            demo.wait_for("tokens in ")
            demo.wait_for("Ctrl-C stops")
            question = demo.lines.index(asked.rstrip())
            assert any(line.strip() for line in demo.lines[question + 1 :][:3]), demo.said
            assert f"port {port} is taken; using " in demo.errors
            assert f"export OPENAI_BASE_URL={demo.origin}/v1" in [line.strip() for line in demo.lines]
            assert httpx.get(demo.origin + "/health").status_code == 200
            assert httpx.get(demo.origin + "/").status_code == 200
            demo.signal(signal.SIGINT)
            assert demo.wait() == 0
            assert demo.lines[-1] == "stopped"


@pytest.mark.slow
def test_ctrl_c_during_the_answer_ends_it(environment: dict[str, str]) -> None:
    with RunningPlait("demo", "--port", "0", environment=environment) as demo:
        demo.wait_for("asking tiny through")
        demo.signal(signal.SIGINT)
        assert demo.wait() == 0


@pytest.mark.slow
def test_a_key_of_the_settings_is_presented_and_asked_for(environment: dict[str, str]) -> None:
    with RunningPlait(
        "demo", "--port", "0", environment=environment | {"PLAIT_SERVER__API_KEYS": "sk-own"}
    ) as demo:
        demo.wait_for("tokens in ")
        demo.wait_for("Ctrl-C stops")
        assert httpx.get(demo.origin + "/v1/models").status_code == 401
        assert "export OPENAI_API_KEY=YOUR_KEY" in demo.said
        assert "sk-own" not in demo.said
        demo.signal(signal.SIGINT)
        assert demo.wait() == 0


def test_it_does_not_listen_to_other_machines(plait: InProcess) -> None:
    result = plait("demo", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "use plait serve" in result.stderr
