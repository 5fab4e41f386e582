"""KV blocks lent between processes: a request longer than its machine's pool, whose creditors and debtors die."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running_plait import RunningPlait, plait_environment

from plait import LLM, SamplingParams

POOL_TOKENS = 64
PROMPT_TOKENS = 50
# Keys and values of 6 blocks, and the inputs that are kept beside them.
TOKEN_BYTES = 6 * 2 * 4 * 32 * 4 + 1544
SETTINGS = (
    "lending.borrow_tokens=1024",
    "lending.lend_fraction=1",
    "lending.keep_free_fraction=0",
    "swarm.announce_s=0.25",
)
LENDING = ("--lending", "pull", *(word for setting in SETTINGS for word in ("--set", setting)))
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 11}
WITHIN_S = 240.0


class LendingSwarm:
    """A gateway that computes nothing, and machines that serve all of `tiny` in pools of 64 tokens."""

    def __init__(self, folder: Path, stack: ExitStack, names: str) -> None:
        self._folder = folder
        self._stack = stack
        self._environment = plait_environment(folder / "gateway")
        gateway = ("--swarm", "--port", "0", "--blocks", "none", "--dtype", "float32")
        self.gateway = stack.enter_context(
            RunningPlait("serve", "tiny", *gateway, environment=self._environment, deadline_s=900)
        )
        self.ticket = self.gateway.wait_for("plait join plait1").split()[-1]
        self.machines: dict[str, RunningPlait] = {}
        for name in names:
            self.join(name)
        for machine in self.machines.values():
            machine.wait_for("ready:")
        self.until(lambda: all(self.machine(name).get("linked") for name in names), "all machines linked")

    def join(self, name: str) -> None:
        pool = ("--blocks", "0:6", "--kv-cache-memory", str(POOL_TOKENS * TOKEN_BYTES))
        machine = RunningPlait(
            *("join", self.ticket, "--name", name, "--no-rebalance", *pool, *LENDING),
            environment=plait_environment(self._folder / name),
            deadline_s=900,
        )
        self.machines[name] = self._stack.enter_context(machine)

    @property
    def origin(self) -> str:
        return self.gateway.origin

    def machine(self, name: str) -> dict[str, Any]:
        """What the gateway knows of a machine; nothing while it does not know it."""
        machines = httpx.get(self.origin + "/swarm/status", timeout=30).json()["machines"]
        return next((machine for machine in machines if machine["name"] == name), {})

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + WITHIN_S
        while not holds():
            assert time.monotonic() < deadline_s, f"{what} did not come about"
            time.sleep(0.05)

    def wait_free(self, *names: str) -> None:
        """Until these hold nothing, neither their own nor others'."""
        self.until(lambda: all(is_free(self.machine(name)) for name in names), f"pools of {names} free")

    def ask(
        self,
        tokens: int,
        sampling: dict[str, Any],
        at: dict[int, Callable[[], None]] | None = None,
        number: int = 0,
    ) -> list[int]:
        """Stream an answer from machine `a`; `at`: what to do once so many tokens have come."""
        due = dict(at or {})
        body = {
            "prompt": prompt(number),
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "route": {"pinned": ["a"]},
            **sampling,
        }
        token_ids: list[int] = []
        with httpx.stream("POST", self.origin + "/v1/completions", json=body, timeout=WITHIN_S) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                token_ids += event["choices"][0].get("token_ids") or []
                for count in [count for count in due if len(token_ids) >= count]:
                    due.pop(count)()
        assert not due
        return token_ids

    def creditor(self) -> str:
        """Who has lent most."""
        lent = {name: self.machine(name)["lending"]["lent_blocks"] for name in self.machines if name != "a"}
        name = max(lent, key=lambda name: lent[name])
        assert lent[name], "nobody has lent anything yet"
        return name


def is_free(machine: dict[str, Any]) -> bool:
    if not machine or machine["kv_free_tokens"] != machine["kv_total_tokens"] or machine["sessions"]:
        return False
    return not machine["lending"]["lent_blocks"] and not machine["lending"]["borrowed_blocks"]


def prompt(number: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(number).integers(300, 2000, PROMPT_TOKENS)]


def of_one_machine(tokens: int, sampling: dict[str, Any], number: int = 0) -> list[int]:
    with LLM("tiny", dtype="float32", threads=1) as llm:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
        (output,) = llm.generate([prompt(number)], params)
    return list(output.outputs[0].token_ids)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as it:
        yield it


@pytest.mark.timeout(900)
def test_an_answer_longer_than_its_pool_outlives_its_creditor(tmp_path: Path, stack: ExitStack) -> None:
    """More than twice the pool; who lent most is killed in the middle of the second."""
    swarm = LendingSwarm(tmp_path, stack, "abc")
    assert 16 * swarm.machine("a")["lending"]["kv_blocks"] == POOL_TOKENS
    assert swarm.ask(100, SEEDED) == of_one_machine(100, SEEDED)
    assert swarm.machine("a")["lending"]["moved_out_total"] >= (PROMPT_TOKENS + 100 - POOL_TOKENS) // 16
    swarm.wait_free("a", "b", "c")
    killed: list[str] = []

    def kill() -> None:
        killed.append(swarm.creditor())
        swarm.machines[killed[0]].signal(signal.SIGKILL)

    assert swarm.ask(60, GREEDY, {35: kill}, number=1) == of_one_machine(60, GREEDY, number=1)
    swarm.wait_free(*({"a", "b", "c"} - set(killed)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("struck", ["creditor", "debtor", "manager"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_an_answer_outlives_whom_it_depends_on(
    tmp_path: Path, stack: ExitStack, struck: str, number: signal.Signals
) -> None:
    """Whoever was frozen goes on afterwards, and holds nothing then."""
    swarm = LendingSwarm(tmp_path, stack, "abcd")
    victims: list[str] = []

    def strike() -> None:
        machines = {name: swarm.machine(name)["lending"] for name in "abcd"}
        managers = [name for name, lending in machines.items() if lending["manages"]]
        victim = {"debtor": "a", "manager": managers[0]}.get(struck) or swarm.creditor()
        victims.append(victim)
        swarm.machines[victim].signal(number)

    answer = swarm.ask(70, SEEDED, {35: strike}, number=2)
    assert answer == of_one_machine(70, SEEDED, number=2)
    swarm.wait_free(*(set("abcd") - set(victims)))
    if number == signal.SIGSTOP:
        swarm.machines[victims[0]].signal(signal.SIGCONT)
        swarm.wait_free(*"abcd")
