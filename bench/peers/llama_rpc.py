"""llama.cpp over RPC servers on loopback: one of them for each part of the model, and llama-server before them.

Its packages come without the RPC backend: PEERS_ROOT/lib/libggml-rpc.so is that backend, built from the same source
(with GGML_BACKEND_DL) to be loaded at run time, PEERS_ROOT/bin/rpc-server the program that serves a machine with it.
"""

import contextlib
import json
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx
from swarm.stream import Answer

from peers.process import EngineProcess, Server

_START_S = 60.0
_ANSWER_S = 600.0
# Threads that spin, which are best for llama.cpp alone, would take the cores from the server whose turn it is.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


def missing_files(peers_root: Path, gguf: Path) -> str:
    """What is not installed; empty if nothing is."""
    needed = (peers_root / "bin/llama-server", *_rpc_files(peers_root), gguf)
    return ", ".join(path.name for path in needed if not path.exists())


def _rpc_files(peers_root: Path) -> tuple[Path, Path]:
    return peers_root / "bin/rpc-server", peers_root / "lib/libggml-rpc.so"


class _RpcServer(EngineProcess):
    """Holds a part of the weights and computes it for who connects."""

    def __init__(self, peers_root: Path, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        program, backend = _rpc_files(peers_root)
        command = [str(program), "--device", "CPU", "--threads", str(threads), "--port", str(port)]
        environment = _ENVIRONMENT | {"GGML_BACKEND_PATH": str(backend)}
        super().__init__("llama.cpp rpc-server", command, environment, threads)

    def _wait_ready(self) -> None:
        host, _, port = self.address.partition(":")
        end_s = time.monotonic() + _START_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise self._died("ended")
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
                return
            time.sleep(0.05)
        raise self._died(f"was not ready within {_START_S:.0f} s")


class LlamaRpc:
    """RPC servers that share the model's layers equally, behind one llama-server, which holds none."""

    name = "llama.cpp RPC"
    serves_many = False

    def __init__(self, peers_root: Path, gguf: Path, servers: int, threads: int) -> None:
        self._peers_root, self._gguf = peers_root, gguf
        self._servers, self._threads = servers, threads

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            servers = [
                stack.enter_context(_RpcServer(self._peers_root, self._threads)) for _ in range(self._servers)
            ]
            addresses = ",".join(server.address for server in servers)
            command = [str(self._peers_root / "bin/llama-server"), "--model", str(self._gguf)]
            # The first option, which changes nothing, has it load backends before it reads the next.
            command += ["--override-tensor", "nothing=CPU", "--rpc", addresses, "--gpu-layers", "99"]
            command += ["--tensor-split", ",".join("1" for _ in servers), "--threads", str(self._threads)]
            command += ["--host", "127.0.0.1", "--port", "{port}", "--parallel", "1", "--ctx-size", "512"]
            command += ["--no-cache-prompt", "--cache-ram", "0"]
            environment = _ENVIRONMENT | {"GGML_BACKEND_PATH": str(_rpc_files(self._peers_root)[1])}
            server = Server(self.name, command, environment, self._threads)
            self._server = stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def suspend(self) -> None:
        """Nothing: its threads sleep when it has nothing to do."""

    def resume(self) -> None:
        """Nothing, as it was never suspended."""

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        (prompt,) = prompts
        answer = Answer()
        body = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_tokens": True}
        url = f"{self._server.origin}/completion"
        with httpx.stream("POST", url, json=body, timeout=_ANSWER_S) as response:
            for line in response.raise_for_status().iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    # A token that ends within a character is counted, but sent with no event of its own.
                    answer.token_ids += event.get("tokens") or []
                    answer.unix_s += [time.time()] * (event["tokens_predicted"] - len(answer.unix_s))
        return [answer]
