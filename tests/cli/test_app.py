"""The command as a whole: help, versions, exit codes, and what it costs to start."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running_plait import InProcess

import plait
from plait.settings import setting_facts

VERBS = (
    "serve",
    "join",
    "up",
    "status",
    "leave",
    "route",
    "chat",
    "generate",
    "demo",
    "models",
    "pull",
    "cache",
    "doctor",
    "settings",
    "version",
    "bench",
    "profile",
    "simulate",
    "token",
)
PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_help_lists_every_verb(plait: InProcess) -> None:
    said = plait("--help").stdout
    assert all(f" {verb} " in said for verb in VERBS)


@pytest.mark.parametrize("verb", [*VERBS, "bench serve", "token new", "token list", "token revoke"])
def test_every_verb_has_help(verb: str, plait: InProcess) -> None:
    result = plait(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_the_page_in_docs_names_every_verb_and_no_flag_that_is_not_there(plait: InProcess) -> None:
    page = PAGE.read_text()
    named = set(re.findall(r"`plait ([a-z]+(?: serve| new)?)", page))
    assert {verb.split()[0] for verb in named} == set(VERBS)
    helps = [plait(*verb.split(), "--help", COLUMNS="300") for verb in named] + [plait("--help")]
    assert all(said.exit_code == 0 for said in helps)
    flags = {flag for said in helps for flag in re.findall(r"--[a-z][a-z-]+", said.stdout)}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= flags


def test_serve_has_the_flag_of_every_setting_that_names_one(plait: InProcess) -> None:
    said = plait("serve", "--help", COLUMNS="300").stdout
    assert all(fact.flag in said for fact in setting_facts())
    assert "--no-enable-prefix-caching" in said


def test_help_needs_neither_torch_nor_http() -> None:
    heavy = {"torch", "numpy", "fastapi", "uvicorn", "httpx", "huggingface_hub", "tokenizers"}
    code = f"import sys, plait.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run((sys.executable, "-c", code), capture_output=True, text=True).stdout == "[]\n"


def test_version(plait: InProcess) -> None:
    assert plait("--version").stdout == f"plait {_VERSION}\n"
    versions = json.loads(plait("version", "--json").stdout)
    assert versions["plait"] == _VERSION
    assert versions["torch"].startswith("2.")
    assert "torch" in plait("version").stdout


def test_an_unknown_verb_is_a_usage_error(plait: InProcess) -> None:
    result = plait("sevre")
    assert result.exit_code == 2
    assert "serve" in result.stderr


def test_settings_shows_what_is_in_effect(plait: InProcess) -> None:
    arguments = ("settings", "--json", "--port", "8002", "--set", "kvcache.block_tokens=32")
    result = plait(*arguments, PLAIT_KVCACHE__MEMORY="1GiB")
    tree = json.loads(result.stdout)
    assert tree["server"]["port"] == 8002
    assert tree["kvcache"]["block_tokens"] == 32
    assert tree["kvcache"]["memory"] == 2**30
    assert "server.port" in plait("settings").stdout


def test_debug_adds_the_traceback(plait: InProcess) -> None:
    assert "Traceback" not in plait("generate", "--log-level", "info").stderr
    assert "Traceback" in plait("generate", "--log-level", "debug").stderr


_VERSION = plait.__version__
