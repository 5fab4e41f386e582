"""A cluster in one file: what follows from it, and what is said about a bad one."""

from pathlib import Path

import pytest

from plait.errors import BadSetup
from plait.settings import Cluster, read_cluster, settings_from

FILE = """
model: tiny
gateway: {port: 8123, listen: "10.0.0.1:7000"}
ray: {address: "10.0.0.1:6379", strategy: PACK}
workers:
  - {count: 2, cpus: 4, memory: 200MB, blocks: "0:3"}
  - {cpus: 2, gpus: 1, device: cuda, threads: 1, resources: {rack_1: 1}}
settings: {swarm: {wire_format: int8}, server: {api_keys: [sk-test]}}
"""


@pytest.fixture(autouse=True)
def only_my_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("PLAIT_")]:
        monkeypatch.delenv(name)


def read(folder: Path, text: str) -> Cluster:
    file = folder / "lab.yaml"
    file.write_text(text)
    return read_cluster(file)


def test_a_group_becomes_so_many_workers_with_names_of_the_file(tmp_path: Path) -> None:
    cluster = read(tmp_path, FILE)
    assert [worker.name for worker in cluster.workers] == ["lab-1", "lab-2", "lab-3"]
    assert [worker.bundle for worker in cluster.workers] == [
        {"CPU": 4.0, "memory": 200e6},
        {"CPU": 4.0, "memory": 200e6},
        {"CPU": 2.0, "GPU": 1.0, "rack_1": 1.0},
    ]
    assert not cluster.is_local and cluster.ray.strategy == "PACK"


def test_the_gateway_and_the_workers_have_the_settings_of_the_file(tmp_path: Path) -> None:
    cluster = read(tmp_path, FILE)
    first, last = (settings_from(cluster.workers[index].tree, "it") for index in (0, 2))
    assert (first.swarm.blocks, first.swarm.memory, first.engine.threads) == ("0:3", 200_000_000, 4)
    assert (last.swarm.blocks, last.engine.device, last.engine.threads) == ("auto", "cuda", 1)
    assert first.swarm.wire_format == last.swarm.wire_format == cluster.gateway.swarm.wire_format == "int8"
    gateway = cluster.gateway
    assert (gateway.model.name, gateway.server.port, gateway.server.swarm) == ("tiny", 8123, True)
    assert (gateway.swarm.listen, gateway.swarm.blocks, gateway.swarm.name) == (
        "10.0.0.1:7000",
        "none",
        "lab-gateway",
    )
    assert [key.get_secret_value() for key in gateway.server.api_keys] == ["sk-test"]


def test_workers_listen_where_the_gateway_can_be_reached_from(tmp_path: Path) -> None:
    def listens(text: str) -> str:
        return settings_from(read(tmp_path, text).workers[0].tree, "it").swarm.listen

    assert listens(FILE) == "0.0.0.0:0"
    assert listens("model: tiny\nworkers: [{count: 1}]") == "127.0.0.1:0"
    assert listens("model: tiny\nworkers: [{listen: '10.0.0.2:7001'}]") == "10.0.0.2:7001"


def test_a_file_without_ray_starts_one_here(tmp_path: Path) -> None:
    assert read(tmp_path, "model: tiny\nworkers: [{count: 1}]").is_local


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must map names to values"),
        ("{", "is not YAML"),
        ("workers: [{count: 1}]", "has no 'model'"),
        ("model: tiny", "has no 'workers'"),
        ("model: tiny\nworkers: []", "'workers'"),
        ("model: tiny\nworkers: [{count: 1}, {cpu: 2}]", "'workers[1].cpu', which is no field; did you mean 'cpus'"),
        ("model: tiny\nworkers: [{count: two}]", "'workers[0].count' as 'two'"),
        ("model: tiny\nworkers: [{memory: much}]", "'workers[0].memory' as 'much'"),
        ("model: tiny\nworkers: [{blocks: 16:32}]", "in quotes, such as '16:32'"),
        ("model: tiny\nworkers: [{cpus: 0}]", "keep nothing for 'workers[0]'"),
        ("model: tiny\nworkers: [{count: 900}, {count: 900}]", "asks for 1800 workers"),
        ("model: tiny\nray: {strategy: LOOSE}\nworkers: [{count: 1}]", "'ray.strategy' as 'LOOSE'"),
        ("model: tiny\nray: {address: 'ray://a:1'}\nworkers: [{count: 1}]", "'ray.address' as 'ray://a:1'"),
        ("model: tiny\ngateway: {listen: here}\nworkers: [{count: 1}]", "'gateway.listen' as 'here'"),
        ("model: tiny\nworkers: [{count: 1}]\nsettings: {swarm: {block: none}}", "did you mean 'swarm.blocks'"),
        ("model: tiny\nworkers: [{count: 1}]\nsettings: {swarm: 3}", "section 'swarm'"),
        ("model: tiny\nworkers: [{count: 1}]\nsettings: {model: {name: other}}", "names the model twice"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadSetup) as raised:
        read(tmp_path, text)
    assert said in raised.value.message
    assert "lab.yaml" in raised.value.message and "\n" not in raised.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"none\.yaml.*cannot be read"):
        read_cluster(tmp_path / "none.yaml")
