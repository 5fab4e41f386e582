"""Swarms drawn at random: for tests, for measurements, and to try a routing mode without machines."""

import hashlib

import numpy as np

from plait.cluster.peer_record import PeerLoad, PeerRates, PeerRecord, PeerTerms
from plait.cluster.swarm_view import SwarmView
from plait.ids import PeerId


def peer_id_of_name(name: str) -> PeerId:
    """An identity that stands for a name where there are no keys: in descriptions, tests and simulations."""
    return PeerId(hashlib.sha256(name.encode()).hexdigest())


def random_swarm(
    rng: np.random.Generator,
    *,
    peers: int,
    blocks: int,
    pinged_peers: int | None = None,
    max_one_way_s: float = 0.1,
) -> SwarmView:
    """Draw a swarm that covers every block, seen from a client inside it.

    As the brief's synthetic swarms: spans of blocks/16 to blocks/3 blocks, log-normal rates, and round trips of points
    in a plane. The first peers are laid end to end so that no block is missing; where that takes more than `peers`,
    there are more. `pinged_peers`: round trips in each record, to the nearest ones (None: to all).
    """
    shortest, longest = max(1, blocks // 16), max(1, blocks // 3)
    spans: list[tuple[int, int]] = []
    covered = 0
    while covered < blocks or len(spans) < peers:
        length = int(rng.integers(shortest, longest + 1))
        first = covered if covered < blocks else int(rng.integers(0, blocks - length + 1))
        spans.append((first, min(first + length, blocks)))
        covered = max(covered, spans[-1][1]) if covered < blocks else covered
    count = len(spans)
    names = [f"peer-{number:04d}" for number in range(count)]
    ids = [peer_id_of_name(name) for name in names]
    places = rng.uniform(0, 1, (count + 1, 2))  # the last one is the client's
    distance = np.hypot(*(places[:, None, :] - places[None, :, :]).transpose(2, 0, 1)) / np.sqrt(2)
    rtts_s = 2 * (0.001 + (max_one_way_s - 0.001) * distance)
    decode = 300 * rng.lognormal(0, 0.7, count)
    prefill = decode * rng.uniform(8, 40, count)
    network = 2000 * rng.lognormal(0, 0.8, count)
    price = rng.lognormal(-1, 0.5, count)
    records: list[PeerRecord] = []
    for peer in range(count):
        others = np.delete(np.arange(count), peer)
        if pinged_peers is not None:
            others = others[np.argsort(rtts_s[peer, others], kind="stable")[:pinged_peers]]
        records.append(
            PeerRecord(
                peer=ids[peer],
                name=names[peer],
                model="synthetic",
                first_block=spans[peer][0],
                end_block=spans[peer][1],
                rates=PeerRates(
                    decode_tokens_per_s=float(decode[peer]),
                    saturated_decode_tokens_per_s=float(decode[peer] * 8),
                    prefill_tokens_per_s=float(prefill[peer]),
                    network_tokens_per_s=float(network[peer]),
                ),
                load=PeerLoad(kv_free_tokens=65536, kv_total_tokens=65536),
                terms=PeerTerms(
                    price_per_hour=float(price[peer]),
                    busy_watts=float(100 + 300 * price[peer]),
                    mean_lifetime_s=float(3600 * rng.lognormal(1, 1)),
                ),
                rtts_s={ids[other]: float(rtts_s[peer, other]) for other in others},
                expires_unix_s=float("inf"),
            )
        )
    return SwarmView.of(
        records,
        model="synthetic",
        model_blocks=blocks,
        unix_now_s=0.0,
        rtts_s={ids[peer]: float(rtts_s[count, peer]) for peer in range(count)},
        version=1,
    )
