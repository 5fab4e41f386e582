"""What an answer notices of machines that die under it: real processes, SIGKILL and SIGSTOP, at every token.

Seven machines serve `tiny` in three spans, each at least twice, behind a gateway that serves none. While a 64-token
answer streams, machines of its chain are ended:

    kill      one, by SIGKILL, after every token of the answer (the three hops in turn)
    freeze    one, by SIGSTOP: its connections stay open
    two       two of the three hops at once, by SIGKILL
    replay    one, and its replacement as soon as that one has the session
    context   one, in the middle of answers to prompts of growing length

Each answer must have the tokens that one engine gives in one process, greedy and by seeded sampling in turn. Recorded
are when the gateway noticed (from its log) and how long the stream paused.

    python bench/kill.py [--every 1] [--scenario kill ...]         about 15 minutes on two cores
"""

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from results import Figure, write_result
from swarm.processes import SwarmOfProcesses
from swarm.stream import Answer, stream_answer

from plait import LLM, SamplingParams

SPANS = {"a": "0:2", "b": "2:4", "c": "4:6"}
# The middle span has a third machine, for the replacement that dies too.
NAMES = (*(f"{span}{number}" for span in SPANS for number in (1, 2)), "b3")
TOKENS = 64
PROMPT_TOKENS = 48
CONTEXTS = (32, 128, 256, 512, 900)
SCENARIOS = ("kill", "freeze", "two", "replay", "context")
VOCABULARY = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One answer. Seconds: from the signal to the gateway's notice, and the longest pause of the stream after it."""

    scenario: str
    at_token: int
    victims: tuple[str, ...]
    prompt_tokens: int
    sampled: bool
    same_tokens: bool
    error: str
    detected_s: float | None
    pause_s: float


class KillBench:
    """Runs against one swarm; who was killed is started again while others are asked."""

    def __init__(self, swarm: SwarmOfProcesses) -> None:
        self.swarm = swarm
        self.runs: list[Run] = []
        self._expected: dict[tuple[int, bool], list[int]] = {}

    def start(self) -> None:
        for name in NAMES:
            self.swarm.start(name, SPANS[name[0]])
        self.swarm.wait_ready(*NAMES)

    def one(
        self, scenario: str, at_token: int, *, sampled: bool, prompt_tokens: int = PROMPT_TOKENS, turn: int
    ) -> None:
        """Ask once, strike once, and put everything back."""
        first = {span: f"{span}{1 + turn // 3 % 2}" for span in SPANS}
        hop = "b" if scenario == "replay" else "abc"[turn % 3]
        victims = [first[hop]]
        if scenario == "two":
            victims.append(first["abc"[(turn + 1) % 3]])
        struck_s: list[float] = []

        def strike(count: int) -> None:
            if count >= at_token and not struck_s:
                strike_one = self.swarm.freeze if scenario == "freeze" else self.swarm.kill
                struck_s.extend(strike_one(victim) for victim in victims)
                if scenario == "replay":
                    threading.Thread(target=self._strike_replacement, args=(victims,)).start()

        answer = stream_answer(
            self.swarm.origin,
            prompt_of(prompt_tokens),
            TOKENS,
            strike,
            route={"pinned": list(first.values())},
            **sampling_of(sampled),
        )
        self._record(scenario, at_token, victims, prompt_tokens, sampled, answer, struck_s)
        self._put_back(scenario, victims)

    def _strike_replacement(self, victims: list[str]) -> None:
        """Kill who has the session in place of the first victim, as soon as the gateway says so."""
        span, deadline_s = victims[0][0], time.monotonic() + 10
        while time.monotonic() < deadline_s:
            for machine in self.swarm.status()["machines"]:
                name = machine["name"]
                if machine["gateway_sessions"] and name[0] == span and name not in victims:
                    self.swarm.kill(name)
                    victims.append(name)
                    return

    def _record(
        self,
        scenario: str,
        at_token: int,
        victims: Sequence[str],
        prompt_tokens: int,
        sampled: bool,
        answer: Answer,
        struck_s: Sequence[float],
    ) -> None:
        detected = [
            seen_s - at_s
            for name, at_s in zip(victims, struck_s, strict=False)
            if (seen_s := self.swarm.gateway.lost_unix_s(self.swarm.peers[name], at_s)) is not None
        ]
        run = Run(
            scenario=scenario,
            at_token=at_token,
            victims=tuple(victims),
            prompt_tokens=prompt_tokens,
            sampled=sampled,
            same_tokens=answer.token_ids == self._tokens_of_one_machine(prompt_tokens, sampled),
            error=answer.error,
            detected_s=max(detected, default=None),
            pause_s=answer.pause_s(struck_s[0]) if struck_s else 0.0,
        )
        self.runs.append(run)
        flag = "same tokens" if run.same_tokens else f"WRONG: {len(answer.token_ids)} tokens {run.error}"
        seen = f"{run.detected_s:.3f}" if run.detected_s is not None else "-"
        print(
            f"{scenario:8} token {at_token:3} {'+'.join(victims):8} seen {seen} pause {run.pause_s:.3f} {flag}",
            flush=True,
        )

    def _put_back(self, scenario: str, victims: Sequence[str]) -> None:
        for name in victims:
            if scenario == "freeze":
                self.swarm.thaw(name)
            else:
                self.swarm.machines[name].end()
                self.swarm.start(name, SPANS[name[0]])
        if scenario != "freeze":
            self.swarm.wait_ready(*victims)
        self.swarm.gateway.wait_for(lambda: set(NAMES) <= self.swarm.online(), "all machines back")

    def _tokens_of_one_machine(self, prompt_tokens: int, sampled: bool) -> list[int]:
        key = (prompt_tokens, sampled)
        if key not in self._expected:
            with LLM("tiny", threads=1) as llm:
                params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **sampling_of(sampled))
                (output,) = llm.generate([list(prompt_of(prompt_tokens))], params)
            self._expected[key] = list(output.outputs[0].token_ids)
        return self._expected[key]


def prompt_of(tokens: int) -> list[int]:
    rng = np.random.default_rng(tokens)
    return [int(token_id) for token_id in rng.integers(300, VOCABULARY, tokens)]


def sampling_of(sampled: bool) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": 17} if sampled else {"temperature": 0.0}


def summary_of(runs: Sequence[Run]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for scenario in dict.fromkeys(run.scenario for run in runs):
        of_it = [run for run in runs if run.scenario == scenario]
        detected = sorted(run.detected_s for run in of_it if run.detected_s is not None)
        pauses = sorted(run.pause_s for run in of_it)
        summary[scenario] = {
            "answers": len(of_it),
            "same_tokens": sum(run.same_tokens for run in of_it),
            "detected_s": spread_of(detected),
            "pause_s": spread_of(pauses),
        }
    return summary


def spread_of(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 4),
        "p95": round(float(np.percentile(values, 95)), 4),
        "max": round(values[-1], 4),
    }


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    by_token = Figure("pause of the stream", "tokens of the answer before the signal", "seconds", log_y=True)
    for scenario in ("kill", "freeze", "two", "replay"):
        of_it = sorted((run.at_token, run.pause_s) for run in runs if run.scenario == scenario)
        if of_it:
            by_token.add_line(scenario, *zip(*of_it, strict=True))
    by_context = Figure("after SIGKILL, against context", "tokens of context", "seconds")
    contexts = sorted({run.prompt_tokens for run in runs if run.scenario == "context"})
    if contexts:
        of_context = {
            length: [run for run in runs if run.scenario == "context" and run.prompt_tokens == length]
            for length in contexts
        }
        tokens = [length + TOKENS // 2 for length in contexts]
        pauses = [statistics.median(run.pause_s for run in of_context[length]) for length in contexts]
        seen = [statistics.median(run.detected_s or 0.0 for run in of_context[length]) for length in contexts]
        by_context.add_line("pause", tokens, pauses)
        by_context.add_line("of it until noticed", tokens, seen)
    return [figure for figure in (by_token, by_context) if figure.lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="strike after every so many tokens")
    parser.add_argument("--scenario", nargs="*", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--repeats", type=int, default=5, help="answers for each length of context")
    parser.add_argument("--name", default="kill", help="name of the result")
    arguments = parser.parse_args()
    with SwarmOfProcesses("--blocks", "none", "--set", "swarm.announce_s=1") as swarm:
        bench = KillBench(swarm)
        bench.start()
        for scenario in arguments.scenario:
            if scenario == "context":
                for turn in range(arguments.repeats * len(CONTEXTS)):
                    length = CONTEXTS[turn % len(CONTEXTS)]
                    bench.one(scenario, TOKENS // 2, sampled=False, prompt_tokens=length, turn=turn)
            else:
                # The last token is the answer's end: nothing is left to go on with.
                for turn, at_token in enumerate(range(1, TOKENS, arguments.every)):
                    bench.one(scenario, at_token, sampled=bool(turn % 2), turn=turn)
    write_result(
        arguments.name,
        settings={
            "model": "tiny",
            "spans": SPANS,
            "machines": len(NAMES),
            "tokens": TOKENS,
            "every": arguments.every,
        },
        samples=[asdict(run) for run in bench.runs],
        summary=summary_of(bench.runs),
        figures=figures_of(bench.runs),
    )
    wrong = [run for run in bench.runs if not run.same_tokens]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(bench.runs)} answers were not those of one machine")


if __name__ == "__main__":
    main()
