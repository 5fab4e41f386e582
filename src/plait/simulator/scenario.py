"""A scenario: cluster, model, workload, policies and faults of a run, as one YAML file.

    model: opt-13b
    machines:
      - {name: replica, count: 8, device: a100-40gb}
    workload: {requests: 1000, lengths: sharegpt-like, rate_per_s: 20}

Every field has a unit in its name, or takes a size such as "16GiB". What is wrong is said with file, field and fix.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from plait.errors import BadRequest, BadSetup
from plait.routing import RouteMode
from plait.scheduling import POLICY_NAMES
from plait.simulator.cluster_run import Asks
from plait.simulator.faults_of_run import RunFaultKind
from plait.simulator.simulated_network import GATEWAY
from plait.units import parse_bytes

MAX_SCENARIO_BYTES = 1 << 20
MAX_MACHINES = 10_000
MAX_REQUESTS = 10_000_000
"""Of more, the numbers that are kept of each would fill the memory of a usual machine."""


def _size(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except BadRequest as error:
            raise ValueError(error.message) from None
    return value


def _off(value: object) -> object:
    return "off" if value is False else value  # which is how YAML reads the word


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitsPart(_Part):
    """Of a step and of the queues; see `StepLimits`."""

    step_tokens: int = Field(default=2048, ge=1)
    max_running_sequences: int = Field(default=256, ge=1)
    max_waiting: int = Field(default=100_000, ge=1)
    long_prefill_tokens: int | None = Field(default=None, ge=1)
    watermark_fraction: float = Field(default=0.01, ge=0, lt=1)
    preemption: Literal["recompute", "swap", "auto"] = "auto"


class LinearPart(_Part):
    """Costs that are given: seconds of a step, of each token in it, and of each token of context that it reads."""

    per_step_s: NotNegative
    per_token_s: NotNegative = 0.0
    per_context_token_s: NotNegative = 0.0
    host_s: NotNegative = 0.0


class MachinePart(_Part):
    """`count` equal machines. Their costs come from one of three: a published `device` (a roofline; `devices` of them
    share the work and pay for collectives over their `interconnect`), a `profile` that was measured (of another machine
    than this one only if `force_profile` says so), or `linear` ones."""

    name: str = Field(min_length=1, max_length=64)
    count: int = Field(default=1, ge=1, le=MAX_MACHINES)
    blocks: str | None = None
    device: str | None = None
    devices: int = Field(default=1, ge=1)
    interconnect: str | None = None
    profile: Path | None = None
    force_profile: bool = False
    linear: LinearPart | None = None
    efficiency_fraction: float | None = Field(default=None, gt=0, le=1)
    host_s: NotNegative = 0.0
    weights: str = "bf16"
    kv: str = "bf16"
    memory: Size | None = None
    kv_memory: Size | None = None
    swap_memory: Size = 0
    block_tokens: int = Field(default=16, ge=1)
    scheduling: str = "paged"
    limits: LimitsPart = LimitsPart()
    site: str = ""
    price_per_hour: NotNegative = 0.0
    noise: NotNegative = 0.0
    extrapolate: bool = False


class LinkPart(_Part):
    """A link's delay and bandwidth, the same in both directions."""

    one_way_s: NotNegative
    bandwidth_bytes_per_s: Positive


class PairPart(LinkPart):
    """The links between two sites."""

    sites: tuple[str, str]


class NetworkPart(_Part):
    """Links within a site, between sites, and between certain sites; and where requests come in."""

    within: LinkPart = LinkPart(one_way_s=1e-4, bandwidth_bytes_per_s=1.25e9)
    between: LinkPart = LinkPart(one_way_s=0.02, bandwidth_bytes_per_s=1.25e7)
    pairs: tuple[PairPart, ...] = ()
    gateway_site: str = ""


class ConversationsPart(_Part):
    """Requests are turns of conversations, whose prompts hold their history; tenants' begin with their instructions."""

    tenants: int = Field(default=1, ge=1)
    instruction_tokens: int = Field(default=0, ge=0)
    mean_turns: float = Field(default=1.0, ge=1)
    think_s: NotNegative = 30.0


class WorkloadPart(_Part):
    """Requests of a `trace` file, or `requests` drawn: lengths of a named mix at `rate_per_s` (0: all at once). With
    `conversations`, that is the rate at which these begin. Clients ask room for their `answer`, for the
    next `power-of-two` of it, or, since they do not know its length, for all of the model's `context`: policies that
    reserve what is asked feel the difference."""

    trace: Path | None = None
    format: Literal["plait", "azure", "burstgpt", "mooncake"] = "plait"
    conversations: ConversationsPart | None = None
    requests: int | None = Field(default=None, ge=1, le=MAX_REQUESTS)
    lengths: str = "sharegpt-like"
    rate_per_s: NotNegative | None = None
    burstiness: Positive = 1.0
    max_request_tokens: int | None = Field(default=None, ge=2)
    asks: Asks = "answer"


class RoutingPart(_Part):
    """The gateway's default route, as `plait serve --route-mode` and `--route-pick`."""

    mode: str = "load"
    pick: str = "balanced"


class FaultPart(_Part):
    """One fault; `machines` by name (of several, replica-0, replica-1, ...)."""

    kind: RunFaultKind
    at_s: NotNegative
    duration_s: Positive
    machines: tuple[str, ...] = Field(min_length=1)
    strength: Positive | None = None


class FaultRatePart(_Part):
    """Faults at random: `per_hour` in the whole cluster, each of about `mean_s`."""

    kind: RunFaultKind
    per_hour: Positive
    mean_s: Positive
    strength: Positive | None = None


class ObjectivesPart(_Part):
    """What a good request stays within."""

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    widest_gap_s: Positive | None = None


class RunPart(_Part):
    """How the run goes; see `RunOptions`."""

    sessions_per_machine: int | None = Field(default=None, ge=1)
    patience_s: Positive = 120.0
    announce_s: Positive = 5.0
    silence_s: Positive = 3.0
    check: Literal["event", "some", "end"] = "some"


class LendingPart(_Part):
    """Whether machines with the same blocks lend each other KV memory, and how; see `LendingOptions`, `LoanTerms`.

    `oracle` is `pull` by somebody who knows how long every answer will be, with moves as fast as links are.
    `lendable_fraction` and `keep_free_fraction` are of a machine's pool. `copy_bytes_per_s`: of blocks between pool and
    link.
    """

    policy: Annotated[Literal["off", "pull", "plan", "oracle"], BeforeValidator(_off)] = "off"
    lendable_fraction: float = Field(default=0.9, gt=0, le=1)
    keep_free_fraction: float = Field(default=0.05, ge=0, lt=1)
    moved_tokens_per_step: int = Field(default=16, ge=0)
    heartbeat_s: Positive = 0.5
    answer_within_s: Positive = 1.0
    lease_s: Positive = 5.0
    recall_s: Positive = 10.0
    manage_s: Positive = 2.0
    small_batch: int = Field(default=8, ge=1)
    least_gain_fraction: NotNegative = 0.02
    wait_s: Positive = 60.0
    copy_bytes_per_s: Positive = 2e11


class Scenario(_Part):
    """All of it. `context_tokens`: how long requests may be, where that is not what the model was made for."""

    name: str = ""
    seed: int = Field(default=0, ge=0)
    model: str
    context_tokens: int | None = Field(default=None, ge=2)
    machines: tuple[MachinePart, ...] = Field(min_length=1)
    network: NetworkPart = NetworkPart()
    workload: WorkloadPart
    routing: RoutingPart = RoutingPart()
    lending: LendingPart = LendingPart()
    faults: tuple[FaultPart, ...] = ()
    random_faults: tuple[FaultRatePart, ...] = ()
    objectives: ObjectivesPart = ObjectivesPart()
    run: RunPart = RunPart()


def load_scenario(file: Path) -> Scenario:
    """Read a scenario.

    Raises:
        BadSetup: the file cannot be read or is no scenario; the message names file, field and fix.
    """
    try:
        if file.stat().st_size > MAX_SCENARIO_BYTES:
            raise BadSetup(
                f"the scenario {str(file)!r} is larger than any real one ({MAX_SCENARIO_BYTES} bytes)"
            )
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"the scenario {str(file)!r} cannot be read: {error}") from error
    return parse_scenario(text, str(file))


def parse_scenario(text: str, where: str) -> Scenario:
    """Read a scenario's text; `where` names it in messages.

    Raises:
        BadSetup: see `load_scenario`.
    """
    try:
        tree: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadSetup(f"{where} is not YAML: {error}".replace("\n", " ")) from error
    except RecursionError:
        raise BadSetup(f"{where} is nested deeper than any scenario") from None
    if not isinstance(tree, dict):
        raise BadSetup(f"{where} must map names to values, and have at least model, machines and workload")
    try:
        scenario = Scenario.model_validate(tree)
    except ValidationError as error:
        raise BadSetup(_explain(error, where)) from error
    _check(scenario, where)
    return scenario


def _check(scenario: Scenario, where: str) -> None:
    """What one field says of another."""
    for place, machine in enumerate(scenario.machines):
        at = f"{where}: machines.{place} ({machine.name!r})"
        given = [name for name in ("device", "profile", "linear") if getattr(machine, name) is not None]
        if len(given) != 1:
            raise BadSetup(
                f"{at} has {' and '.join(given) or 'no costs'}; give one of device (a published one), profile (a "
                "file of plait profile) and linear"
            )
        if machine.devices > 1 and machine.device is None:
            raise BadSetup(
                f"{at} has {machine.devices} devices, and what they cost together is known of published ones only; "
                "give a device"
            )
        if machine.linear is not None and machine.kv_memory is None:
            raise BadSetup(
                f"{at} has linear costs and no kv_memory; nothing else says how much context fits it"
            )
        if machine.scheduling not in POLICY_NAMES:
            raise BadSetup(
                f"{at}: scheduling is {machine.scheduling!r}; choose one of {', '.join(POLICY_NAMES)}"
            )
        linear = machine.linear
        if linear is not None and not linear.per_step_s and not linear.per_token_s:
            raise BadSetup(
                f"{at}: steps that take no time are no costs; give per_step_s or per_token_s above 0"
            )
    count = sum(machine.count for machine in scenario.machines)
    if count > MAX_MACHINES:
        raise BadSetup(f"{where}: {count} machines are more than the {MAX_MACHINES} that a run can have")
    names = [name for machine in scenario.machines for name in names_of(machine)]
    again = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < count else None
    if again is not None:
        raise BadSetup(f"{where}: machines must have different names, and two are called {again!r}")
    if GATEWAY in names:
        raise BadSetup(f"{where}: {GATEWAY!r} is where requests come in; call the machine something else")
    if scenario.routing.mode not in get_args(RouteMode) or scenario.routing.mode == "pinned":
        modes = ", ".join(mode for mode in get_args(RouteMode) if mode != "pinned")
        raise BadSetup(f"{where}: routing.mode is {scenario.routing.mode!r}; choose one of {modes}")
    workload = scenario.workload
    if workload.conversations is not None and (workload.trace is not None or not workload.rate_per_s):
        raise BadSetup(f"{where}: workload.conversations are drawn; give a rate_per_s above 0 and no trace")
    if workload.trace is None and (workload.requests is None or workload.rate_per_s is None):
        raise BadSetup(f"{where}: workload needs a trace, or requests and rate_per_s (0 sends all at once)")


def names_of(machine: MachinePart) -> list[str]:
    """The names of so many equal machines: replica-0, replica-1, ..."""
    return (
        [machine.name]
        if machine.count == 1
        else [f"{machine.name}-{number}" for number in range(machine.count)]
    )


def _explain(error: ValidationError, where: str) -> str:
    """One sentence for the first mistake."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, name = first["loc"]
        known = _fields_at(parents)
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{where}: there is no field {path!r}; {hint}"
    if first["type"] == "missing":
        return f"{where}: the field {path!r} is missing"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {path} is {first['input']!r:.80}: {reason[0].lower()}{reason[1:]}"


def _fields_at(parents: list[int | str]) -> list[str]:
    """Fields of the part that a path leads to."""
    part: Any = Scenario
    for step in parents:
        if isinstance(step, int):
            continue
        annotation = part.model_fields[step].annotation
        inner = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
        part = next((each for each in inner if issubclass(each, BaseModel)), part)
    return sorted(cast("dict[str, object]", part.model_fields))
