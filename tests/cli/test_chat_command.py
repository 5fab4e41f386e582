"""`plait chat` with a running server, and its conversation."""

import os
import select
import signal
import subprocess

import pytest
from running_plait import COMMAND, InProcess, RunningPlait, run_plait

from plait.cli.chat import Conversation
from plait.client import ServerClient

FEW = ("--max-tokens", "4", "--temperature", "0")


def test_a_pipe_is_one_message(server: RunningPlait, plait: InProcess) -> None:
    arguments = ("chat", "--base-url", server.origin + "/v1", "--api-key", "sk-test", *FEW)
    first = plait(*arguments, stdin="What is\nplait?\n")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.strip()
    assert plait(*arguments, stdin="What is\nplait?\n").stdout == first.stdout


def test_the_server_of_the_environment_is_used_with_its_key(server: RunningPlait, plait: InProcess) -> None:
    url = server.origin + "/v1"
    assert plait("chat", *FEW, stdin="a", OPENAI_BASE_URL=url, OPENAI_API_KEY="sk-test").exit_code == 0
    # A key of the environment is not sent to a server that the environment does not name.
    refused = plait("chat", "--base-url", url, *FEW, stdin="a", OPENAI_API_KEY="sk-test")
    assert refused.exit_code == 2
    assert "refused the API key" in refused.stderr


def test_nobody_there_is_one_sentence(plait: InProcess) -> None:
    result = plait("chat", "--base-url", "http://127.0.0.1:9/v1", stdin="a")
    assert result.exit_code == 2
    assert "nothing answers at http://127.0.0.1:9/v1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_model_of_its_own_is_started_for_the_conversation(environment: dict[str, str]) -> None:
    result = run_plait("chat", "tiny", *FEW, environment=environment, stdin="What is plait?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_a_stopped_answer_is_remembered_and_reset_forgets(server: RunningPlait) -> None:
    with ServerClient(server.origin + "/v1", api_key="sk-test") as client:
        conversation = Conversation(client, "tiny", {"max_tokens": 50, "temperature": 0})
        answer = conversation.ask("Hello")
        piece = next(answer)
        answer.close()
        assert [(message.role, message.content) for message in conversation.messages] == [
            ("user", "Hello"),
            ("assistant", piece),
        ]
        conversation.reset()
        assert conversation.messages == ()
        with pytest.raises(Exception, match="does not exist"):
            list(Conversation(client, "other", {}).ask("Hello"))


def test_a_terminal_gets_a_prompt_commands_and_answers_that_ctrl_c_stops(
    server: RunningPlait, environment: dict[str, str]
) -> None:
    keyboard, terminal = os.openpty()
    # At this temperature the end token is as unlikely as any other: the answer is long.
    arguments = ("chat", "--base-url", server.origin + "/v1", "--api-key", "sk-test", "--temperature", "100")
    process = subprocess.Popen(
        (*COMMAND, *arguments),
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        # A shell starts background jobs, such as a whole test run, with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    said = ""

    def type_and_wait(text: str, *expected: str) -> str:
        """Type, and read until one thing after another has been said; returns the rest."""
        nonlocal said
        said = ""
        os.write(keyboard, text.encode())
        for part in expected:
            while part not in said:
                assert select.select([keyboard], [], [], 60)[0], f"waited for {part!r} after {said!r}"
                said += os.read(keyboard, 4096).decode(errors="replace")
            said = said.split(part, 1)[1]
        return said

    type_and_wait("", "talking to tiny", "> ")
    type_and_wait("/nonsense\n", "/nonsense is not a command", "> ")
    type_and_wait("/system Be brief.\n", "under that system prompt", "> ")
    if not type_and_wait("What is plait?\n", "plait?\r\n"):
        os.read(keyboard, 1)
    os.kill(process.pid, signal.SIGINT)
    type_and_wait("", "[stopped]", "> ")
    type_and_wait("/reset\n", "forgotten", "> ")
    os.write(keyboard, b"/exit\n")
    assert process.wait() == 0
    os.close(keyboard)
