"""plait as `bench/petals.py` wants it: a swarm on loopback, asked over HTTP."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from swarm.processes import SwarmOfProcesses
from swarm.stream import Answer, stream_answer


class PlaitSwarm:
    """Workers, one for each span, and a gateway that serves no blocks."""

    name = "plait"
    serves_many = True

    def __init__(self, model: Path, spans: Sequence[str], threads: int) -> None:
        self._spans = {f"w{number}": blocks for number, blocks in enumerate(spans)}
        # Workers read the checkpoint themselves, in the format that the gateway says.
        self._worker = ("--threads", str(threads), "--set", f"model.name={model}")
        gateway = ("--blocks", "none", "--dtype", "bfloat16", "--set", "swarm.announce_s=1")
        self._swarm = SwarmOfProcesses(*gateway, model=str(model))
        self._victim = ""

    def __enter__(self) -> Self:
        self._swarm.__enter__()
        try:
            for name in self._spans:
                self._start(name)
            self._swarm.wait_ready(*self._spans)
        except BaseException:
            self._swarm.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._swarm.__exit__()

    def suspend(self) -> None:
        """Nothing: machines that miss heartbeats are given up by the others."""

    def resume(self) -> None:
        """Nothing, as it was never suspended."""

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        answers = [Answer() for _ in prompts]

        def ask(index: int) -> None:
            answers[index] = stream_answer(self._swarm.origin, prompts[index], tokens, temperature=0.0)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def answer_under_kill(self, prompt: Sequence[int], tokens: int, at_token: int) -> tuple[Answer, float]:
        struck_s: list[float] = []
        *chain, self._victim = list(self._spans)[: len(self._spans) - 1]

        def strike(count: int) -> None:
            if count >= at_token and not struck_s:
                struck_s.append(self._swarm.kill(self._victim))

        route = {"pinned": [*chain, self._victim]}
        answer = stream_answer(self._swarm.origin, prompt, tokens, strike, route=route, temperature=0.0)
        if not struck_s:
            raise RuntimeError(f"the answer ended before it was struck: {answer.error}")
        return answer, struck_s[0]

    def put_back(self) -> None:
        self._swarm.machines[self._victim].end()
        self._start(self._victim)
        self._swarm.wait_ready(self._victim)

    def _start(self, name: str) -> None:
        self._swarm.start(name, self._spans[name], *self._worker)
