"""What a trial consists of, drawn from a seed: machines, links, requests, and what goes wrong when.

Everything is decided before anything runs, but for two things, because a fault of an idle machine tests little: a
fault strikes when so many tokens have been given out (and a moment later), and its victim is drawn by number
(`Fault.draw`) among those that carry a session then.

Beside faults, what is rare elsewhere is frequent here (FoundationDB calls it to buggify): outputs that were kept for
replays are forgotten, memory is short, preempted sessions are swapped, clocks are seconds apart.

In a third of the schedules all faults are of one kind, which shows what that kind costs by itself.

In three of five schedules some machines that together hold the whole model are `sheltered`: they are slowed, frozen and
cut off for a while like all others, but never lost. Then every request must get its answer. In the rest a request may
end with an error, since all holders of a block may be gone for good.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from plait.session import SamplingParams
from plait.simulator.hash_model import KV_BLOCK_TOKENS, MODEL_BLOCKS, some_prompt
from plait.transport import Wire

FaultKind = Literal[
    "kill",
    "vanish",
    "freeze",
    "partition",
    "isolate",
    "mute",
    "cut",
    "slow_link",
    "narrow_link",
    "slow_node",
    "duplicate",
    "replay",
    "reorder",
    "lose",
    "lie",
    "break",
    "leave",
    "kill_gateway",
    "freeze_gateway",
    "swizzle",
]
"""
kill             the process dies (SIGKILL): its links are reset; after `duration_s` half of them start again
vanish           power or cable: the machine says nothing any more, and no link is reset
freeze           SIGSTOP for `duration_s`
partition        some machines are separated from all others for `duration_s`
isolate          the same of one machine
mute             nothing that one machine sends arrives for `duration_s`; it hears everything
cut              all links of one machine are reset, once
slow_link        everything to and from a machine takes up to `strength` seconds more, for `duration_s`
narrow_link      everything to and from a machine goes at `strength` bytes a second, for `duration_s`
slow_node        its steps take `strength` times as long, for `duration_s`
duplicate        it sends messages twice, for `duration_s`
replay           it sends old messages again, for `duration_s`
reorder          some of its messages are overtaken by later ones, for `duration_s`
lose             some of its messages are lost, for `duration_s`
lie              it sends NaN, infinities, wrong shapes, impossible positions and tokens, for `duration_s`
break            its next forward pass fails
leave            it drains and leaves
kill_gateway, freeze_gateway   as above, the machine that the requests come to
swizzle          up to four machines are frozen one after the other and go on in another order, within `duration_s`
"""
LETHAL: frozenset[FaultKind] = frozenset({"kill", "vanish", "lie", "break", "leave"})
"""A machine may be lost to its sessions for good by these."""
HARMLESS: frozenset[FaultKind] = frozenset({"duplicate", "replay"})
"""What is said twice is to change nothing at all."""
PROMPT: frozenset[FaultKind] = frozenset(
    {*HARMLESS, "kill", "vanish", "freeze", "mute", "cut", "lie", "break", "leave"}
)
"""These are noticed as soon as heartbeats or the messages themselves show them; others may wait for a deadline."""
DISHONEST: frozenset[FaultKind] = frozenset({"lie"})
"""Who does this may be cut off for it, and nobody else may."""

_WEIGHTS: dict[FaultKind, float] = {
    "kill": 5,
    "vanish": 2,
    "freeze": 4,
    "partition": 3,
    "isolate": 2,
    "mute": 2,
    "cut": 3,
    "slow_link": 2,
    "narrow_link": 1.5,
    "slow_node": 2,
    "duplicate": 2,
    "replay": 2,
    "reorder": 2,
    "lose": 2,
    "lie": 2,
    "break": 1.5,
    "leave": 1.5,
    "kill_gateway": 0.4,
    "freeze_gateway": 0.8,
}
_KINDS: tuple[FaultKind, ...] = tuple(_WEIGHTS)
_SWIZZLED_FRACTION = 0.12
_SHELTERED_FRACTION = 0.6
_THEMED_FRACTION = 1 / 3
_TIGHT_FRACTION = 0.3
_SKEWED_FRACTION = 0.3
_AT_ONCE_FRACTION = 0.35
_DURATIONS_S = (0.3, 2.0, 6.0, 12.0)
SLOWEST_LINK_S = 5.0
"""What is sent has come by then, also over a slow link."""
_STRENGTHS: dict[FaultKind, tuple[float, float]] = {
    "slow_link": (0.3, 3.0),
    "narrow_link": (2e3, 2e4),
    "slow_node": (5.0, 100.0),
}
_MOST_CLOCK_AHEAD_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """One worker: its span, when it joins, how wrong its clock is, how long its steps take, what it has room for."""

    name: str
    blocks: range
    joins_s: float
    clock_ahead_s: float
    step_s: float
    token_s: float
    kv_blocks: int
    swap_blocks: int
    step_tokens: int
    kept_bytes: int
    sheltered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """One request: when it comes, and when its client gives up (infinite: never)."""

    arrives_s: float
    gives_up_s: float
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """See `FaultKind`. It strikes `delay_s` after `after_tokens` tokens have been given out, all requests together.

    `draw` picks the victim and whatever else is left to chance.
    """

    kind: FaultKind
    after_tokens: int
    delay_s: float
    duration_s: float
    strength: float
    draw: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSchedule:
    """One trial. `wire`: of links without a fault. `tight`: sessions take memory from each other."""

    seed: int
    tight: bool
    machines: tuple[MachinePlan, ...]
    requests: tuple[RequestPlan, ...]
    faults: tuple[Fault, ...]
    wire: Wire
    draft_tokens: int

    @property
    def sheltered(self) -> bool:
        """Whether every request that nobody cancels must get its answer."""
        return any(machine.sheltered for machine in self.machines)


def draw_schedule(seed: int) -> FaultSchedule:
    """The trial of a seed; the same on every machine."""
    rng = np.random.default_rng(seed)
    requests = tuple(_draw_request(rng) for _ in range(int(rng.integers(1, 6))))
    tight = bool(rng.random() < _TIGHT_FRACTION)
    schedule = FaultSchedule(
        seed=seed,
        tight=tight,
        requests=requests,
        machines=_draw_machines(rng, requests, tight),
        faults=_draw_faults(rng, requests),
        wire=Wire(
            delay_s=float(rng.choice([0.0002, 0.005, 0.04])),
            bandwidth_bytes_per_s=float(rng.choice([1e6, 1e8])),
            jitter_s=float(rng.choice([0.0, 0.002, 0.02])),
        ),
        draft_tokens=int(rng.choice([0, 0, 1, 4])),
    )
    if rng.random() < _SWIZZLED_FRACTION:
        after_tokens = schedule.faults[0].after_tokens
        schedule = replace(
            schedule, faults=(*schedule.faults, _draw_fault(rng, "swizzle", after_tokens, 0.0))
        )
    return schedule


def _draw_request(rng: np.random.Generator) -> RequestPlan:
    prompt_tokens = int(rng.choice([1, 5, 20, 60, 600, 900], p=[0.1, 0.2, 0.25, 0.25, 0.1, 0.1]))
    gives_up_s = float(rng.uniform(0, 5)) if rng.random() < 0.12 else math.inf
    return RequestPlan(
        arrives_s=float(rng.uniform(0, 4)),
        gives_up_s=gives_up_s,
        prompt_token_ids=some_prompt(rng, prompt_tokens),
        sampling=SamplingParams(
            n=2 if rng.random() < 0.1 else 1,
            temperature=float(rng.choice([0.0, 1.0])),
            seed=int(rng.integers(2**32)),
            max_tokens=int(rng.integers(1, 40)),
            ignore_eos=bool(rng.random() < 0.5),
            logprobs=0 if rng.random() < 0.2 else None,
        ),
    )


def _draw_machines(
    rng: np.random.Generator, requests: tuple[RequestPlan, ...], tight: bool
) -> tuple[MachinePlan, ...]:
    """A first set that holds the model, replacements of each of its spans, and perhaps others in between."""
    cuts = rng.permutation(np.arange(1, MODEL_BLOCKS))[: int(rng.integers(MODEL_BLOCKS))].tolist()
    bounds = [0, *sorted(cuts), MODEL_BLOCKS]
    spans = [range(first, end) for first, end in pairwise(bounds)]
    sheltered = bool(rng.random() < _SHELTERED_FRACTION)
    longest_tokens = max(
        len(request.prompt_token_ids) + (request.sampling.max_tokens or 0) for request in requests
    )
    samples = sum(request.sampling.n for request in requests)
    needed_blocks = -(-longest_tokens // KV_BLOCK_TOKENS) + 1
    step_s = float(rng.choice([0.002, 0.02, 0.05]))
    # A prompt takes several steps, but not so many that no token comes in time.
    step_tokens = max(int(rng.choice([16, 64, 256])), longest_tokens // 12)
    clocks_apart_s = _MOST_CLOCK_AHEAD_S if rng.random() < _SKEWED_FRACTION else 0.0
    kept_bytes = int(rng.choice([256, 1 << 30], p=[0.25, 0.75]))

    def machine(name: str, blocks: range, *, joins_s: float = 0.0, sheltered: bool = False) -> MachinePlan:
        return MachinePlan(
            name=name,
            blocks=blocks,
            joins_s=joins_s,
            clock_ahead_s=float(rng.uniform(-1, 1)) * clocks_apart_s,
            step_s=step_s * float(rng.uniform(0.5, 2)),
            token_s=float(rng.choice([0.0, 0.0005])),
            kv_blocks=needed_blocks * (2 if tight else max(2, samples)),
            swap_blocks=needed_blocks if rng.random() < 0.2 else 0,
            step_tokens=step_tokens,
            kept_bytes=kept_bytes,
            sheltered=sheltered,
        )

    machines = [machine(f"first-{blocks.start}", blocks, sheltered=sheltered) for blocks in spans]
    for blocks in spans:
        for number in range(int(rng.choice([0, 1, 2], p=[0.25, 0.6, 0.15]))):
            late = rng.random() < 0.3
            joins_s = float(rng.uniform(0.5, 12)) if late else 0.0
            machines.append(machine(f"spare-{blocks.start}-{number}", blocks, joins_s=joins_s))
    if rng.random() < 0.4:
        first = int(rng.integers(MODEL_BLOCKS))
        end = int(rng.integers(first, MODEL_BLOCKS)) + 1
        machines.append(machine("between", range(first, end)))
    return tuple(machines)


def _draw_faults(rng: np.random.Generator, requests: tuple[RequestPlan, ...]) -> tuple[Fault, ...]:
    """One to five; many strike at about the same moment, so that one comes while another is recovered from."""
    weights: NDArray[np.float64] = np.array([_WEIGHTS[kind] for kind in _KINDS])
    weights /= weights.sum()
    expected_tokens = sum((request.sampling.max_tokens or 0) // 2 for request in requests)
    themed = bool(rng.random() < _THEMED_FRACTION)
    theme = _KINDS[int(rng.integers(len(_KINDS)))]
    faults: list[Fault] = []
    after_tokens, delay_s = 0, 0.0
    for number in range(int(rng.integers(1, 6))):
        if number and rng.random() < _AT_ONCE_FRACTION:
            delay_s += float(rng.exponential(0.1))
        else:
            after_tokens = int(rng.integers(0, expected_tokens + 1))
            delay_s = float(rng.exponential(0.05 if after_tokens else 1.0))
        kind = theme if themed else _KINDS[int(rng.choice(len(_KINDS), p=weights))]
        faults.append(_draw_fault(rng, kind, after_tokens, delay_s))
    return tuple(faults)


def _draw_fault(rng: np.random.Generator, kind: FaultKind, after_tokens: int, delay_s: float) -> Fault:
    return Fault(
        kind=kind,
        after_tokens=after_tokens,
        delay_s=delay_s,
        duration_s=_one_of(rng, _DURATIONS_S) * float(rng.uniform(0.5, 1.5)),
        strength=_one_of(rng, _STRENGTHS.get(kind, (1.0,))),
        draw=int(rng.integers(1 << 32)),
    )


def _one_of(rng: np.random.Generator, values: Sequence[float]) -> float:
    return values[int(rng.integers(len(values)))]
