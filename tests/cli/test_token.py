"""`plait token`: keys are shown once, kept as hashes, listed and revoked."""

import json
import stat
from pathlib import Path

import pytest
from running_plait import InProcess

from plait.gateway import hash_api_key


@pytest.fixture
def key_file(environment: dict[str, str]) -> Path:
    return Path(environment["XDG_CONFIG_HOME"]) / "plait" / "keys.json"


def test_a_new_key_is_shown_once_and_only_its_hash_is_kept(plait: InProcess, key_file: Path) -> None:
    key = plait("token", "new", "--name", "laptop").stdout.strip()
    assert len(key) > 40
    kept = key_file.read_text()
    assert key not in kept
    assert hash_api_key(key) in kept
    assert key not in plait("token", "list").stdout


def test_the_key_file_is_for_its_owner_alone(plait: InProcess, key_file: Path) -> None:
    plait("token", "new")
    plait("token", "new")
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert [file.name for file in key_file.parent.iterdir()] == ["keys.json"]


def test_keys_are_listed_and_revoked_by_id_or_name(plait: InProcess) -> None:
    first = json.loads(plait("token", "new", "--name", "a", "--json").stdout)
    plait("token", "new", "--name", "b")
    listed = json.loads(plait("token", "list", "--json").stdout)
    assert [key["name"] for key in listed] == ["a", "b"]
    assert plait("token", "revoke", first["id"]).exit_code == 0
    assert plait("token", "revoke", "b").exit_code == 0
    assert json.loads(plait("token", "list", "--json").stdout) == []


def test_revoking_what_is_not_there_or_ambiguous_is_refused(plait: InProcess) -> None:
    plait("token", "new", "--name", "a")
    plait("token", "new", "--name", "a")
    for id, said in (("zzz", "no key has the id or name 'zzz'"), ("a", "2 keys have the id or name 'a'")):
        result = plait("token", "revoke", id)
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_damaged_file_is_one_sentence(plait: InProcess, key_file: Path) -> None:
    key_file.parent.mkdir(parents=True)
    key_file.write_text('{"keys": [{"id": 1}]}')
    result = plait("token", "list")
    assert result.exit_code == 2
    assert "is damaged" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_stored_key_lets_serve_listen_to_other_machines(plait: InProcess) -> None:
    plait("token", "new")
    result = plait("serve", "--host", "192.0.2.1", "--port", "0")
    assert "cannot listen on 192.0.2.1" in result.stderr
