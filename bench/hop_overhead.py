"""What a hop costs for each token besides the model's arithmetic: CPU, by part, and the latency it adds.

Real processes on loopback: 2 or 4 machines in a chain, as `plait join` runs them (event loop, TLS, membership,
scheduler, engine thread), and a gateway that asks for 1, 8 or 32 answers at once. The model is 4096 wide with bfloat16
hidden states (8 KiB a token, as of an 8B model) and nearly nothing inside: its matrices are as narrow as the kernels
take them, so that a pass is short and its data stays in the cache.

Per token and hop: the CPU time of a machine's process (all its threads, by its own clock) less that of its native
calls (by the clock of the thread that makes them) and what it uses in so many seconds without any session, divided by
the tokens that went through. Python around the native call and sampling are in it; heartbeats, gossip and polls are
not, since they come by the second and not by the token: they have a figure of their own. The parts come from runs of
their own, in which functions are timed, each without those it calls; what no function was charged for is the event
loop, its wake-ups and the hand-over between its thread and the engine's.

CPU clocks count what a process computed; on a busy machine that takes longer, since others empty its caches, and the
latency, a wall clock's, means nothing there. The load average before the run is in the result.

    python bench/hop_overhead.py [--repeats 5]         about 4 minutes on two cores
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import uvloop
from hops.hop_worker import ARITHMETIC, Clocks, Place, make_node, make_source
from hops.wide_model import BLOCKS, HIDDEN, write_model
from results import Figure, write_result

from plait.ids import RequestId
from plait.session import GenerationRequest, SamplingParams
from plait.worker import MemberOptions, SwarmGateway, SwarmOptions

PROMPT_TOKENS = 16
WARM_TOKENS = 20
SESSIONS = {1: 400, 8: 150, 32: 60}
"""Answers at once, and the tokens of each that are measured."""
IDLE_S = 3.0
CASES = tuple((hops, sessions) for hops in (2, 4) for sessions in SESSIONS)
TARGET_US = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One window of steady decoding; times are of one token at one hop unless they say otherwise."""

    hops: int
    sessions: int
    repeat: int
    timed_parts: bool
    tokens: int
    seconds: float
    cpu_us: float
    cpu_us_by_hop: tuple[float, ...]
    idle_us: float
    """What heartbeats, gossip and polls used in the meantime, which is not in `cpu_us`."""
    arithmetic_us: float
    parts_us: dict[str, float]
    switches: float
    added_ms: float
    """Latency that a hop adds to a token of a session: all but the native call."""
    gateway_cpu_us: float
    """Of a token, not of a hop."""


# -- the machines ---------------------------------------------------------------------------------------------


class Worker:
    """A machine's process."""

    def __init__(self, place: Place) -> None:
        command = [sys.executable, "-m", "hops.hop_worker", json.dumps(asdict(place))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        )

    def ready(self) -> None:
        self._line()

    def ask(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def clocks(self) -> Clocks:
        return Clocks(**json.loads(self._line()))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a machine has ended")
        return line


def read_all(workers: Sequence[Worker]) -> list[Clocks]:
    for worker in workers:
        worker.ask()
    return [worker.clocks() for worker in workers]


class Chain:
    """A gateway in this process and machines in theirs, each with as many of the model's blocks; enter it to start."""

    def __init__(self, folder: Path, hops: int, *, timed_parts: bool) -> None:
        self._folder = str(folder)
        self._hops = hops
        self._timed_parts = timed_parts
        self.workers: list[Worker] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        node = make_node("gateway")
        self.gateway = SwarmGateway(
            node,
            names=("wide",),
            open_source=lambda on_progress: make_source(self._folder),
            member_options=MemberOptions(name="gateway", blocks="none"),
            swarm_options=SwarmOptions(wire_format="bfloat16"),
            ticket_s=3600.0,
        )
        await self._stack.enter_async_context(self.gateway)
        assert await self.gateway.engine.wait_settled() == "ready", self.gateway.engine.failure
        each = BLOCKS // self._hops
        for hop in range(self._hops):
            place = Place(
                name=f"hop{hop}",
                folder=self._folder,
                first_block=hop * each,
                end_block=(hop + 1) * each,
                introducer="gateway",
                address=node.addresses[0],
                parts=self._timed_parts,
            )
            self.workers.append(Worker(place))
        for worker in self.workers:
            await asyncio.to_thread(worker.ready)
        await self.gateway.wait_covered()
        await asyncio.sleep(1.0)
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._stack.aclose()
        for worker in self.workers:
            worker.end()

    async def idle_s(self) -> float:
        """CPU seconds that a machine without sessions uses in a second."""
        before, began_s = read_all(self.workers), time.perf_counter()
        await asyncio.sleep(IDLE_S)
        used = [now.since(then) for now, then in zip(read_all(self.workers), before, strict=True)]
        return statistics.mean(each.process_s for each in used) / (time.perf_counter() - began_s)

    async def measure(self, sessions: int, repeat: int, idle_s: float) -> Run:
        """Let so many answers flow, and read all clocks at two moments in between."""
        counts = [0] * sessions
        warm, done = asyncio.Event(), asyncio.Event()
        window_tokens = SESSIONS[sessions] * sessions

        async def answer(index: int) -> None:
            sampling = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
            prompt = tuple(range(10 + index, 10 + index + PROMPT_TOKENS))
            id = RequestId(f"{repeat}-{sessions}-{index}")
            request = GenerationRequest(id=id, prompt_token_ids=prompt, sampling=sampling)
            async for delta in self.gateway.engine.generate(request):
                counts[index] += sum(len(sequence.token_ids) for sequence in delta.sequences)
                if min(counts) >= WARM_TOKENS:
                    warm.set()
                if warm.is_set() and sum(counts) >= target_tokens:
                    done.set()

        target_tokens = sys.maxsize
        answers = [asyncio.ensure_future(answer(index)) for index in range(sessions)]
        await until(warm, answers)
        before, own_before_s, began_s = read_all(self.workers), time.process_time(), time.perf_counter()
        first_tokens = sum(counts)
        target_tokens = first_tokens + window_tokens
        await until(done, answers)
        seconds, own_s = time.perf_counter() - began_s, time.process_time() - own_before_s
        tokens = sum(counts) - first_tokens
        used = [now.since(then) for now, then in zip(read_all(self.workers), before, strict=True)]
        for each in answers:
            each.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        await asyncio.sleep(0.5)  # sessions end
        idle_us = idle_s * seconds / tokens * 1e6
        by_hop = [
            (each.process_s - each.arithmetic_s - each.clock_s) / tokens * 1e6 - idle_us for each in used
        ]
        parts_us: dict[str, float] = {}
        for each in used:
            for part, seconds_of_part in each.parts_s.items():
                parts_us[part] = parts_us.get(part, 0.0) + seconds_of_part / tokens / len(used) * 1e6
        cpu_us = statistics.mean(by_hop)
        if parts_us:
            del parts_us[ARITHMETIC]
            parts_us["event loop, wake-ups, threads"] = cpu_us - sum(parts_us.values())
        token_s = seconds * sessions / tokens
        wall_s = sum(each.arithmetic_wall_s for each in used) * sessions / tokens
        return Run(
            hops=self._hops,
            sessions=sessions,
            repeat=repeat,
            timed_parts=self._timed_parts,
            tokens=tokens,
            seconds=seconds,
            cpu_us=cpu_us,
            cpu_us_by_hop=tuple(by_hop),
            idle_us=idle_us,
            arithmetic_us=statistics.mean(each.arithmetic_s for each in used) / tokens * 1e6,
            parts_us=parts_us,
            switches=statistics.mean(each.switches for each in used) / tokens,
            added_ms=(token_s - wall_s) / self._hops * 1e3,
            gateway_cpu_us=own_s / tokens * 1e6,
        )


async def until(event: asyncio.Event, answers: Sequence[asyncio.Future[None]]) -> None:
    """Wait for an event while all answers go on."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting, *answers], return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        ended = next(each for each in answers if each.done())
        raise RuntimeError("an answer has ended early") from ended.exception()


# -- what came of it ------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in (statistics.median(values), min(values), max(values))]


def summary_of(runs: Sequence[Run], idle_s: Sequence[float]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "goal: CPU us per token and hop": TARGET_US,
        "an idle machine: CPU ms per s, median, least, most": spread([each * 1e3 for each in idle_s]),
    }
    for hops, sessions in CASES:
        of_case = [run for run in runs if (run.hops, run.sessions) == (hops, sessions)]
        plain = [run for run in of_case if not run.timed_parts]
        timed = [run for run in of_case if run.timed_parts]
        if not plain:
            continue
        figures: dict[str, Any] = {
            "CPU us per token and hop: median, least, most": spread([run.cpu_us for run in plain]),
            "arithmetic, not in it, us": round(statistics.median(run.arithmetic_us for run in plain), 1),
            "gateway: CPU us per token": spread([run.gateway_cpu_us for run in plain]),
            "context switches per token and hop": round(statistics.median(run.switches for run in plain), 2),
        }
        if sessions == 1:
            figures["latency that a hop adds, ms"] = [
                round(value, 2)
                for value in (
                    statistics.median(run.added_ms for run in plain),
                    min(run.added_ms for run in plain),
                    max(run.added_ms for run in plain),
                )
            ]
        if timed:
            parts = dict.fromkeys(part for run in timed for part in run.parts_us)
            figures["parts, us"] = {
                part: round(statistics.median(run.parts_us.get(part, 0.0) for run in timed), 1)
                for part in sorted(parts)
            }
        summary[f"{hops} hops, {sessions} {'session' if sessions == 1 else 'sessions'}"] = figures
    return summary


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    cpu = Figure(
        "CPU of everything but the arithmetic", "sessions at once", "us per token and hop", log_x=True
    )
    parts = Figure("its parts, 4 hops", "sessions at once", "us per token and hop", log_x=True)
    counts = list(SESSIONS)

    def medians(hops: int, timed: bool, value: Callable[[Run], float]) -> list[float]:
        return [
            statistics.median(
                value(run)
                for run in runs
                if (run.hops, run.sessions, run.timed_parts) == (hops, sessions, timed)
            )
            for sessions in counts
        ]

    for hops in (2, 4):
        cpu.add_line(f"{hops} hops", counts, medians(hops, False, lambda run: run.cpu_us))
    cpu.add_line("goal", counts, [TARGET_US] * len(counts))
    names = dict.fromkeys(part for run in runs if run.hops == 4 for part in run.parts_us)
    for part in names:

        def of_part(run: Run, part: str = part) -> float:
            return run.parts_us.get(part, 0.0)

        parts.add_line(part, counts, medians(4, True, of_part))
    return [cpu, parts]


async def run_all(repeats: int, cases: Sequence[tuple[int, int]]) -> tuple[list[Run], list[float]]:
    runs: list[Run] = []
    idle: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for hops in dict.fromkeys(hops for hops, _ in cases):
            for timed_parts in (False, True):
                async with Chain(Path(folder), hops, timed_parts=timed_parts) as chain:
                    idle_s = await chain.idle_s()
                    if not timed_parts:
                        idle.append(idle_s)
                    counts = [sessions for of_hops, sessions in cases if of_hops == hops]
                    await chain.measure(counts[0], -1, idle_s)
                    for repeat in range(repeats):
                        for sessions in counts:
                            runs.append(await chain.measure(sessions, repeat, idle_s))
                            print(_line(runs[-1]), file=sys.stderr)
    return runs, idle


def _line(run: Run) -> str:
    short = replace(run, parts_us={})
    return (
        f"{short.hops} hops, {short.sessions} sessions{', timed' if run.timed_parts else ''}: {run.cpu_us:.0f} us "
        f"({', '.join(f'{each:.0f}' for each in run.cpu_us_by_hop)}), arithmetic {run.arithmetic_us:.0f} us, "
        f"+{run.added_ms:.2f} ms a hop, gateway {run.gateway_cpu_us:.0f} us, {run.switches:.1f} switches"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 4], choices=(2, 4))
    parser.add_argument("--dry", action="store_true", help="print the summary, write nothing")
    arguments = parser.parse_args()
    cases = [(hops, sessions) for hops, sessions in CASES if hops in arguments.hops]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runs, idle = runner.run(run_all(arguments.repeats, cases))
    summary = summary_of(runs, idle)
    if arguments.dry:
        print(json.dumps(summary, indent=1))
        return
    write_result(
        "hop_overhead",
        settings={
            "repeats": arguments.repeats,
            "hidden": HIDDEN,
            "wire_format": "bfloat16",
            "tokens_measured_of_each_session": SESSIONS,
        },
        samples=[asdict(run) for run in runs],
        summary=summary,
        figures=figures_of(runs),
    )


if __name__ == "__main__":
    main()
