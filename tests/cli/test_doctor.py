"""`plait doctor`: what this machine can do, and why not."""

import json
import socket

import torch
from running_plait import InProcess


def test_it_says_that_this_machine_can_serve(plait: InProcess) -> None:
    result = plait("doctor", "--json", "--port", "0")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["can_serve"]
    topics = {finding["topic"] for finding in report["findings"]}
    assert topics >= {
        "python",
        "torch",
        "device",
        "cores",
        "vectors",
        "memory",
        "model size",
        "cache",
        "port",
    }
    assert report["largest_model_parameters"]["bfloat16"] >= report["largest_model_parameters"]["float32"] > 0
    assert 1 <= report["machine"]["usable_cores"] <= report["machine"]["cores"]


def test_a_port_in_use_is_a_limit_and_no_failure(plait: InProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = plait("doctor", "--port", str(port))
    assert result.exit_code == 0
    assert f"127.0.0.1:{port} is not free" in result.stdout


def test_a_device_that_is_asked_for_and_missing_fails(plait: InProcess) -> None:
    result = plait("doctor", "--port", "0", "--device", "cuda", "--json")
    assert result.exit_code == (0 if torch.cuda.is_available() else 1)


def test_the_hub_is_asked_only_when_told(plait: InProcess) -> None:
    assert "hub" not in plait("doctor", "--port", "0").stdout.replace("huggingface/hub", "").replace(
        "hf/hub", ""
    )
