"""Three places, 5 ms across, 50 or 100 ms from each other, with eight workers of very different speed."""

from plait.cluster import PeerLoad, PeerRates, PeerRecord, PeerTerms, SwarmView, peer_id_of_name
from swarm.unequal import BLOCKS, PASS_S, ROW_S, Layout, Worker

RTTS_S = {
    frozenset("A"): 0.005,
    frozenset("B"): 0.005,
    frozenset("C"): 0.005,
    frozenset("AB"): 0.05,
    frozenset("BC"): 0.05,
    frozenset("AC"): 0.1,
}
LAYOUT = Layout(
    workers=(
        Worker("a-front", "A", range(8), 2),
        Worker("a-back", "A", range(8, 16), 4),
        Worker("a-all", "A", range(16), 8),
        Worker("b-front", "B", range(8), 1),
        Worker("b-back", "B", range(8, 16), 2),
        Worker("c-front", "C", range(5), 1),
        Worker("c-middle", "C", range(4, 12), 4),
        Worker("c-back", "C", range(10, 16), 1),
    ),
    gateways={"gate-a": "A", "gate-b": "B", "gate-c": "C"},
    rtts_s=RTTS_S,
)


def injected_view(gateway: str) -> SwarmView:
    """What a gateway would see if machines announced exactly what is injected."""
    ids = {name: peer_id_of_name(name) for name in LAYOUT.places}
    records = [
        PeerRecord(
            peer=ids[worker.name],
            name=worker.name,
            model="m",
            first_block=worker.blocks.start,
            end_block=worker.blocks.stop,
            rates=PeerRates(
                decode_tokens_per_s=1 / (worker.slowdown * (PASS_S + ROW_S)),
                saturated_decode_tokens_per_s=1 / (worker.slowdown * ROW_S),
                prefill_tokens_per_s=1 / (worker.slowdown * ROW_S),
            ),
            load=PeerLoad(kv_free_tokens=10**6, kv_total_tokens=10**6),
            terms=PeerTerms(price_per_hour=1.0),
            rtts_s={
                ids[other]: LAYOUT.rtt_s(worker.name, other)
                for other in LAYOUT.places
                if other != worker.name
            },
            expires_unix_s=float("inf"),
        )
        for worker in LAYOUT.workers
    ]
    rtts_s = {ids[worker.name]: LAYOUT.rtt_s(gateway, worker.name) for worker in LAYOUT.workers}
    return SwarmView.of(records, model="m", model_blocks=BLOCKS, unix_now_s=0.0, rtts_s=rtts_s)
