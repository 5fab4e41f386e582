"""`plait demo`, which is what `make run` runs."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from running_plait import InProcess, RunningPlait, run_plait

NAMES = ("one", "two", "spare")
# A process that sees its standard input close ends at once, unless it is in the middle of a long import.
END_S = 30.0


def processes(demo: RunningPlait) -> dict[str, int]:
    """The machines that a demo has said, by name."""
    said = "\n".join(demo.lines)
    found = {name: re.search(rf"^ +{name} +\d:\d +(\d+)$", said, re.MULTILINE) for name in NAMES}
    return {name: int(match[1]) for name, match in found.items() if match is not None}


def lives(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_gone(found: dict[str, int]) -> None:
    deadline_s = time.monotonic() + END_S
    while any(map(lives, found.values())):
        assert time.monotonic() < deadline_s, f"left behind: {found}"
        time.sleep(0.02)


def test_it_asks_a_swarm_one_question_and_stays_up(environment: dict[str, str]) -> None:
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
            chosen = re.search(r"^  one 0:3 -> (two|spare) 3:6 .*<- chosen$", demo.said, re.MULTILINE)
            assert chosen is not None, demo.said
            assert re.search(r"^  spare 0:6 ", demo.said, re.MULTILINE), demo.said
            found = processes(demo)
            assert set(found) == set(NAMES) and all(map(lives, found.values()))
            kill = next(line for line in demo.lines if " demo --kill " in line).split()
            assert kill[kill.index("--kill") + 1] in {f"{name}:{process}" for name, process in found.items()}
            watched = run_plait(*kill[kill.index("demo") :], environment=environment)
            assert "the answer is the same" in watched.stdout, watched
            name, process = kill[kill.index("--kill") + 1].split(":")
            assert demo.wait_for(f"{name} (process {process}) is gone, signal 9: answers go on with ")
            demo.signal(signal.SIGINT)
            assert demo.wait() == 0
            assert demo.lines[-1] == "stopped"
            wait_gone(found)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_no_process_is_left_behind(environment: dict[str, str], end: signal.Signals) -> None:
    with RunningPlait("demo", "--port", "0", environment=environment) as demo:
        demo.wait_for("requests now go through")
        found = processes(demo)
        assert len(found) == len(NAMES)
        demo.signal(end)
        demo.wait()
        wait_gone(found)


@pytest.mark.slow
def test_a_machine_that_cannot_start_ends_the_demo(environment: dict[str, str]) -> None:
    with RunningPlait(
        "demo", "--port", "0", environment=environment | {"PLAIT_SWARM__MEMORY": "1MB"}
    ) as demo:
        assert demo.wait() == 1
        assert "of the demo ended before it served anything" in demo.errors
        assert "raise --memory" in demo.errors


@pytest.mark.slow
def test_ctrl_c_during_the_answer_ends_it(environment: dict[str, str]) -> None:
    with RunningPlait("demo", "--port", "0", environment=environment) as demo:
        demo.wait_for("asking tiny through")
        demo.signal(signal.SIGINT)
        assert demo.wait() == 0
        wait_gone(processes(demo))


@pytest.mark.slow
def test_a_key_of_the_settings_is_presented_and_asked_for(environment: dict[str, str]) -> None:
    with RunningPlait(
        "demo", "--one-process", "--port", "0", environment=environment | {"PLAIT_SERVER__API_KEYS": "sk-own"}
    ) as demo:
        demo.wait_for("tokens in ")
        demo.wait_for("Ctrl-C stops")
        assert httpx.get(demo.origin + "/v1/models").status_code == 401
        assert "export OPENAI_API_KEY=YOUR_KEY" in demo.said
        assert "sk-own" not in demo.said
        assert processes(demo) == {}
        demo.signal(signal.SIGINT)
        assert demo.wait() == 0


def test_it_does_not_listen_to_other_machines(plait: InProcess) -> None:
    result = plait("demo", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "use plait serve" in result.stderr


@pytest.mark.parametrize("victim", ["two", "two:", ":5", "two:1", "two:x"])
def test_a_victim_that_is_none_is_one_sentence(plait: InProcess, victim: str) -> None:
    result = plait("demo", "--kill", victim)
    assert result.exit_code == 2
    assert "which the demo prints" in result.stderr
