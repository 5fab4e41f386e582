"""Where settings come from, which source wins, and what is said about a bad one."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from plait.errors import BadSetup
from plait.scheduling import policy_named
from plait.settings import load_settings, setting_facts


@pytest.fixture(autouse=True)
def only_my_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("PLAIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plait.yaml"
    path.write_text("server: {port: 1001, host: localhost}\nkvcache: {memory: 1GiB}\n")
    return path


def test_defaults_serve_tiny_on_loopback() -> None:
    settings = load_settings()
    assert settings.model.name == "tiny"
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)


def test_a_variable_beats_the_file_and_a_flag_beats_the_variable(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings(file=file).server.port == 1001
    monkeypatch.setenv("PLAIT_SERVER__PORT", "1002")
    assert load_settings(file=file).server.port == 1002
    assert load_settings(file=file, flags={"server.port": "1003"}).server.port == 1003
    assert (
        load_settings(file=file, flags={"server.port": "1003"}, assignments=["server.port=1004"]).server.port
        == 1004
    )


def test_sources_are_merged_leaf_by_leaf(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_SERVER__DRAIN_TIMEOUT_S", "1.5")
    settings = load_settings(file=file, assignments=["kvcache.block_tokens=32"])
    assert (settings.server.host, settings.server.port, settings.server.drain_timeout_s) == (
        "localhost",
        1001,
        1.5,
    )
    assert (settings.kvcache.memory, settings.kvcache.block_tokens) == (2**30, 32)


def test_sizes_take_units() -> None:
    settings = load_settings(flags={"kvcache.memory": "512MiB", "kvcache.swap": "1.5 GB"})
    assert (settings.kvcache.memory, settings.kvcache.swap) == (512 * 2**20, 1_500_000_000)


def test_a_bare_swap_space_is_gibibytes_as_vllm_means_it() -> None:
    assert load_settings(flags={"kvcache.swap": "4"}).kvcache.swap == 4 * 2**30
    assert load_settings(flags={"kvcache.swap": "0"}).kvcache.swap == 0
    assert load_settings(flags={"kvcache.swap": str(2**30)}).kvcache.swap == 2**30


def test_lists_take_commas_in_variables_and_repeats_in_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_MODEL__SERVED_NAMES", "a, b")
    assert load_settings().model.served_names == ("a", "b")
    assert load_settings(flags={"model.served_names": ["c", "d"]}).model.served_names == ("c", "d")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_settings().server.port = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("server.prot=1", "--set sets 'server.prot', which is not a setting; did you mean 'server.port'?"),
        ("servr.port=1", "--set sets 'servr', which is not a setting"),
        ("server.port=70000", r"sets 'server.port' to 70000: input should be less than or equal to 65535"),
        ("kvcache.memory=2 apples", "'2 apples' is not a size"),
        ("model.quantization=awq", "input should be 'none'"),
        ("engine.device=tpu", "choose auto, cpu or cuda"),
        ("server=1", "--set takes section.name=value"),
        ("server.port", "--set takes section.name=value"),
        ("server.port=[", "is not a YAML value"),
        ("kvcache.gpu_memory_fraction=1.5", "less than or equal to 1"),
    ],
)
def test_a_bad_assignment_is_one_sentence_that_says_why(assignment: str, said: str) -> None:
    with pytest.raises(BadSetup) as caught:
        load_settings(assignments=[assignment])
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_an_error_names_the_source(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSetup, match=r"^the flag --port"):
        load_settings(flags={"server.port": "x"})
    monkeypatch.setenv("PLAIT_SERVER__PORT", "y")
    with pytest.raises(BadSetup, match=r"^the environment variable PLAIT_SERVER__PORT"):
        load_settings(file=file)
    monkeypatch.delenv("PLAIT_SERVER__PORT")
    file.write_text("server: {port: z}")
    with pytest.raises(BadSetup, match=r"^the settings file '.*plait.yaml'"):
        load_settings(file=file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: [1]", "must map names to values"),
        ("- 1", "must map sections to settings"),
        ("a: {b: ", "is not YAML"),
        ("sever: {port: 1}", "'sever', which is not a setting"),
    ],
)
def test_a_bad_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadSetup, match=said) as caught:
        load_settings(file=path)
    assert "\n" not in caught.value.message


def test_a_missing_file_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="cannot be read"):
        load_settings(file=tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").touch()
    assert load_settings(file=tmp_path / "empty.yaml") == load_settings()


def test_a_variable_that_looks_like_a_setting_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_SERVER__PROT", "1")
    with pytest.raises(BadSetup, match="names no setting; did you mean 'PLAIT_SERVER__PORT'"):
        load_settings()


def test_a_variable_of_a_whole_section_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_SERVER", "1")
    with pytest.raises(BadSetup, match="names a section; write for example PLAIT_SERVER__HOST"):
        load_settings()


def test_the_variables_that_kubernetes_sets_beside_a_service_are_no_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PLAIT_PORT", "PLAIT_SERVER_PORT", "PLAIT_PORT_8000_TCP"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8000")
    assert load_settings().server.port == 8000


def test_an_api_key_is_never_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_SERVER__API_KEYS", "sk-secret")
    settings = load_settings()
    assert "sk-secret" not in repr(settings)
    with pytest.raises(BadSetup) as caught:
        load_settings(assignments=["server.api_keys={sk-secret: 1}"])
    assert "sk-secret" not in caught.value.message


def test_every_setting_says_what_it_is() -> None:
    facts = setting_facts()
    assert all(fact.text.endswith(".") for fact in facts)
    flags = [fact.flag for fact in facts if fact.flag]
    assert len(flags) == len(set(flags))


def test_the_policies_of_the_tree_are_those_of_scheduling() -> None:
    policies = next(fact for fact in setting_facts() if fact.path == "scheduling.policy").kind.split("|")
    assert {policy_named(name) is not None for name in policies} == {True}
    with pytest.raises(BadSetup) as caught:
        policy_named("none")
    assert all(name in caught.value.message for name in policies)
