"""`plait generate`: prompts in, text out, without a server."""

import json

import pytest
from running_plait import InProcess


def test_the_same_seed_gives_the_same_text_and_n_gives_n(plait: InProcess) -> None:
    arguments = ("generate", "tiny", "import ", "-", "--n", "2", "--max-tokens", "4", "--seed", "7", "--json")
    first = plait(*arguments, stdin="def ")
    assert first.exit_code == 0, first.stderr
    outputs = json.loads(first.stdout)
    assert [output["prompt"] for output in outputs] == ["import ", "def "]
    assert all(len(output["outputs"]) == 2 for output in outputs)
    assert all(len(choice["token_ids"]) <= 4 for output in outputs for choice in output["outputs"])
    assert plait(*arguments, stdin="def ").stdout == first.stdout


def test_text_comes_plain_and_through_the_chat_template(plait: InProcess) -> None:
    plain = plait("generate", "tiny", "import os", "--max-tokens", "3", "--temperature", "0")
    assert plain.exit_code == 0
    assert "---" not in plain.stdout
    chat = plait("generate", "tiny", "Hello", "--chat", "--max-tokens", "3", "--temperature", "0", "--json")
    assert json.loads(chat.stdout)[0]["prompt_tokens"] > 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no prompt is given"),
        (("tiny", "a", "--temperature", "-1"), "temperature must be between 0.0 and 100.0"),
        (("tiny", "a", "--n", "0"), "n must be between 1 and"),
        (("tiny", "a", "--max-model-len", "999999999"), "--max-model-len"),
        (("/no/such/model", "a"), "neither 'tiny', nor a folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments: tuple[str, ...], said: str, plait: InProcess) -> None:
    result = plait("generate", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
