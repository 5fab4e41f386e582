"""What breaks in a run, when, and for how long: given one by one, or drawn from the seed at a rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from plait.errors import BadSetup
from plait.simulator.random_streams import stream

RunFaultKind = Literal[
    "crash", "pause", "slow_node", "slow_link", "narrow_link", "cut", "partition", "squeeze"
]
"""
crash       the machine's memory is lost; it comes back empty after `duration_s`
pause       it stands still for `duration_s`
slow_node   its steps take `strength` times as long
slow_link   everything to and from it takes `strength` seconds more
narrow_link everything to and from it takes `strength` times as long to send
cut         nothing gets to it or from it
partition   nothing gets from some machines to the others and the gateway: `machines` are separated together
squeeze     something else takes the part `strength` of its KV memory, or what of that is free
"""
FAULT_KINDS: tuple[RunFaultKind, ...] = get_args(RunFaultKind)
MAX_FAULTS = 100_000
DEFAULT_STRENGTH = {"slow_node": 4.0, "slow_link": 0.2, "narrow_link": 20.0, "squeeze": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFault:
    """One fault: from `at_s` on, for `duration_s`."""

    kind: RunFaultKind
    at_s: float
    duration_s: float
    machines: tuple[str, ...]
    strength: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRate:
    """Faults of one kind that strike machines at random: `per_hour` in the whole cluster, each for about `mean_s`
    (exponential)."""

    kind: RunFaultKind
    per_hour: float
    mean_s: float
    strength: float = 0.0


def draw_faults(
    seed: int, rates: Sequence[FaultRate], machines: Sequence[str], until_s: float
) -> tuple[RunFault, ...]:
    """The faults of a run until some time. Every kind has a stream of its own, so one more kind changes no other's."""
    faults: list[RunFault] = []
    for rate in rates:
        rng = stream(seed, f"faults/{rate.kind}")
        at_s = 0.0
        while rate.per_hour > 0:
            at_s += float(rng.exponential(3600 / rate.per_hour))
            if at_s >= until_s:
                break
            if len(faults) == MAX_FAULTS:
                raise BadSetup(
                    f"{rate.per_hour:g} faults of kind {rate.kind!r} an hour are more than {MAX_FAULTS} in a run of "
                    f"{until_s:g} s; give a lower rate"
                )
            count = max(1, len(machines) // 2) if rate.kind == "partition" else 1
            order: list[int] = rng.permutation(len(machines)).tolist()
            struck = sorted(order[: int(rng.integers(1, count + 1))])
            faults.append(
                RunFault(
                    kind=rate.kind,
                    at_s=at_s,
                    duration_s=max(1e-3, float(rng.exponential(rate.mean_s))),
                    machines=tuple(machines[number] for number in struck),
                    strength=rate.strength,
                )
            )
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def swizzled(
    kind: RunFaultKind, machines: Sequence[str], at_s: float, apart_s: float, rng: np.random.Generator
) -> tuple[RunFault, ...]:
    """Machines fall to a fault one after the other and come back in another order, as FoundationDB's trials do it."""
    falls: list[int] = rng.permutation(len(machines)).tolist()
    rises: list[int] = rng.permutation(len(machines)).tolist()
    return tuple(
        RunFault(
            kind=kind,
            at_s=at_s + fall * apart_s,
            duration_s=(len(machines) - fall + rise) * apart_s,
            machines=(machine,),
        )
        for machine, fall, rise in zip(machines, falls, rises, strict=True)
    )


def check_fault(fault: RunFault, known: Sequence[str]) -> None:
    """Refuse a fault that cannot strike.

    Raises:
        BadSetup: an unknown machine or kind, or a time that cannot be.
    """
    if fault.kind not in FAULT_KINDS:
        raise BadSetup(f"no fault is called {fault.kind!r}; known are {', '.join(FAULT_KINDS)}")
    if fault.at_s < 0 or fault.duration_s <= 0:
        raise BadSetup(f"a fault of kind {fault.kind!r} needs a time from 0 on and a duration above 0")
    if fault.kind == "squeeze" and not 0 < fault.strength <= 1:
        raise BadSetup(
            f"a squeeze takes a part of a machine's memory, above 0 and up to 1, not {fault.strength:g}"
        )
    unknown = [name for name in fault.machines if name not in known]
    if unknown or not fault.machines:
        raise BadSetup(
            f"a fault of kind {fault.kind!r} strikes {unknown[0]!r}, which is no machine of the cluster"
            if unknown
            else f"a fault of kind {fault.kind!r} names no machine"
        )
