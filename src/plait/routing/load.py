"""Mode `load`: least expected time of a decoding round, with the sessions that the peers announce.

PETALS' model knows neither batching nor other sessions, and returns every token to the client. Ours counts what our
data path does: each hop batches whoever is there, hops hand over to each other directly, and the last hop hands the
token to the first.

**A server with S other sessions.** Its forward pass with m tokens takes t(m) = n (c0 + c1 m) for n blocks: c0 for
reading the weights, c1 for each row, from the announced rates (1 / decode rate = c0 + c1, 1 / saturated rate = c1). A
session comes back to it after the rest of its round, Z. While a pass runs, each of the S arrives with the share
t / (Z + t) of its round, so that passes carry m = S t / (Z + t) tokens of others, with t = t(m), or t(1) where that is
less than one: near S where links are short, few where Z is long. A token that arrives waits for half a pass if one is
running (m >= 1: always; else with probability m), then runs with the m that arrived beside it. Sessions that cross
other blocks of the machine run in passes of their own; that is counted for chains that leave a machine early, which
is rarely worth it on a busy one. Z is estimated once for the swarm: the best round that there is without any sessions.

**Clients that choose at once** see the same announcements. If each took the best chain, all would take the same, and
the announcements that follow would send all of them elsewhere (Mitzenmacher, "How useful is old information?", 2000:
with stale loads, choosing the least loaded is worse than choosing at random). So the choice is among chains whose
expected rounds are close: every server's expected time is multiplied by a log-normal factor before the search, which
costs a lone client a few per cent and spreads a crowd.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from plait.cluster import SwarmView
from plait.errors import NoRoute
from plait.ids import PeerId
from plait.routing.chain import Chain
from plait.routing.costs import CACHE_PENALTY_S, SumCost, seconds_per_block
from plait.routing.graph import ChainGraph, Floats, chain_graph
from plait.routing.path_values import PathValues
from plait.routing.sweep import Path, WaysToGo, edges, shortest_path, ways_to_go

HOP_OVERHEAD_S = 0.0005  # framing, encryption and wake-ups of a hop of ours
SPREAD = 0.05  # standard deviation of the logarithm of the random factor: bench/routing_load.py
BACKLOG_STEPS = 128  # a prompt that waits now delays one step of an answer of about this length
MAX_FIRST_HOPS = 12  # sweeps for closed rounds; their bounds nearly always end the search sooner


def least_loaded_round(
    graph: ChainGraph,
    *,
    need_tokens: int,
    unannounced: Mapping[PeerId, int],
    closed: bool,
    rng: np.random.Generator,
    spread: float = SPREAD,
    terms: "LoadTerms | None" = None,
) -> tuple[float, Path]:
    """A chain with about the least expected round, and its expected round.

    `unannounced`: sessions that peers have and do not announce yet, less those that they announce and have no more.
    `closed`: the last hop hands its token to the first, else to whoever drives the chain. `terms`: of the same graph,
    from an earlier choice.
    """
    terms = terms or LoadTerms(graph)
    idle_s = terms.idle_s(need_tokens, closed=closed)
    cost = terms.cost(need_tokens, terms.sessions(unannounced), round_s=idle_s)
    factor = rng.lognormal(0.0, spread, graph.servers)[graph.machine]
    drawn = replace(cost, arrive=cost.arrive * factor, per_block=cost.per_block * factor)
    _, path = shortest_round(graph, drawn, terms.closing_s(closed=closed))
    return terms.round_s(cost, path, closed=closed), path


def expected_round_s(view: SwarmView, chain: Chain) -> float:
    """Expected seconds of a decoding round over a chain of the whole model, whichever mode chose it: what a client
    waits for each token, given the sessions that the machines announce; infinite if they do not serve it any more."""
    try:
        graph = chain_graph(view, range(view.model_blocks), either_way=True, early_exits=True)
    except NoRoute:  # machines that leave go on with the chains that they are in
        return np.inf
    numbers = {(record.peer, int(graph.end[number])): number for number, record in enumerate(graph.records)}
    if any((hop.peer, hop.span.stop) not in numbers for hop in chain):
        return np.inf
    path = tuple(numbers[hop.peer, hop.span.stop] for hop in chain)
    terms = LoadTerms(graph)
    cost = terms.cost(0, terms.sessions({}), round_s=terms.idle_s(0, closed=True))
    return terms.round_s(cost, path, closed=True)


class LoadTerms:
    """What one graph says of loads and does not change from one choice on it to the next."""

    def __init__(self, graph: ChainGraph) -> None:
        records = graph.records
        alone_s = seconds_per_block(graph)
        self.graph = graph
        # Where nobody measured it, a batch is taken to gain nothing.
        self._row_s = np.minimum(
            _inverse([record.rates.saturated_decode_tokens_per_s for record in records], np.inf), alone_s
        )
        self._pass_s = alone_s - self._row_s
        self._blocks = graph.span_blocks.astype(np.float64)
        self._early_s = np.where(graph.early, self._blocks * self._pass_s, 0.0)
        queued = np.array([record.load.queued_tokens for record in records])
        prefill_s = _inverse([record.rates.prefill_tokens_per_s for record in records], 0.0)
        transfer_s = _inverse([record.rates.network_tokens_per_s for record in records], 0.0)
        self._arrive_s = HOP_OVERHEAD_S + transfer_s + queued * self._blocks * prefill_s / BACKLOG_STEPS
        loads = [record.load for record in records]
        # An unknown cache has room for anything.
        self._free_tokens = np.array(
            [load.kv_free_tokens if load.kv_total_tokens else np.inf for load in loads], dtype=np.float64
        )
        self._announced = [load.sessions for load in loads]
        self._closing_s = closing_delays_s(graph)
        self._values = PathValues(graph)
        self._idle_s: dict[tuple[bytes, bool], float] = {}

    def cost(self, need_tokens: int, sessions: Floats, *, round_s: float) -> SumCost:
        """See `load_cost`."""
        pass_s, row_s, blocks = self._pass_s, self._row_s, self._blocks
        others = _tokens_of_others(sessions, blocks * pass_s, blocks * row_s, round_s)
        running_s = blocks * (pass_s + row_s * np.maximum(others, 1.0))
        busy = np.minimum(others, 1.0)
        # Who leaves early shares no pass with those who stay, and waits for theirs too.
        wait_s = busy * (running_s / 2 + self._early_s)
        short = need_tokens > self._free_tokens
        return SumCost(
            delay_weight=1.0,
            entry=self.graph.entry_delay_s,
            arrive=self._arrive_s + wait_s + CACHE_PENALTY_S * short,
            per_block=pass_s + row_s * (1 + others),
            exit=self.graph.exit_delay_s,
        )

    def sessions(self, unannounced: Mapping[PeerId, int]) -> Floats:
        """Sessions at each server: those announced, and those that are not yet."""
        if not unannounced:
            return np.array(self._announced, dtype=np.float64)
        return np.array(
            [
                max(0, announced + unannounced.get(record.peer, 0))
                for announced, record in zip(self._announced, self.graph.records, strict=True)
            ],
            dtype=np.float64,
        )

    def closing_s(self, *, closed: bool) -> Floats | None:
        """From last hops to first hops, where rounds are closed."""
        return self._closing_s if closed else None

    def idle_s(self, need_tokens: int, *, closed: bool) -> float:
        """The best round without any sessions; it depends on a request by who has too little memory for it."""
        key = ((need_tokens > self._free_tokens).tobytes(), closed)
        known_s = self._idle_s.get(key)
        if known_s is None:
            idle = self.cost(need_tokens, np.zeros(self.graph.servers), round_s=1.0)
            known_s, _ = shortest_round(self.graph, idle, self.closing_s(closed=closed))
            self._idle_s[key] = known_s
        return known_s

    def round_s(self, cost: SumCost, path: Path, *, closed: bool) -> float:
        """Expected seconds of a round over a path."""
        graph = self.graph
        if closed and len(path) == 1 and graph.blocks.stop == graph.end[path[0]]:
            return float(cost.arrive[path[0]] + len(graph.blocks) * cost.per_block[path[0]])  # most often
        total = float(self._values.values([cost], [path])[0, 0])
        if not closed:
            return total
        first = int(np.searchsorted(graph.entering, path[0]))
        last = path[-1] - graph.leaving.start
        return total - float(cost.entry[path[0]] + cost.exit[path[-1]]) + float(self._closing_s[last, first])


def load_cost(graph: ChainGraph, need_tokens: int, sessions: Floats, *, round_s: float) -> SumCost:
    """Expected seconds of the hops of a round, where each server has `sessions` others; `round_s` is Z.

    A server whose free cache is too small costs PETALS' penalty more.
    """
    return LoadTerms(graph).cost(need_tokens, sessions, round_s=round_s)


def _inverse(rates: Sequence[float], unknown: float) -> Floats:
    return np.array([1 / rate if rate > 0 else unknown for rate in rates])


def _tokens_of_others(sessions: Floats, pass_s: Floats, row_s: Floats, round_s: float) -> Floats:
    """The m with m (Z + t) = S t, t = pass_s + row_s max(m, 1): [servers]."""
    alone_s = pass_s + row_s
    seldom = sessions * alone_s / (round_s + alone_s)
    linear = round_s + pass_s - sessions * row_s
    constant = sessions * pass_s
    root = np.sqrt(linear**2 + 4 * row_s * constant)
    # Of the two forms of the root, the one that does not subtract near-equals.
    often = np.where(
        linear > 0, 2 * constant / np.maximum(linear + root, 1e-300), (root - linear) / (2 * row_s)
    )
    return np.where(seldom < 1, seldom, often)


def closing_delays_s(graph: ChainGraph) -> Floats:
    """From last hops to first hops, [leaving, entering]; nothing from a server to itself."""
    first = graph.entering - graph.leaving.start  # counted among those that leave
    last = np.arange(len(graph.closing_delay_s), dtype=np.intp)
    return np.where(last[:, None] == first, 0.0, graph.closing_delay_s)


def shortest_round(graph: ChainGraph, cost: SumCost, closing_s: Floats | None) -> tuple[float, Path]:
    """The chain of least cost; a closed round costs the way from its last hop to its first, not those to the driver.

    Closed rounds are searched for from one first hop after the other, the most promising first, until the bounds of
    the rest (each one's least way to go, if the last hop were free to choose whom to hand its token) are no better. The
    same ways to go tell each search what need not be followed.
    """
    laid = edges(graph, cost)
    if closing_s is None:
        return shortest_path(graph, laid)
    entering = laid.entering - cost.entry[graph.entering]
    open_rounds = replace(laid, entering=entering, leaving=closing_s.min(axis=1))
    ways = ways_to_go(graph, open_rounds, ())
    bounds = entering + ways.measure[graph.entering]
    order = np.argsort(bounds, kind="stable")[:MAX_FIRST_HOPS]
    limit = float(bounds[order[0]]) + _closing_more_s(graph, ways, closing_s, int(order[0]))
    best: tuple[float, Path] = (np.inf, ())
    for first in order:
        if bounds[first] >= best[0]:
            break
        alone = np.full(len(entering), np.inf)
        alone[first] = entering[first]
        laid_alone = replace(laid, entering=alone, leaving=closing_s[:, first])
        # Sums in another order may differ in their last bits.
        found = shortest_path(
            graph, laid_alone, to_go=ways.measure, limit=min(limit, best[0]) * (1 + 1e-9) + 1e-12
        )
        best = min(best, found)
    return best


def _closing_more_s(graph: ChainGraph, ways: WaysToGo, closing_s: Floats, first: int) -> float:
    """How much longer the way to go from a first hop takes when its last hop hands its token back to it."""
    server = int(graph.entering[first])
    while ways.following[server] >= 0:
        server = int(ways.following[server])
    last = server - graph.leaving.start
    return float(closing_s[last, first] - closing_s[last].min())
