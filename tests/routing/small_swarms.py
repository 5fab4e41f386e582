"""Swarms small enough to try every chain, and PETALS' cost model once more, edge by edge as its table says."""

import heapq
import math
from collections.abc import Iterator

from hypothesis import strategies as st

from plait.cluster import PeerLoad, PeerRates, PeerRecord, PeerTerms, SwarmView, peer_id_of_name
from plait.ids import PeerId

RATES = st.sampled_from([0.0, 50.0, 100.0, 300.0, 400.0, 1000.0])
RTTS = st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 12.0, math.inf])


def make_record(name: str, first: int, end: int, **fields: object) -> PeerRecord:
    """A record of model "m" that never expires."""
    return PeerRecord(
        peer=peer_id_of_name(name),
        name=name,
        model="m",
        first_block=first,
        end_block=end,
        expires_unix_s=math.inf,
        **fields,  # type: ignore[arg-type]
    )


def make_view(
    *records: PeerRecord,
    blocks: int,
    rtts_s: dict[PeerId, float] | None = None,
    banned: frozenset[PeerId] = frozenset(),
    version: int = 0,
) -> SwarmView:
    return SwarmView.of(
        records,
        model="m",
        model_blocks=blocks,
        unix_now_s=0.0,
        rtts_s=rtts_s,
        banned=banned,
        version=version,
    )


@st.composite
def small_swarms(draw: st.DrawFn, max_peers: int = 7, max_blocks: int = 8) -> SwarmView:
    """Every block has a holder; anything else may be missing, equal or absurd."""
    blocks = draw(st.integers(1, max_blocks))
    spans: list[tuple[int, int]] = []
    covered = 0
    while covered < blocks:
        end = draw(st.integers(covered + 1, blocks))
        spans.append((covered, end))
        covered = end
    for _ in range(draw(st.integers(0, max(0, max_peers - len(spans))))):
        first = draw(st.integers(0, blocks - 1))
        spans.append((first, draw(st.integers(first + 1, blocks))))
    names = [f"p{number}" for number in range(len(spans))]
    ids = [peer_id_of_name(name) for name in names]

    def some_rtts() -> dict[PeerId, float]:
        return {peer: draw(RTTS) for peer in ids if draw(st.booleans())}

    records: list[PeerRecord] = []
    for name, (first, end) in zip(names, spans, strict=True):
        total = draw(st.sampled_from([0, 100]))
        records.append(
            make_record(
                name,
                first,
                end,
                through=draw(st.sampled_from([(), (ids[0],)])),
                rates=PeerRates(
                    decode_tokens_per_s=draw(RATES),
                    saturated_decode_tokens_per_s=draw(RATES),
                    prefill_tokens_per_s=draw(RATES),
                    network_tokens_per_s=draw(RATES),
                ),
                load=PeerLoad(
                    sessions=draw(st.integers(0, 5)),
                    queued_tokens=draw(st.integers(0, 50)),
                    kv_total_tokens=total,
                    kv_free_tokens=draw(st.integers(0, total)),
                ),
                terms=PeerTerms(
                    price_per_hour=draw(st.sampled_from([0.0, 1.0, 3.0])),
                    busy_watts=draw(st.sampled_from([0.0, 100.0, 250.0])),
                    mean_lifetime_s=draw(st.sampled_from([0.0, 600.0, 9000.0])),
                ),
                weight_format=draw(st.sampled_from(["bf16", "int8", "int4"])),
                rtts_s=some_rtts(),
            )
        )
    return make_view(*records, blocks=blocks, rtts_s=some_rtts())


def every_chain(view: SwarmView, blocks: range) -> Iterator[tuple[PeerRecord, ...]]:
    """All chains of servers under PETALS' exit rule."""

    def extend(chain: tuple[PeerRecord, ...], boundary: int) -> Iterator[tuple[PeerRecord, ...]]:
        if boundary >= blocks.stop:
            yield chain
            return
        for record in view.holders(boundary):
            yield from extend((*chain, record), record.end_block)

    yield from extend((), blocks.start)


def every_early_chain(view: SwarmView, blocks: range) -> Iterator[tuple[tuple[PeerRecord, int], ...]]:
    """All chains whose hops may end where the span of a machine behind them begins: (machine, end of the hop)."""
    records = sorted(
        view.records.values(),
        key=lambda record: (
            min(record.end_block, blocks.stop),
            record.rates.decode_tokens_per_s,
            record.peer,
        ),
    )
    usable = [
        record for record in records if record.first_block < blocks.stop and blocks.start < record.end_block
    ]
    behind = {record.peer: usable[place + 1 :] for place, record in enumerate(usable)}

    def extend(
        chain: tuple[tuple[PeerRecord, int], ...], boundary: int
    ) -> Iterator[tuple[tuple[PeerRecord, int], ...]]:
        if boundary == blocks.stop:
            yield chain
            return
        for record in behind[chain[-1][0].peer] if chain else usable:
            if record.first_block <= boundary < record.end_block:
                ends = {min(record.end_block, blocks.stop), *(one.first_block for one in behind[record.peer])}
                for end in sorted(ends):
                    if boundary < end <= min(record.end_block, blocks.stop):
                        yield from extend((*chain, (record, end)), end)

    yield from extend((), blocks.start)


def petals_delay_s(rtt_s: float | None) -> float:
    return 0.15 if rtt_s is None else min(rtt_s / 2, 5.0)


def petals_arrival_s(record: PeerRecord, need_tokens: int) -> float:
    span_blocks = len(record.span)
    free = record.load.kv_free_tokens * 2 * span_blocks  # as PETALS counts: vectors of one block
    fails = record.load.kv_total_tokens > 0 and need_tokens * 2 * span_blocks > free
    return 0.018 + (10.0 if fails else 0.0)


def petals_dijkstra_s(view: SwarmView, blocks: range, need_tokens: int) -> float:
    """PETALS' min_latency: nodes (server, block), edges as in its table, a heap."""
    start, goal = ("in", blocks.start), ("out", blocks.stop)
    distance: dict[tuple[str, int], float] = {start: 0.0}
    heap: list[tuple[float, tuple[str, int]]] = [(0.0, start)]
    while heap:
        here_s, node = heapq.heappop(heap)
        if node == goal:
            return here_s
        if here_s > distance[node]:
            continue
        name, block = node
        edges: list[tuple[tuple[str, int], float]] = []
        if name == "in":
            for record in view.holders(block):
                delay_s = petals_delay_s(view.rtts_s.get(record.peer))
                edges.append(((record.peer, block), delay_s + petals_arrival_s(record, need_tokens)))
        else:
            own = view.records[PeerId(name)]
            if block < min(own.end_block, blocks.stop):
                edges.append(((name, block + 1), 1 / (own.rates.decode_tokens_per_s or 300.0)))
            elif block == blocks.stop:
                edges.append((goal, petals_delay_s(view.rtts_s.get(own.peer))))
            else:
                for record in view.holders(block):
                    delay_s = petals_delay_s(own.rtts_s.get(record.peer))
                    edges.append(((record.peer, block), delay_s + petals_arrival_s(record, need_tokens)))
        for other, edge_s in edges:
            if here_s + edge_s < distance.get(other, math.inf):
                distance[other] = here_s + edge_s
                heapq.heappush(heap, (here_s + edge_s, other))
    raise AssertionError("no way")


def plain_values(
    view: SwarmView,
    blocks: range,
    chain: tuple[PeerRecord, ...],
    need_tokens: int,
    ends: tuple[int, ...] = (),
) -> dict[str, float]:
    """A chain's value in every objective, hop by hop; rates as rates; `ends` of hops that end early."""
    ends = ends or tuple(min(record.end_block, blocks.stop) for record in chain)
    network_s = petals_delay_s(view.rtts_s.get(chain[0].peer)) + petals_delay_s(
        view.rtts_s.get(chain[-1].peer)
    )
    compute_s = price = energy_j = hazard = loss = 0.0
    rate = math.inf
    boundary = blocks.start
    for number, record in enumerate(chain):
        if number:
            network_s += petals_delay_s(chain[number - 1].rtts_s.get(record.peer))
        network_s += petals_arrival_s(record, need_tokens)
        used = ends[number] - boundary
        boundary += used
        here_s = used / (record.rates.decode_tokens_per_s or 300.0)
        compute_s += here_s
        price += here_s * record.terms.price_per_hour / 3600 * 1e6
        energy_j += here_s * record.terms.busy_watts
        hazard += 1 / record.terms.mean_lifetime_s if record.terms.mean_lifetime_s else 0.0
        loss += used * {"int8": 1e-4, "int4": 1e-2}.get(record.weight_format, 0.0)
        network = (record.rates.network_tokens_per_s or math.inf) * (0.2 if record.through else 1.0)
        rate = min(rate, (record.rates.prefill_tokens_per_s or 300.0) / used, network)
    step_s = network_s + compute_s
    return {
        "network_s": network_s,
        "compute_s": compute_s,
        "step_s": step_s,
        "rate_tokens_per_s": rate,
        "price": price,
        "energy_j": energy_j,
        "failure": 1 - math.exp(-need_tokens * step_s * hazard),
        "quantisation": loss,
        "hops": float(len(chain)),
    }
