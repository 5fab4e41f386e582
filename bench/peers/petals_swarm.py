"""The outer side of PETALS: servers and a client on loopback, processes in an environment of their own."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from swarm.stream import Answer

from peers.machine import process_tree
from peers.process import Driver, EngineDied, EngineProcess

_FOLDER = Path(__file__).parent
_PREFIX = "bench"
_START_S = 600.0
_ANSWER_S = 1500.0
# A killed server stays in the others' tables until what it announced expires; a new one is in them after one more look.
_KNOWN_S = 240.0


class PetalsServer(EngineProcess):
    """One server of one span; ready when it serves."""

    address = ""

    def __init__(
        self, python: Path, model: Path, blocks: str, threads: int, known: str | None, folder: Path
    ) -> None:
        self.blocks = blocks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [str(python), str(_FOLDER / "petals_server.py"), str(model)]
        command += ["--block_indices", blocks, "--torch_dtype", "bfloat16", "--device", "cpu"]
        command += ["--throughput", "1", "--dht_prefix", _PREFIX, "--num_handlers", "4", "--no_auto_relay"]
        command += ["--attn_cache_tokens", "32768", "--inference_max_length", "2048", "--update_period", "10"]
        command += ["--host_maddrs", f"/ip4/127.0.0.1/tcp/{self._port}"]
        command += ["--initial_peers", known] if known else ["--new_swarm"]
        super().__init__(f"PETALS server {blocks}", command, {"PETALS_CACHE": str(folder)}, threads)

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]

    def kill(self) -> float:
        """SIGKILL to all of its processes; returns when, by the wall clock."""
        processes = process_tree(self._process.pid)
        at_s = time.time()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return at_s

    def __exit__(self, *_: object) -> None:
        self.kill()  # it takes its time to end by itself
        super().__exit__()

    def _wait_ready(self) -> None:
        end_s = time.monotonic() + _START_S
        address = re.compile(rf"/ip4/127\.0\.0\.1/tcp/{self._port}/p2p/\w+")
        while time.monotonic() < end_s:
            # Not read(): the process writes at the same position of the file.
            log = os.pread(self._log.fileno(), 2**24, 0).decode(errors="replace")
            if (found := address.search(log)) and "[INFO] Started" in log:
                self.address = found[0]
                return
            if self._process.poll() is not None:
                raise self._died("ended")
            time.sleep(0.1)
        raise self._died(f"was not ready within {_START_S:.0f} s")


class PetalsClient(Driver):
    """The process with the client; its commands are those of petals_client.py."""

    def next_line(self) -> dict[str, Any]:
        """One more line of the answer to what was asked last."""
        return self._read_line(_ANSWER_S)

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)  # threads that wait for servers would keep it
        super().__exit__()


class PetalsSwarm:
    """Servers, one for each span, and a client; entering starts them one after another, leaving ends all."""

    name = "PETALS"
    serves_many = True

    def __init__(
        self, python: Path, model: Path, spans: Sequence[str], threads: int, folder: Path, *, replays: bool
    ) -> None:
        self._python, self._model, self._spans = python, model, spans
        self._threads, self._folder, self._replays = threads, folder, replays
        self._servers: list[PetalsServer] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end_servers)
            for blocks in self._spans:
                self._start_server(blocks)
            settings: Mapping[str, Any] = {
                "model": str(self._model),
                "prefix": _PREFIX,
                "initial_peers": [server.address for server in self._servers],
                "threads": self._threads,
                "replays": self._replays,
            }
            command = [str(self._python), str(_FOLDER / "petals_client.py"), json.dumps(settings)]
            client = PetalsClient(
                "PETALS client", command, {"PETALS_CACHE": str(self._folder)}, self._threads
            )
            self._client = stack.enter_context(client)
            self.versions: dict[str, str] = client.facts
            self._wait_known()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def suspend(self) -> None:
        """Nothing: servers that sleep are forgotten by the others."""

    def resume(self) -> None:
        """Nothing, as it was never suspended."""

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """Ask for so many tokens after every prompt, all at once."""
        result = self._client.ask(
            {"prompts": [list(prompt) for prompt in prompts], "output_tokens": tokens}, longest_s=_ANSWER_S
        )
        return _answers(result)

    def answer_under_kill(self, prompt: Sequence[int], tokens: int, at_token: int) -> tuple[Answer, float]:
        """An answer of which the last server is killed when it has `at_token` tokens, and when that was.

        A client that cannot go on gives up after its fifth failure in a row, which takes it 7 seconds of waiting.
        """
        command = {"prompts": [list(prompt)], "output_tokens": tokens, "tell_at": at_token, "max_retries": 5}
        told = self._client.ask(command, longest_s=_ANSWER_S)
        if "told_at" not in told:
            raise RuntimeError(f"the answer ended before it was struck: {told['errors']}")
        victim = next(server for server in self._servers if server.peer == told["peers"][-1])
        killed_s = victim.kill()
        (answer,) = _answers(self._client.next_line())
        return answer, killed_s

    def put_back(self) -> None:
        """Start servers again that were killed, and wait until the client knows them."""
        for server in list(self._servers):
            if not server.is_running:
                self._servers.remove(server)
                server.__exit__()
                self._start_server(server.blocks)
        self._wait_known()

    def _start_server(self, blocks: str) -> None:
        known = self._servers[0].address if self._servers else None
        server = PetalsServer(self._python, self._model, blocks, self._threads, known, self._folder)
        self._servers.append(server.__enter__())

    def _end_servers(self) -> None:
        for server in self._servers:
            server.__exit__()

    def _wait_known(self) -> None:
        """Until the client's table has every server and no other."""
        expected = sorted(server.peer for server in self._servers)
        end_s = time.monotonic() + _KNOWN_S
        while (known := self._client.ask({"servers": True})["peers"]) != expected:
            if time.monotonic() > end_s:
                raise EngineDied(f"PETALS' client knows {known} instead of {expected}")
            time.sleep(1)


def _answers(result: Mapping[str, Any]) -> list[Answer]:
    fields = (result["token_ids"], result["unix_s"], result["errors"])
    return [Answer(*values) for values in zip(*fields, strict=True)]
