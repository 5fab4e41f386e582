"""How the routing modes share a swarm among clients: time per token, tokens per second, fairness.

A simulation of the queues alone, event by event on a virtual clock: clients ask for answers one after the other,
each over the chain that its gateway chooses; a token goes from hop to hop and from the last hop to the first; a
worker runs a pass whenever it is idle and somebody waits, with everybody who waits (as plait's workers do) or with
one session at a time (`--no-batching`, as PETALS' do). Gateways see what the workers announced last. Links, rates
and passes are the model's own, so what is compared are the choices, not the model with reality; the live experiment
is another command.

    nice python bench/routing_load.py           minutes on one core
    nice python bench/routing_load.py --quick   to see that it works; writes nothing
"""

import argparse
import heapq
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from results import Figure, write_result

from plait.cluster import PeerLoad, PeerRates, PeerRecord, PeerTerms, SwarmView, peer_id_of_name, random_swarm
from plait.ids import PeerId
from plait.routing import (
    LATENCY_AND_THROUGHPUT,
    NETWORK_AND_COMPUTE,
    Chain,
    Router,
    RouteWish,
    Sampled,
)

ANNOUNCE_S = 5.0  # as members do
WARM_UP_FRACTION = 0.25
ANSWER_TOKENS = (16, 96)
PETALS_LATENCY, PETALS_THROUGHPUT = "latency (PETALS)", "throughput (PETALS)"
MODES: dict[str, RouteWish] = {
    PETALS_LATENCY: RouteWish(mode="latency"),
    PETALS_THROUGHPUT: RouteWish(mode="throughput"),
    "tradeoff A, balanced": RouteWish(mode="tradeoff", objectives=NETWORK_AND_COMPUTE, evaluations=1000),
    "tradeoff A, sampled": RouteWish(
        mode="tradeoff", objectives=NETWORK_AND_COMPUTE, pick=Sampled(), evaluations=1000
    ),
    "tradeoff B, balanced": RouteWish(mode="tradeoff", objectives=LATENCY_AND_THROUGHPUT, evaluations=1000),
    "tradeoff B, sampled": RouteWish(
        mode="tradeoff", objectives=LATENCY_AND_THROUGHPUT, pick=Sampled(), evaluations=1000
    ),
    "exact A, sampled": RouteWish(mode="exact", objectives=NETWORK_AND_COMPUTE, pick=Sampled()),
    "load (plait)": RouteWish(mode="load"),
}


@dataclass(slots=True)
class Worker:
    """A machine: tokens that wait as (client, blocks), and the passes that run.

    As in plait's engine, sessions that cross the same blocks share a pass; passes of one step follow each other.
    """

    pass_s: float  # of one block, with no token
    row_s: float  # of one block, for each token
    batches: bool
    waiting: deque[tuple[int, range]] = field(default_factory=deque)
    running: list[tuple[int, range]] = field(default_factory=list)
    sessions: int = 0

    def begin(self) -> float | None:
        """Start a pass if there is reason to; how long it takes."""
        if self.running or not self.waiting:
            return None
        self.running = list(self.waiting) if self.batches else [self.waiting[0]]
        for _ in self.running:
            self.waiting.popleft()
        spans = [span for _, span in self.running]
        return self.pass_s * sum(map(len, set(spans))) + self.row_s * sum(map(len, spans))


@dataclass(slots=True)
class Client:
    gateway: int
    chain: Chain = ()
    hop: int = 0
    tokens_left: int = 0
    token_began_s: float = 0.0
    step_s: list[float] = field(default_factory=list)


class Simulation:
    """One run: closed-loop clients over one swarm."""

    def __init__(
        self, view: SwarmView, wish: RouteWish, *, clients: int, gateways: int, batches: bool, seed: int
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.truth, self.view, self.wish = view, view, wish
        # Fronts do not depend on what is announced here, so one router keeps them for all.
        routers = gateways if wish.mode == "load" else 1
        self.routers = [Router() for _ in range(routers)]
        self.clients = [Client(gateway=number % routers) for number in range(clients)]
        self.workers = {
            peer: Worker(*_pass_costs(record.rates), batches=batches) for peer, record in view.records.items()
        }
        self.events: list[tuple[float, int, str, Any]] = []
        self.order = itertools.count()
        self.now_s = 0.0
        self.route_s: list[float] = []
        self.chains: set[Chain] = set()

        for number in range(clients):
            self._at(float(self.rng.uniform(0, 1)), "session", number)
        # Members announce at different times: a tenth of them at a time.
        for group in range(10):
            self._at(ANNOUNCE_S * group / 10, "announce", group)

    def run(self, until_s: float) -> None:
        """Let events happen until then; may be called again with a later time."""
        while self.events and self.events[0][0] < until_s:
            self.now_s, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_on_{kind}")(what)

    def _at(self, at_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (at_s, next(self.order), kind, what))

    def _on_announce(self, group: int) -> None:
        records = dict(self.view.records)
        for number, (peer, record) in enumerate(self.view.records.items()):
            if number % 10 == group:
                worker = self.workers[peer]
                load = replace(record.load, sessions=worker.sessions)
                records[peer] = replace(record, load=load, sequence=record.sequence + 1)
        version = self.view.version + (self.wish.mode == "load")
        self.view = replace(self.view, records=records, version=version)
        self._at(self.now_s + ANNOUNCE_S, "announce", group)

    def _on_session(self, number: int) -> None:
        client = self.clients[number]
        router = self.routers[client.gateway]
        for hop in client.chain:
            self.workers[hop.peer].sessions -= 1
        router.ended(self.view, (hop.peer for hop in client.chain))
        began_s = time.perf_counter()
        blocks = range(self.view.model_blocks)
        client.chain = router.choose(self.view, blocks, self.wish, rng=self.rng).chain
        self.route_s.append(time.perf_counter() - began_s)
        self.chains.add(client.chain)
        for hop in client.chain:
            self.workers[hop.peer].sessions += 1
        client.tokens_left = int(self.rng.integers(*ANSWER_TOKENS))
        self._on_token(number)

    def _on_token(self, number: int) -> None:
        """The first hop has the token."""
        client = self.clients[number]
        client.hop, client.token_began_s = 0, self.now_s
        self._on_arrive(number)

    def _on_arrive(self, number: int) -> None:
        client = self.clients[number]
        hop = client.chain[client.hop]
        self.workers[hop.peer].waiting.append((number, hop.span))
        self._begin_pass(hop.peer)

    def _begin_pass(self, peer: PeerId) -> None:
        pass_s = self.workers[peer].begin()
        if pass_s is not None:
            self._at(self.now_s + pass_s, "pass", peer)

    def _on_pass(self, peer: PeerId) -> None:
        worker = self.workers[peer]
        done, worker.running = worker.running, []
        for number, _ in done:
            client = self.clients[number]
            here = client.chain[client.hop].peer
            if client.hop + 1 < len(client.chain):
                client.hop += 1
                self._at(self.now_s + self._link_s(here, client.chain[client.hop].peer), "arrive", number)
            else:
                back_s = self.now_s + self._link_s(here, client.chain[0].peer)
                self._at(back_s, "answered", number)
        self._begin_pass(peer)

    def _on_answered(self, number: int) -> None:
        client = self.clients[number]
        client.step_s.append(self.now_s - client.token_began_s)
        client.tokens_left -= 1
        if client.tokens_left > 0:
            self._on_token(number)
        else:
            self._on_session(number)

    def _link_s(self, sender: PeerId, receiver: PeerId) -> float:
        return 0.0 if sender == receiver else self.truth.records[sender].rtts_s[receiver] / 2


def _pass_costs(rates: PeerRates) -> tuple[float, float]:
    row_s = 1 / rates.saturated_decode_tokens_per_s
    return 1 / rates.decode_tokens_per_s - row_s, row_s


def small_live_swarm(seed: int) -> SwarmView:
    """Eight workers of a 16-block model, slowed down 1 to 8 times, 5, 50 or 100 ms apart: the live experiment's."""
    rng = np.random.default_rng(seed)
    spans = [(0, 8), (8, 16), (0, 5), (5, 11), (11, 16), (0, 16), (4, 12), (0, 8)]
    names = [f"worker-{number}" for number in range(len(spans))]
    ids = [peer_id_of_name(name) for name in names]
    rtts_s = rng.choice([0.005, 0.05, 0.1], (len(spans), len(spans)))
    rtts_s = np.triu(rtts_s, 1) + np.triu(rtts_s, 1).T
    records: list[PeerRecord] = []
    for number, (first, end) in enumerate(spans):
        rate = 1600.0 / float(rng.choice([1, 2, 4, 8]))
        records.append(
            PeerRecord(
                peer=ids[number],
                name=names[number],
                model="m",
                first_block=first,
                end_block=end,
                rates=PeerRates(
                    decode_tokens_per_s=rate,
                    saturated_decode_tokens_per_s=4 * rate,
                    prefill_tokens_per_s=12 * rate,
                ),
                load=PeerLoad(kv_free_tokens=10**6, kv_total_tokens=10**6),
                terms=PeerTerms(),
                rtts_s={
                    ids[other]: float(rtts_s[number, other]) for other in range(len(spans)) if other != number
                },
                expires_unix_s=float("inf"),
            )
        )
    gateway = {peer: float(rng.choice([0.005, 0.05, 0.1])) for peer in ids}
    return SwarmView.of(records, model="m", model_blocks=16, unix_now_s=0.0, rtts_s=gateway)


def big_swarm(seed: int) -> SwarmView:
    return random_swarm(np.random.default_rng(seed), peers=60, blocks=80)


# Answers take four times as long in the second one.
SWARMS = {"8 workers, 16 blocks": (small_live_swarm, 1.0), "60 workers, 80 blocks": (big_swarm, 4.0)}


def measure(view: SwarmView, wish: RouteWish, **run: Any) -> dict[str, float]:
    """What the clients saw after the warm-up."""
    until_s = run.pop("until_s")
    simulation = Simulation(view, wish, **run)
    simulation.run(WARM_UP_FRACTION * until_s)
    for client in simulation.clients:
        client.step_s.clear()
    simulation.run(until_s)
    steps = [step_s for client in simulation.clients for step_s in client.step_s]
    each = [len(client.step_s) for client in simulation.clients]
    return {
        "p50_step_s": float(np.percentile(steps, 50)),
        "p95_step_s": float(np.percentile(steps, 95)),
        "tokens_per_s": len(steps) / ((1 - WARM_UP_FRACTION) * until_s),
        "fairness": sum(each) ** 2 / (len(each) * sum(tokens**2 for tokens in each)),
        "chains": len(simulation.chains),
        "median_route_s": statistics.median(simulation.route_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of virtual time, a quarter of it warm-up"
    )
    parser.add_argument("--no-batching", action="store_true", help="workers run one session at a time")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.seeds, options.seconds = [1, 16], 1, 20.0
    samples: list[dict[str, Any]] = []
    for swarm, (make, longer) in SWARMS.items():
        for clients, gateways in _crowds(options.clients):
            for mode, wish in MODES.items():
                for seed in range(options.seeds):
                    seen = measure(
                        make(seed),
                        wish,
                        clients=clients,
                        gateways=gateways,
                        batches=not options.no_batching,
                        seed=seed,
                        until_s=longer * options.seconds,
                    )
                    samples.append(
                        {"swarm": swarm, "clients": clients, "gateways": gateways, "mode": mode, "seed": seed}
                        | {name: round(value, 6) for name, value in seen.items()}
                    )
    summary = summarise(samples)
    summary["as good as either of PETALS' modes"] = verdict(summary)
    if options.quick:
        print(json.dumps(summary, indent=1))
        return
    write_result(
        "routing_load" + ("_no_batching" if options.no_batching else ""),
        settings=vars(options) | {"announce_s": ANNOUNCE_S, "answer_tokens": ANSWER_TOKENS},
        samples=samples,
        summary=summary,
        figures=list(figures(samples)),
    )


def _crowds(clients: Sequence[int]) -> Iterator[tuple[int, int]]:
    """All behind one gateway, which knows its own sessions; and each behind its own, which knows only what is
    announced."""
    for count in clients:
        yield count, 1
        if count > 1:
            yield count, count


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds, by swarm, gateways and clients."""
    summary: dict[str, Any] = {}
    for key, group in itertools.groupby(sorted(samples, key=_cell), key=_cell):
        swarm, alone, clients, mode = key
        rows = list(group)
        summary.setdefault(swarm, {}).setdefault("a gateway each" if alone else "one gateway", {}).setdefault(
            str(clients), {}
        )[mode] = {
            name: round(statistics.median(row[name] for row in rows), 4)
            for name in ("p50_step_s", "p95_step_s", "tokens_per_s", "fairness", "chains", "median_route_s")
        }
    return summary


def verdict(summary: dict[str, Any]) -> dict[str, bool]:
    """The brief's check: at the highest load, no mode of a front is worse than PETALS' random walk in latency, nor
    than PETALS' shortest chain in throughput."""
    found: dict[str, bool] = {}
    for swarm, crowds in summary.items():
        for gateways, by_clients in crowds.items():
            by_mode = by_clients[max(by_clients, key=int)]
            for mode, seen in by_mode.items():
                if mode not in (PETALS_LATENCY, PETALS_THROUGHPUT):
                    quick = seen["p50_step_s"] <= by_mode[PETALS_THROUGHPUT]["p50_step_s"]
                    many = seen["tokens_per_s"] >= by_mode[PETALS_LATENCY]["tokens_per_s"]
                    found[f"{swarm}, {gateways}, {mode}"] = quick and many
    return found


def _cell(sample: dict[str, Any]) -> tuple[str, bool, int, str]:
    return sample["swarm"], sample["gateways"] > 1, sample["clients"], sample["mode"]


def figures(samples: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    for swarm in SWARMS:
        for quantity, label in (
            ("p95_step_s", "p95 time per token (s)"),
            ("tokens_per_s", "tokens/s, all clients"),
        ):
            figure = Figure(f"{swarm}, a gateway each", "clients", label, log_x=True, log_y=True)
            for mode in MODES:
                rows = [
                    row
                    for row in samples
                    if row["swarm"] == swarm and row["mode"] == mode and row["gateways"] == row["clients"]
                ]
                counts = sorted({row["clients"] for row in rows})
                figure.add_line(
                    mode,
                    counts,
                    [
                        statistics.median(row[quantity] for row in rows if row["clients"] == count)
                        for count in counts
                    ],
                )
            yield figure


if __name__ == "__main__":
    main()
