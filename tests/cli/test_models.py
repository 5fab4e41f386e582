"""`plait models` and `plait pull`, in processes: Hugging Face variables are read when one starts."""

import json
from pathlib import Path

import pytest
from running_plait import run_plait
from stand_in_hub import StandInHub

from plait.engine import resolve_model

REPO = "someone/small-model"


@pytest.fixture
def served(hub: StandInHub, environment: dict[str, str]) -> StandInHub:
    tiny = Path(resolve_model("tiny"))
    names = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    hub.repositories[REPO] = {name: (tiny / name).read_bytes() for name in names}
    hub.token = "hf_secret"
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
    return hub


def test_a_pulled_model_is_listed_beside_tiny_and_generates_offline(
    served: StandInHub, environment: dict[str, str]
) -> None:
    pulled = run_plait("pull", REPO, environment=environment)
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip())
    assert folder.is_relative_to(environment["HF_HOME"])
    assert f"serve it with: plait serve {REPO}" in pulled.stderr
    listed = json.loads(run_plait("models", "--json", environment=environment).stdout)
    assert [(model["name"], model["family"], model["problem"]) for model in listed] == [
        ("tiny", "llama", None),
        (REPO, "llama", None),
    ]
    served.requests.clear()
    flags = ("--offline", "--max-tokens", "2", "--json")
    generated = run_plait("generate", REPO, "a", *flags, environment=environment)
    assert len(json.loads(generated.stdout)[0]["outputs"][0]["token_ids"]) == 2
    assert served.requests == []


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_sentence(served: StandInHub, environment: dict[str, str]) -> None:
    result = run_plait("pull", "someone/else", environment=environment)
    assert result.returncode == 2
    assert result.stderr.startswith(f"plait: there is no model 'someone/else' at {served.url}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_offline_mode_is_honoured(served: StandInHub, environment: dict[str, str]) -> None:
    result = run_plait("pull", REPO, environment=environment | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2
    assert "offline mode is on" in result.stderr
    assert served.requests == []
