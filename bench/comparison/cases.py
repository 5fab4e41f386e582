"""Models on machines, with lengths: what the policies are compared on."""

from dataclasses import dataclass, field

from comparison.policies import (
    BATCHING,
    LENDING,
    ORCA_ORACLE,
    PAGED,
    STATIC,
    STATIC_EIGHT,
    STATIC_ONE,
    Policy,
)


@dataclass(frozen=True)
class Case:
    """A cluster and a workload. `machines` are those of a scenario, all but their scheduling.

    Load is a part of what `paged` serves when everything arrives at once. `link`: between any two machines. `extra`:
    more of the scenario.
    """

    name: str
    model: str
    machines: tuple[str, ...]
    lengths: str
    requests: int
    policies: tuple[Policy, ...] = BATCHING
    loads: tuple[float, ...] = (0.05, 0.12, 0.25, 0.4, 0.6, 0.85, 1.1, 1.5)
    extra: dict[str, str] = field(default_factory=dict[str, str], hash=False)
    link: str = "one_way_s: 1.0e-4, bandwidth_bytes_per_s: 1.25e+9"


COMMON_LOAD = 0.85
"""Every policy runs at this load, however slow it is by then."""
IDLE_LOAD = 0.05
"""Here nobody waits, and a third of the requests will do."""
LOW_LOADS = (0.01, 0.02, 0.03, 0.08, 0.12, 0.25)
"""Only policies that may not sustain more run at these."""
LIMITS_TIMES_IDLE = (2.0, 5.0)
"""Latencies at which sustained rates are compared, in mean normalised latencies of the lowest load."""

OPT_13B = "{name: server, device: a100-40gb, host_s: 0.002}"
OPT_66B = "{name: server, device: a100-40gb, devices: 4, host_s: 0.002}"
OPT_175B = "{name: server, device: a100-80gb, devices: 8, host_s: 0.002}"
FAMILIES = {"short": "alpaca-like", "mixed": "sharegpt-like", "long tail": "long-tail"}
_SERVERS = (
    ("opt-13b", OPT_13B, "1 A100-40GB", {"short": 500, "mixed": 250, "long tail": 350}),
    ("opt-66b", OPT_66B, "4 A100-40GB", {"short": 300, "mixed": 150, "long tail": 200}),
    ("opt-175b", OPT_175B, "8 A100-80GB", {"short": 500, "mixed": 350, "long tail": 500}),
)

ONE_SERVER = tuple(
    Case(f"{model} on {place}, {family}", model, (machine,), FAMILIES[family], requests)
    for model, machine, place, by_family in _SERVERS
    for family, requests in by_family.items()
)
ORCAS_OWN = tuple(
    Case(
        f"opt-175b on 8 A100-80GB, {lengths}",
        "opt-175b",
        (OPT_175B,),
        lengths,
        400,
        (STATIC, STATIC_ONE, STATIC_EIGHT, ORCA_ORACLE, PAGED),
        loads=(0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.25, 0.4, 0.6, 0.85, 1.1, 1.5),
    )
    for lengths in ("uniform", "equal")
)

TRANSLATING = tuple(
    Case(
        f"llama-13b on 1 A100-40GB, {examples}",
        "llama-13b",
        ("{name: server, device: a100-40gb, host_s: 0.002}",),
        examples,
        400,
        (ORCA_ORACLE, PAGED),
    )
    for examples in ("1 example", "5 examples")
)

GPUS = (
    "{name: a100, device: a100-40gb, host_s: 0.002}",
    "{name: l4, count: 2, device: l4, host_s: 0.002}",
    "{name: t4, count: 2, device: t4, host_s: 0.002}",
)
DESK = (
    "{name: rtx4090, device: rtx4090, host_s: 0.002}",
    "{name: rtx3090, device: rtx3090, host_s: 0.002}",
    "{name: m2-ultra, device: m2-ultra, host_s: 0.002}",
    "{name: m2, device: m2, host_s: 0.002}",
)
UNEQUAL = tuple(
    Case(
        f"{title}, {family}",
        model,
        machines,
        FAMILIES[family],
        {"mixed": 450}.get(family, 800),
        loads=(0.05, 0.12, 0.25, 0.5, 0.85, 1.25),
    )
    for title, model, machines in (
        ("llama-2-7b on A100, 2 L4, 2 T4", "llama-2-7b", GPUS),
        ("llama-3-8b on 4090, 3090, 2 M2", "llama-3-8b", DESK),
    )
    for family in FAMILIES
)

EQUAL_GPUS = ("{name: gpu, count: 4, device: a100-80gb, host_s: 0.002, block_tokens: 256}",)
BIG_DESK = tuple(f"{machine[:-1]}, block_tokens: 256}}" for machine in DESK)
NVLINK = "one_way_s: 1.0e-5, bandwidth_bytes_per_s: 6.0e+11"
HOME = "one_way_s: 3.0e-4, bandwidth_bytes_per_s: 1.25e+8"
LONG_FAMILIES = {
    "up to 4K": 60,
    "up to 60K": 40,
    "1 in 10 up to 300K": 50,
    "documents": 50,
}
LONG = tuple(
    Case(
        f"{title}, {lengths}",
        model,
        machines,
        lengths,
        requests,
        LENDING,
        loads=(0.85, 2.0),
        extra={"context_tokens": "400000"},
        link=link,
    )
    for title, model, machines, link in (
        ("llama-2-7b on 4 A100-80GB", "llama-2-7b", EQUAL_GPUS, NVLINK),
        ("llama-3-8b on 4090, 3090, 2 M2", "llama-3-8b", BIG_DESK, HOME),
    )
    for lengths, requests in LONG_FAMILIES.items()
)
