"""Where requests come in: it sees the swarm through what the machines announce, and asks the live router for chains.

Announcements are as old as in a real swarm: a machine says what it has to do every `announce_s`, at a moment of its
own. What the gateway itself has given away since, the `Router` remembers. A machine that is gone is left out once
somebody has noticed, and back in when it announces itself anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from plait.cluster import PeerLoad, PeerRates, PeerRecord, PeerTerms, SwarmView
from plait.costs import CostModel, StepWork
from plait.ids import PeerId
from plait.routing import Chain, Router, RouteWish
from plait.simulator.simulated_network import GATEWAY, SimulatedNetwork
from plait.simulator.simulated_worker import MachineSpec, SimulatedWorker

_MODEL = "simulated"
_BATCH = 64  # of the rate at which many sequences decode side by side
_CONTEXT_TOKENS = 128
_PROMPT_TOKENS = 1024
MAX_KNOWN_RTTS = 64
"""Machines ping those near them, in a large swarm."""


class SimulatedGateway:
    """The view, and the router over it."""

    def __init__(
        self,
        workers: Mapping[PeerId, SimulatedWorker],
        network: SimulatedNetwork,
        *,
        model_blocks: int,
        wish: RouteWish,
        rng: np.random.Generator,
    ) -> None:
        self._workers = workers
        self._wish = wish
        self._wishes: dict[int, RouteWish] = {}
        self._rng = rng
        self._router = Router()
        self._records = _records(list(workers.values()), network)
        rtts_s = {worker.peer: 2 * network.one_way_s(GATEWAY, worker.name) for worker in workers.values()}
        self.view = SwarmView.of(
            self._records.values(),
            model=_MODEL,
            model_blocks=model_blocks,
            unix_now_s=0.0,
            rtts_s=rtts_s,
            version=1,
        )
        self._present = dict(self.view.records)
        self._stale = False

    def choose(
        self,
        blocks: range,
        need_tokens: int,
        *,
        without: frozenset[PeerId] = frozenset(),
        after: PeerId | None = None,
        before: PeerId | None = None,
    ) -> Chain:
        """A chain for blocks of one request.

        Raises:
            NoRoute: some block has no machine that is known to be there.
        """
        self._refresh()
        wish = self._wishes.get(need_tokens)
        if wish is None:
            wish = self._wishes[need_tokens] = replace(self._wish, need_tokens=need_tokens)
        routed = self._router.choose(
            self.view, blocks, wish, rng=self._rng, without=without, after=after, before=before
        )
        return routed.chain

    def ended(self, peers: Sequence[PeerId]) -> None:
        """A session that crossed these machines is over there."""
        self._router.ended(self.view, peers)

    def hear(self, worker: SimulatedWorker) -> None:
        """A machine announces what it has to do."""
        record = self._records[worker.peer]
        load = PeerLoad(
            sessions=worker.sessions,
            queued_tokens=worker.queued_tokens,
            step_s=worker.step_s,
            kv_free_tokens=worker.free_tokens,
            kv_total_tokens=worker.total_tokens,
        )
        record = replace(record, load=load, sequence=record.sequence + 1)
        self._records[worker.peer] = self._present[worker.peer] = record
        self._stale = True

    def lose(self, peer: PeerId) -> None:
        """A machine is known to be gone."""
        self._present.pop(peer, None)
        self._stale = True

    def knows(self, peer: PeerId) -> bool:
        """Whether a machine is taken to be there."""
        return peer in self._present

    def _refresh(self) -> None:
        if self._stale:
            records = {peer: self._present[peer] for peer in sorted(self._present)}
            self.view = replace(self.view, records=records, version=self.view.version + 1)
            self._stale = False


def measured_rates(costs: CostModel, blocks: int) -> PeerRates:
    """What a machine would announce of itself: tokens per second through one block, as members measure."""

    def tokens_per_s(tokens: int, sequences: int, context_tokens: int) -> float:
        chunks = [(tokens, context_tokens)] * sequences
        work = StepWork.of(chunks, sampled=0)
        return tokens * sequences * blocks / (costs.step_s(work) + costs.host_s(work))

    return PeerRates(
        decode_tokens_per_s=tokens_per_s(1, 1, _CONTEXT_TOKENS),
        saturated_decode_tokens_per_s=tokens_per_s(1, _BATCH, _CONTEXT_TOKENS),
        prefill_tokens_per_s=tokens_per_s(_PROMPT_TOKENS, 1, 0),
    )


def _records(workers: Sequence[SimulatedWorker], network: SimulatedNetwork) -> dict[PeerId, PeerRecord]:
    return {
        worker.peer: _record(
            worker.spec,
            measured_rates(worker.spec.costs, len(worker.spec.blocks)),
            _rtts(worker, workers, network),
        )
        for worker in workers
    }


def _rtts(
    worker: SimulatedWorker, workers: Sequence[SimulatedWorker], network: SimulatedNetwork
) -> dict[PeerId, float]:
    """Round trips to those machines that may follow or precede it, the nearest first where there are many."""
    others = [other for other in workers if other.peer != worker.peer]
    rtts_s = [2 * network.one_way_s(worker.name, other.name) for other in others]
    nearest = sorted(range(len(others)), key=rtts_s.__getitem__)[:MAX_KNOWN_RTTS]
    return {others[place].peer: rtts_s[place] for place in nearest}


def _record(spec: MachineSpec, rates: PeerRates, rtts_s: dict[PeerId, float]) -> PeerRecord:
    total_tokens = spec.kv_blocks * spec.block_tokens
    return PeerRecord(
        peer=spec.peer,
        name=spec.name,
        model=_MODEL,
        first_block=spec.blocks.start,
        end_block=spec.blocks.stop,
        rates=rates,
        load=PeerLoad(kv_free_tokens=total_tokens, kv_total_tokens=total_tokens),
        terms=PeerTerms(price_per_hour=spec.price_per_hour),
        rtts_s=rtts_s,
        expires_unix_s=float("inf"),
    )
