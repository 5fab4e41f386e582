"""From a scenario to a run: costs, memory and links of every machine, the requests, what breaks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from plait.cluster import peer_id_of_name
from plait.costs import (
    ASSUMED,
    CostModel,
    Efficiency,
    Formats,
    HostOverhead,
    IdealSeconds,
    NoisyCosts,
    RooflineCosts,
    SpanShape,
    StepWork,
    device_named,
    interconnect_named,
)
from plait.errors import BadRequest, BadSetup
from plait.kvcache import LendingOptions, LendingRules, LoanTerms
from plait.metrics import Objectives
from plait.model import ModelSpec, published_spec, read_spec
from plait.routing import RouteWish, parse_pick
from plait.scheduling import StepLimits, policy_named
from plait.simulator.cluster_run import ClusterRun, RunOptions
from plait.simulator.faults_of_run import DEFAULT_STRENGTH, FaultRate, RunFault, check_fault, draw_faults
from plait.simulator.random_streams import stream
from plait.simulator.scenario import (
    ConversationsPart,
    LendingPart,
    LinearPart,
    LinkPart,
    MachinePart,
    Scenario,
    names_of,
)
from plait.simulator.simulated_lender import LendingSpec
from plait.simulator.simulated_network import LinkSpec, NetworkSpec
from plait.simulator.simulated_worker import MachineSpec
from plait.simulator.timeline import Timeline
from plait.workload import (
    ConversationMix,
    TraceRequest,
    arrival_times_s,
    length_mix_named,
    parse_azure,
    parse_burstgpt,
    parse_mooncake,
    parse_trace,
    synthesize_conversations,
    synthesize_trace,
)

_PARSERS = MappingProxyType(
    {"plait": parse_trace, "azure": parse_azure, "burstgpt": parse_burstgpt, "mooncake": parse_mooncake}
)
MAX_KV_BLOCKS = 30_000_000
"""Each takes about 100 bytes here."""
KV_FRACTION = 0.9
"""Part of a device's memory that weights and cache fill; the rest is for activations, as in vLLM."""


_UNTHROTTLED_TOKENS = 2**31  # beside a step: as many as are in flight at once


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCosts:
    """A `CostModel` that somebody gives: see `LinearPart`; memory and hidden states are those of the span's shape."""

    given: LinearPart
    shape: SpanShape
    idle_watts: float = 0.0
    extrapolated_steps: int = 0

    @property
    def weight_bytes(self) -> int:
        return self.shape.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.shape.kv_bytes_per_token

    @property
    def hidden_bytes_per_token(self) -> int:
        return self.shape.hidden_bytes_per_token

    def step_s(self, work: StepWork) -> float:
        features, given = work.features, self.given
        return (
            given.per_step_s
            + given.per_token_s * features.tokens
            + given.per_context_token_s * features.context_tokens
        )

    def attention_s(self, work: StepWork) -> float:
        return self.given.per_context_token_s * work.features.context_tokens

    def host_s(self, work: StepWork) -> float:
        del work
        return self.given.host_s

    def ideal(self, work: StepWork) -> IdealSeconds | None:
        del work
        return None

    def energy_j(self, work: StepWork) -> float:
        del work
        return 0.0


def run_of_scenario(scenario: Scenario, folder: Path, *, timeline: Timeline | None = None) -> ClusterRun:
    """Build the run; `folder` is where files that the scenario names are looked for.

    Raises:
        BadSetup: something does not exist or does not fit. MissingCost: a machine's costs are not known; the message
            says which.
    """
    spec = _model(scenario.model, folder)
    machines = [
        machine for part in scenario.machines for machine in _machines(part, spec, folder, seed=scenario.seed)
    ]
    machines = _with_lending(scenario.lending, machines, spec)
    _check_machines(machines, len(spec.blocks))
    requests = _requests(scenario, spec, folder)
    names = [machine.name for machine in machines]
    return ClusterRun(
        machines,
        _network(scenario),
        model_blocks=len(spec.blocks),
        options=_options(scenario, scenario.context_tokens or spec.max_model_tokens),
        requests=requests,
        faults=_faults(scenario, names, requests[-1].arrival_s),
        timeline=timeline,
    )


def _check_machines(machines: Sequence[MachineSpec], model_blocks: int) -> None:
    """What cannot serve anybody, or not be kept in memory, is refused before anything runs."""
    served = {block for blocks in {machine.blocks for machine in machines} for block in blocks}
    missing = [block for block in range(model_blocks) if block not in served]
    if missing:
        raise BadSetup(
            f"no machine holds block {missing[0]} of the model ({len(missing)} of {model_blocks} are missing), so that "
            "no request can be served; add a machine for them, or give another one more blocks"
        )
    kv_blocks = sum(machine.kv_blocks + machine.host_kv_blocks for machine in machines)
    if kv_blocks > MAX_KV_BLOCKS:
        raise BadSetup(
            f"the machines have {kv_blocks} KV blocks together, and the books of more than {MAX_KV_BLOCKS} do not fit "
            "the memory of a usual machine; give fewer machines, less kv_memory or larger block_tokens"
        )


def objectives_of(scenario: Scenario) -> Objectives:
    """What a good request of this scenario stays within."""
    limits = scenario.objectives
    return Objectives(ttft_s=limits.ttft_s, tpot_s=limits.tpot_s, widest_gap_s=limits.widest_gap_s)


def _model(name: str, folder: Path) -> ModelSpec:
    config = folder / name / "config.json"
    if not config.is_file():
        return published_spec(name)
    import json

    try:
        tree: object = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadSetup(f"{config} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise BadSetup(f"{config} holds no JSON object")
    return read_spec(tree, str(config))  # pyright: ignore[reportUnknownArgumentType]  read_spec checks every key


def _machines(part: MachinePart, spec: ModelSpec, folder: Path, *, seed: int) -> list[MachineSpec]:
    blocks = _blocks(part, len(spec.blocks))
    costs = _costs(part, SpanShape(spec, blocks, Formats(weights=part.weights, kv=part.kv)), folder)
    kv_blocks = _kv_bytes(part, costs) // (costs.kv_bytes_per_token * part.block_tokens)
    if kv_blocks < 1:
        raise BadSetup(
            f"machine {part.name!r} has no room for a single KV block of {part.block_tokens} tokens beside its "
            "weights; give it more memory, more devices or fewer blocks"
        )
    host_kv_blocks = part.swap_memory // (costs.kv_bytes_per_token * part.block_tokens)
    limits = part.limits
    machines: list[MachineSpec] = []
    for name in names_of(part):
        own = NoisyCosts(costs, part.noise, stream(seed, f"noise/{name}")) if part.noise else costs
        machines.append(
            MachineSpec(
                name=name,
                peer=peer_id_of_name(name),
                blocks=blocks,
                costs=own,
                policy=policy_named(part.scheduling),
                limits=StepLimits(**limits.model_dump()),
                kv_blocks=kv_blocks,
                block_tokens=part.block_tokens,
                host_kv_blocks=host_kv_blocks,
                site=part.site,
                price_per_hour=part.price_per_hour,
            )
        )
    return machines


def _blocks(part: MachinePart, model_blocks: int) -> range:
    if part.blocks is None:
        return range(model_blocks)
    first, colon, end = part.blocks.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 0 <= int(first) < int(end) <= model_blocks):
        raise BadSetup(
            f"machine {part.name!r}: blocks {part.blocks!r} are no span of a model of {model_blocks} blocks; write "
            f"for example '0:{model_blocks}'"
        )
    return range(int(first), int(end))


def _costs(part: MachinePart, shape: SpanShape, folder: Path) -> CostModel:
    if part.linear is not None:
        return LinearCosts(given=part.linear, shape=shape)
    host = HostOverhead(per_step_s=part.host_s)
    if part.device is not None:
        fraction = part.efficiency_fraction
        efficiency = ASSUMED
        if fraction is not None:
            efficiency = Efficiency(bandwidth_fraction=fraction, compute_fractions=(fraction,))
        return RooflineCosts(
            shape=shape,
            device=device_named(part.device),
            efficiency=efficiency,
            host=host,
            devices=part.devices,
            interconnect=interconnect_named(part.interconnect) if part.interconnect else None,
        )
    assert part.profile is not None
    from plait.profiler import profile_file, read_profile  # they ask torch what hardware this is

    file = profile_file(folder, part.profile)
    profile = read_profile(file, for_this_machine=not part.force_profile)
    if profile.model.model_blocks != len(shape.model.blocks):
        raise BadSetup(
            f"the profile {str(file)!r} of machine {part.name!r} is of {profile.model.name!r}, a model of "
            f"{profile.model.model_blocks} blocks, and the scenario's has {len(shape.model.blocks)}; profile that one"
        )
    return profile.table_costs(shape.blocks, extrapolates=part.extrapolate)


def _kv_bytes(part: MachinePart, costs: CostModel) -> int:
    if part.kv_memory is not None:
        return part.kv_memory
    memory_bytes = part.memory
    if memory_bytes is None and part.device is not None:
        memory_bytes = device_named(part.device).memory_bytes * part.devices
    if memory_bytes is None:
        raise BadSetup(
            f"machine {part.name!r} has neither memory nor kv_memory; say what its profile does not"
        )
    return int(memory_bytes * KV_FRACTION) - costs.weight_bytes


def _with_lending(part: LendingPart, machines: list[MachineSpec], spec: ModelSpec) -> list[MachineSpec]:
    """The machines, with what they lend and may borrow."""
    if part.policy == "off":
        return machines
    lendable = {machine.name: int(part.lendable_fraction * machine.kv_blocks) for machine in machines}
    lending: list[MachineSpec] = []
    for machine in machines:
        group = [each for each in machines if each.blocks == machine.blocks and each is not machine]
        if any(each.block_tokens != machine.block_tokens for each in group):
            raise BadSetup(
                f"machine {machine.name!r} lends KV blocks to machines whose blocks differ; give all machines "
                "of the same blocks the same block_tokens, or turn lending off"
            )
        if machine.policy.reserves:
            raise BadSetup(
                f"machine {machine.name!r} cannot lend: its scheduling {machine.policy.name!r} reserves blocks ahead; "
                "take paged, or turn lending off"
            )
        # A query's size is counted from the shape; quantised caches are attended in full precision.
        shape = SpanShape(spec, machine.blocks, Formats(weights="bf16", kv="bf16"))
        borrowable = sum(lendable[each.name] for each in group)
        lending.append(
            replace(
                machine,
                limits=replace(machine.limits, borrowable_blocks=borrowable),
                lending=_lending(part, machine, lendable[machine.name], shape),
            )
        )
    return lending


def _lending(part: LendingPart, machine: MachineSpec, lendable_blocks: int, shape: SpanShape) -> LendingSpec:
    oracle = part.policy == "oracle"
    return LendingSpec(
        options=LendingOptions(
            policy="plan" if part.policy == "plan" else "pull",
            moved_tokens_per_step=_UNTHROTTLED_TOKENS if oracle else part.moved_tokens_per_step,
            heartbeat_s=part.heartbeat_s,
            answer_within_s=part.answer_within_s,
            manage_s=part.manage_s,
            rules=LendingRules(small_batch=part.small_batch, least_gain_fraction=part.least_gain_fraction),
        ),
        terms=LoanTerms(
            lendable_blocks=lendable_blocks,
            keep_free_blocks=int(part.keep_free_fraction * machine.kv_blocks),
            lease_s=part.lease_s,
            recall_s=part.recall_s,
        ),
        query_bytes_per_token=shape.query_bytes_per_token,
        part_bytes_per_token=shape.part_bytes_per_token,
        copy_bytes_per_s=part.copy_bytes_per_s,
        knows_lengths=oracle,
    )


def _network(scenario: Scenario) -> NetworkSpec:
    def link(part: LinkPart) -> LinkSpec:
        return LinkSpec(one_way_s=part.one_way_s, bandwidth_bytes_per_s=part.bandwidth_bytes_per_s)

    network = scenario.network
    pairs: Mapping[tuple[str, str], LinkSpec] = {
        (min(pair.sites), max(pair.sites)): link(pair) for pair in network.pairs
    }
    return NetworkSpec(
        within=link(network.within),
        between=link(network.between),
        pairs=pairs,
        gateway_site=network.gateway_site,
    )


def _requests(scenario: Scenario, spec: ModelSpec, folder: Path) -> tuple[TraceRequest, ...]:
    workload = scenario.workload
    context_tokens = scenario.context_tokens or spec.max_model_tokens
    longest = min(workload.max_request_tokens or context_tokens, context_tokens)
    if workload.trace is not None:
        file = folder / workload.trace
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetup(f"the trace {str(file)!r} cannot be read: {error}") from error
        requests = _PARSERS[workload.format](lines, where=str(file))[: workload.requests]
        if not requests:
            raise BadSetup(f"the trace {str(file)!r} holds no request")
        return requests
    assert workload.requests is not None and workload.rate_per_s is not None
    if workload.conversations is not None:
        return _conversations(scenario, workload.conversations, longest)
    rate = workload.rate_per_s or math.inf
    arrivals_s = arrival_times_s(
        workload.requests, rate, workload.burstiness, stream(scenario.seed, "workload/arrivals")
    )
    return synthesize_trace(
        arrivals_s.tolist(),
        length_mix_named(workload.lengths),
        stream(scenario.seed, "workload/lengths"),
        most_total_tokens=longest,
    )


def _conversations(scenario: Scenario, part: ConversationsPart, longest: int) -> tuple[TraceRequest, ...]:
    """As many requests as asked, of as many conversations as that takes."""
    workload = scenario.workload
    assert workload.requests is not None and workload.rate_per_s is not None
    lengths = length_mix_named(workload.lengths)
    mix = ConversationMix(
        question=lengths.prompt,
        answer=lengths.output,
        tenants=part.tenants,
        instruction_tokens=part.instruction_tokens,
        mean_turns=part.mean_turns,
        think_s=part.think_s,
        most_total_tokens=longest,
    )
    count = workload.requests  # each has at least one turn
    drawn = synthesize_conversations(
        count, workload.rate_per_s, workload.burstiness**-0.5, mix, stream(scenario.seed, "workload/turns")
    )
    if len(drawn) < workload.requests:
        raise BadSetup(f"conversations as described are longer than {longest} tokens; shorten instructions")
    return drawn[: workload.requests]


def _options(scenario: Scenario, max_model_tokens: int) -> RunOptions:
    run = scenario.run
    try:
        wish = RouteWish(mode=scenario.routing.mode, pick=parse_pick(scenario.routing.pick))  # pyright: ignore[reportArgumentType]  RouteWish checks it
    except BadRequest as error:
        raise BadSetup(f"routing: {error.message}") from error
    return RunOptions(
        seed=scenario.seed,
        wish=wish,
        sessions_per_machine=run.sessions_per_machine,
        max_model_tokens=max_model_tokens,
        asks=scenario.workload.asks,
        patience_s=run.patience_s,
        announce_s=run.announce_s,
        silence_s=run.silence_s,
        loan_wait_s=scenario.lending.wait_s,
        check=run.check,
    )


def _faults(scenario: Scenario, names: list[str], until_s: float) -> tuple[RunFault, ...]:
    given = [
        RunFault(
            kind=part.kind,
            at_s=part.at_s,
            duration_s=part.duration_s,
            machines=part.machines,
            strength=part.strength or DEFAULT_STRENGTH.get(part.kind, 0.0),
        )
        for part in scenario.faults
    ]
    for fault in given:
        check_fault(fault, names)
    rates = [
        FaultRate(
            kind=part.kind,
            per_hour=part.per_hour,
            mean_s=part.mean_s,
            strength=part.strength or DEFAULT_STRENGTH.get(part.kind, 0.0),
        )
        for part in scenario.random_faults
    ]
    drawn = draw_faults(scenario.seed, rates, names, until_s)
    return tuple(sorted([*given, *drawn], key=lambda fault: fault.at_s))
