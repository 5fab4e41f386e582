"""Speed of an answer against how often transfers fail: plait's replay, starting again, and no caches at all.

The study of PETALS (Borzunov et al. 2023, NeurIPS) on a virtual clock: four machines in a chain, two spares for each;
every time a machine is sent inputs, it dies with the given probability, and comes back, empty, two seconds later. The
gateway, workers, sessions and links are the live ones, the model one of hashes, and the times of passes and links are
set: a round of one token takes 60 ms. Three ways to get 128 tokens after a prompt of 64:

    replay    what plait does: the lost range is computed again from what its neighbour kept
    restart   an answer whose chain breaks is begun anew
    no cache  every token is a request of its own, with all before it as its prompt

Tokens per second of whole answers, all of which must be right. Seconds are virtual: a busy machine changes nothing.

    python bench/failure_rate.py            some minutes on one core
    python bench/failure_rate.py --quick    to see that it works; writes nothing
"""

import argparse
import asyncio
import logging
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from results import Figure, write_result

from plait.errors import ServingError
from plait.ids import PeerId, RequestId
from plait.session import GenerationRequest, SamplingParams
from plait.simulator import run_virtual
from plait.simulator.fault_schedule import FaultSchedule, MachinePlan
from plait.simulator.hash_model import some_prompt, true_answer
from plait.simulator.machine import Machine, Observer, WorkerMachine
from plait.simulator.trial_swarm import TrialSwarm
from plait.transport import Wire
from plait.wire import Message, Step

CHAIN, SPARES = 4, 2
PROMPT_TOKENS, TOKENS = 64, 128
STEP_S, TOKEN_S, LINK_S = 0.0095, 0.0005, 0.005
BACK_S = 2.0
LONGEST_S = 600.0
"""A way that has not got an answer by then is counted with what it has."""
FAILURE_FRACTIONS = (0.0, 1e-4, 1e-3, 1e-2)

Ask = Callable[["UnsteadySwarm", GenerationRequest], Awaitable[int]]


class UnsteadySwarm:
    """A swarm whose machines die while they are sent inputs."""

    def __init__(self, seed: int, failure_fraction: float) -> None:
        self.failures = 0
        self._failure_fraction = failure_fraction
        self._rng = np.random.default_rng([seed, 1])
        self._swarm = TrialSwarm(
            _schedule(seed),
            Observer(
                note=lambda text: None,
                violate=_violate,
                on_send=self._on_send,
                on_hear=lambda machine, peer, message: None,
                on_drop=lambda machine, peer, reason: None,
            ),
            on_machine=lambda machine: None,
        )
        self.gateway = self._swarm.gateway.engine

    async def start(self) -> None:
        await self._swarm.start()

    async def close(self) -> None:
        self._swarm.closed = True
        for machine in (living := self._swarm.living()):
            machine.leave()
        for machine in living:
            await machine.left()

    @property
    def broken_chains(self) -> int:
        return self.gateway.counts().recoveries_total

    def _on_send(self, machine: Machine, peer: PeerId, message: Message) -> None:
        if isinstance(message, Step) and self._rng.random() < self._failure_fraction:
            victims = [worker for worker in self._swarm.living_workers() if worker.peer == peer]
            for victim in victims:
                self.failures += 1
                asyncio.get_running_loop().call_soon(self._kill, victim)

    def _kill(self, victim: WorkerMachine) -> None:
        if not victim.dead:
            victim.process.kill()
            self._swarm.net.kill(victim.name)
            asyncio.get_running_loop().call_later(BACK_S, self._come_back, victim)

    def _come_back(self, victim: WorkerMachine) -> None:
        self._swarm.net.revive(victim.name)
        self._swarm.join(victim.plan)


def _violate(text: str) -> None:
    raise AssertionError(text)


def _schedule(seed: int) -> FaultSchedule:
    machines = tuple(
        MachinePlan(
            name=f"{'abcd'[block]}{number}",
            blocks=range(block, block + 1),
            joins_s=0.0,
            clock_ahead_s=0.0,
            step_s=STEP_S,
            token_s=TOKEN_S,
            kv_blocks=128,
            swap_blocks=0,
            step_tokens=256,
            kept_bytes=1 << 20,
            sheltered=False,
        )
        for block in range(CHAIN)
        for number in range(1 + SPARES)
    )
    return FaultSchedule(
        seed=seed,
        tight=False,
        machines=machines,
        requests=(),
        faults=(),
        wire=Wire(delay_s=LINK_S),
        draft_tokens=0,
    )


async def replay(swarm: UnsteadySwarm, request: GenerationRequest) -> int:
    """Get an answer as plait gives it; returns how many of its tokens came."""
    token_ids: list[int] = []
    async for delta in swarm.gateway.generate(request):
        token_ids += [token_id for part in delta.sequences for token_id in part.token_ids]
    assert tuple(token_ids) == true_answer(request)[0]
    return len(token_ids)


async def restart(swarm: UnsteadySwarm, request: GenerationRequest) -> int:
    """Begin again whenever the chain breaks."""
    attempt = 0
    while True:
        attempt += 1
        before = swarm.broken_chains
        token_ids: list[int] = []
        deltas = swarm.gateway.generate(_named(request, f"{request.id} {attempt}"))
        async for delta in deltas:
            token_ids += [token_id for part in delta.sequences for token_id in part.token_ids]
            if swarm.broken_chains > before:
                break
        else:
            assert tuple(token_ids) == true_answer(request)[0]
            return len(token_ids)
        await deltas.aclose()


async def no_cache(swarm: UnsteadySwarm, request: GenerationRequest) -> int:
    """Ask for one token at a time; nothing stays at the machines in between."""
    token_ids = list(request.prompt_token_ids)
    for place in range(TOKENS):
        one = GenerationRequest(
            id=RequestId(f"{request.id} {place}"),
            prompt_token_ids=tuple(token_ids),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0, seed=0),
        )
        async for delta in swarm.gateway.generate(one):
            token_ids += [token_id for part in delta.sequences for token_id in part.token_ids]
    assert tuple(token_ids[PROMPT_TOKENS:]) == true_answer(request)[0]
    return TOKENS


WAYS: dict[str, Ask] = {"replay (plait)": replay, "restart": restart, "no cache": no_cache}


def _named(request: GenerationRequest, id: str) -> GenerationRequest:
    return GenerationRequest(
        id=RequestId(id), prompt_token_ids=request.prompt_token_ids, sampling=request.sampling
    )


async def _one_answer(way: Ask, failure_fraction: float, seed: int) -> dict[str, float]:
    swarm = UnsteadySwarm(seed, failure_fraction)
    await swarm.start()
    loop = asyncio.get_running_loop()
    request = GenerationRequest(
        id=RequestId("asked"),
        prompt_token_ids=some_prompt(np.random.default_rng(seed), PROMPT_TOKENS),
        sampling=SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.0, seed=0),
    )
    began_s, tokens = loop.time(), 0
    try:
        async with asyncio.timeout(LONGEST_S):
            tokens = await way(swarm, request)
    except (TimeoutError, ServingError):
        pass
    seconds = loop.time() - began_s
    failures, replayed = swarm.failures, swarm.gateway.counts().replayed_tokens_total
    await swarm.close()
    return {
        "tokens": tokens,
        "seconds": seconds,
        "failures": failures,
        "replayed_tokens": replayed,
    }


def measure(answers: int) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    for fraction in FAILURE_FRACTIONS:
        for name, way in WAYS.items():
            runs = [run_virtual(_one_answer(way, fraction, seed)) for seed in range(answers)]
            seconds = sum(run["seconds"] for run in runs)
            cells.append(
                {
                    "way": name,
                    "failure_fraction": fraction,
                    "tokens_per_s": sum(run["tokens"] for run in runs) / seconds,
                    "answers": sum(run["tokens"] == TOKENS for run in runs),
                    "failures": sum(run["failures"] for run in runs),
                    "longest_s": max(run["seconds"] for run in runs),
                    "median_s": statistics.median(run["seconds"] for run in runs),
                    "runs": runs,
                }
            )
            print({key: value for key, value in cells[-1].items() if key != "runs"}, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--answers", type=int, default=10, help="in each cell")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of every failure
    cells = measure(1 if options.quick else options.answers)
    if options.quick:
        return
    figure = Figure(
        "128 tokens over four machines",
        "share of transfers that fail (none: at 1e-5)",
        "tokens/s",
        log_x=True,
    )
    for name in WAYS:
        figure.add_line(
            name,
            [max(fraction, 1e-5) for fraction in FAILURE_FRACTIONS],
            [cell["tokens_per_s"] for cell in cells if cell["way"] == name],
        )
    write_result(
        "failure_rate",
        settings={
            "answers": options.answers,
            "chain": CHAIN,
            "spares": SPARES,
            "prompt_tokens": PROMPT_TOKENS,
            "tokens": TOKENS,
            "step_s": STEP_S,
            "token_s": TOKEN_S,
            "link_s": LINK_S,
            "back_s": BACK_S,
            "longest_s": LONGEST_S,
        },
        summary={
            name: {
                str(cell["failure_fraction"]): {
                    key: cell[key] for key in ("tokens_per_s", "answers", "failures", "median_s", "longest_s")
                }
                for cell in cells
                if cell["way"] == name
            }
            for name in WAYS
        },
        samples=cells,
        figures=[figure],
    )


if __name__ == "__main__":
    main()
