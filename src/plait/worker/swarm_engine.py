"""A model that a swarm serves, with the interface of `AsyncEngine`: the gateway serves from either.

A request is one session for each of its samples. A session's state machine says what to do
(session/chain_session.py), a `SessionDriver` does it, and what it emits becomes text and deltas here. Nothing is
computed on this machine by this part: it needs the tokenizer and the configuration of the model, and no weights.
"""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
import numpy as np

from plait.engine import (
    EngineStatus,
    LiveRequest,
    SampledToken,
    check_prompt,
    new_sequence,
)
from plait.errors import BadSetup, EngineFailure, NoCapacity, NotReady, ServingError
from plait.ids import PeerId, RequestId, SessionId
from plait.routing import Hop, Routed, Router, RouteWish, expected_round_s, wish_of_fields
from plait.session import (
    Ban,
    ChainSession,
    Emit,
    FindRoute,
    GenerationRequest,
    Heard,
    Leaving,
    Lost,
    PositionLogprobs,
    RequestDelta,
    SessionTimes,
    SessionWish,
    TokenLogprob,
    ViewChanged,
    to_wire_sampling,
)
from plait.transport import Network
from plait.wire import (
    MAX_DRAFT_TOKENS,
    ChainHop,
    Fault,
    Fenced,
    HiddenFormat,
    Message,
    Opened,
    Refused,
    TokenReport,
    Tokens,
)
from plait.worker.async_engine import EngineState, LoadProgress, ServedModel, not_ready
from plait.worker.lookout import Lookout
from plait.worker.outbox import Outbox
from plait.worker.pace import Pace
from plait.worker.request_stream import RequestStream
from plait.worker.session_driver import SessionDriver, SessionHooks
from plait.worker.swarm_model import SwarmModel

log = logging.getLogger(__name__)

_SLOW_S = 0.05
"""Tokens that take less are not looked into: there, what this machine itself does weighs as much as the chain."""
_JUDGE_EVERY_S = 1.0

RunBlocking = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmOptions:
    """How a gateway uses its swarm.

    `route` and `draft_tokens` (how many tokens a session may guess ahead) hold where a request does not say otherwise.
    `route_s`: how long the search for a front may take. `wire_format`: how hidden states travel; only float32 leaves
    the tokens as they would be on one machine.
    """

    route: RouteWish = field(default_factory=RouteWish)
    route_s: float = 1.0
    draft_tokens: int = 0
    wire_format: HiddenFormat = "float32"
    times: SessionTimes = field(default_factory=SessionTimes)
    max_sessions: int = 1024


SessionState = Literal["opening", "flowing", "recovering"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmCounts:
    """What this gateway's sessions do and have done; totals are since the start.

    Sessions are `opening` until their first chain stands, then `flowing`, or `recovering` while it is repaired.
    `recoveries_total`: how often a session's chain was changed or resumed under way. `replayed_tokens_total`:
    positions that hops computed again for that. `banned_total`: hops that failed. `tokens_by_peer`: tokens of answers
    that went through each peer.
    """

    sessions: int
    sessions_by_state: dict[SessionState, int]
    sessions_by_peer: dict[PeerId, int]
    sessions_total: int
    recoveries_total: int
    replayed_tokens_total: int
    banned_total: int
    generated_tokens_total: int
    tokens_by_peer: dict[PeerId, int]


@dataclass(slots=True)
class _Running:
    """A request and the sessions of its samples."""

    live: LiveRequest
    stream: RequestStream = field(default_factory=RequestStream)
    drivers: list[SessionDriver] = field(default_factory=list[SessionDriver])
    paces: dict[int, Pace] = field(default_factory=lambda: defaultdict(Pace))


class SwarmEngine:
    """Serves one model to many asyncio tasks from the workers of a swarm; enter it to start, leave it to stop.

    The owner of the network calls `on_message` and `on_lost`, and `view_changed` when records have changed. `load`
    reads the model, outside the event loop (`run_blocking`); `look` makes the lookout over the swarm once the model is
    known. `rng` draws session ids and the seeds of requests that bring none.
    """

    def __init__(
        self,
        network: Network,
        *,
        names: tuple[str, ...],
        load: Callable[[Callable[[LoadProgress], None]], SwarmModel],
        look: Callable[[SwarmModel], Lookout],
        rng: np.random.Generator,
        options: SwarmOptions = SwarmOptions(),
        unix_now: Callable[[], float] = time.time,
        run_blocking: RunBlocking = asyncio.to_thread,
    ) -> None:
        self.names = names
        self.state: EngineState = "loading"
        self.load_progress = LoadProgress("starting", 0, 0)
        self.failure: ServingError | None = None
        self.options = options
        self._network = network
        self._load = load
        self._look = look
        self._rng = rng
        self._unix_now = unix_now
        self._run_blocking = run_blocking
        self._router = Router()
        self._routing = asyncio.Lock()
        self._outbox = Outbox(network, self.on_lost)
        self._swarm_model: SwarmModel | None = None
        self._served: ServedModel | None = None
        self._lookout: Lookout | None = None
        self._running: dict[RequestId, _Running] = {}
        self._drivers: dict[SessionId, SessionDriver] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._settled = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._sessions_total = 0
        self._recoveries = 0
        self._replayed = 0
        self._tokens_by_peer: Counter[PeerId] = Counter()
        self._banned = 0
        self._judged_s = 0.0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loading = self._loop.create_task(self._load_model())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state == "ready":
            self.state = "draining"
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        for driver in list(self._drivers.values()):
            driver.cancel()
        stopping = NotReady("the server is stopping; retry elsewhere")
        for running in self._running.values():
            running.stream.put(stopping)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._outbox.close()

    # -- what the gateway asks ----------------------------------------------------------------------------

    @property
    def model(self) -> ServedModel:
        """The served model.

        Raises:
            NotReady: it is still loading, or could not be loaded.
        """
        if self._served is None:
            raise not_ready(self.state, self.failure)
        return self._served

    @property
    def lookout(self) -> Lookout:
        """The swarm as requests are routed through it.

        Raises:
            NotReady: the model is still loading, or could not be loaded.
        """
        if self._lookout is None:
            raise not_ready(self.state, self.failure)
        return self._lookout

    async def wait_settled(self) -> EngineState:
        """Wait until loading has ended, well or not."""
        await self._settled.wait()
        return self.state

    def status(self) -> EngineStatus:
        """Counts of now; what concerns KV blocks is in the workers' records."""
        return EngineStatus(
            running=sum(driver.session.started for driver in self._drivers.values()),
            waiting=sum(not driver.session.started for driver in self._drivers.values()),
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
        )

    def counts(self) -> SwarmCounts:
        """What the sessions do."""
        live = [driver.session for driver in self._drivers.values()]
        by_state: dict[SessionState, int] = {}
        for session in live:
            state = _session_state(session)
            by_state[state] = by_state.get(state, 0) + 1
        return SwarmCounts(
            sessions=len(live),
            sessions_by_state=by_state,
            sessions_by_peer=dict(Counter(hop.peer for session in live for hop in session.hops)),
            sessions_total=self._sessions_total,
            recoveries_total=self._recoveries + sum(session.recoveries for session in live),
            replayed_tokens_total=self._replayed + sum(session.replayed_tokens for session in live),
            banned_total=self._banned,
            generated_tokens_total=self._generated_tokens,
            tokens_by_peer=dict(self._tokens_by_peer),
        )

    def chains(self) -> dict[SessionId, tuple[ChainHop, ...]]:
        """The hops of each session that runs, in the order in which they began."""
        return {id: driver.session.hops for id, driver in self._drivers.items()}

    def check(self) -> None:
        """Assert that the chain of every session is one."""
        for driver in self._drivers.values():
            driver.session.check()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False if some were still running at the end."""
        if self.state == "ready":
            self.state = "draining"
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestDelta, None]:
        """Run a request; closing the iterator early cancels it, which frees what the workers hold of it.

        Raises:
            NotReady: loading, draining or failed.
            BadRequest: the request can never run on this model, or asks for what a swarm does not do.
            NoCapacity: no chain of workers has room, or (NoRoute) some blocks have no worker.
            EngineFailure: the swarm could not go on with it.
        """
        if self.state != "ready":
            raise not_ready(self.state, self.failure)
        if request.id in self._running:
            raise EngineFailure(f"request id {request.id!r} is already running")
        wishes, live = self._prepare(request)
        route = self._route_wish(request, wishes[0].max_tokens)
        running = self._running[request.id] = _Running(live)
        self._idle.clear()
        self._prompt_tokens += len(request.prompt_token_ids)
        finished = False
        try:
            for index, wish in enumerate(wishes):
                self._start(running, index, wish, route)
            while not finished:
                item = await running.stream.take()
                if isinstance(item, ServingError):
                    raise item
                finished = item.finished
                yield item
        finally:
            for driver in running.drivers:
                driver.cancel()
                self._forget(driver)
            del self._running[request.id]
            if not self._running:
                self._idle.set()

    # -- a request ----------------------------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> tuple[list[SessionWish], LiveRequest]:
        """What each sample's session is to do, and what their tokens mean."""
        model, sampling, options = self._swarm_model, request.sampling, self.options
        assert model is not None
        room_tokens = check_prompt(
            request, vocab_tokens=model.vocab_tokens, max_model_tokens=model.max_model_tokens
        )
        if len(self._drivers) + sampling.n > options.max_sessions:
            raise NoCapacity(f"{len(self._drivers)} sessions run through this gateway already; retry later")
        seed = sampling.seed if sampling.seed is not None else int(self._rng.integers(2**63))
        max_new_tokens = min(sampling.max_tokens or room_tokens, room_tokens)
        asked = request.route.draft_tokens if request.route is not None else None
        drafts = options.draft_tokens if asked is None else asked
        first = SessionWish(
            id=SessionId(""),
            model=model.fingerprint,
            blocks=range(model.blocks),
            vocab_tokens=model.vocab_tokens,
            prompt_token_ids=request.prompt_token_ids,
            max_tokens=len(request.prompt_token_ids) + max_new_tokens,
            sampling=to_wire_sampling(
                sampling, seed=seed & (2**64 - 1), sample_index=0, end_token_ids=model.eos_token_ids
            ),
            arrived_unix_s=self._unix_now(),
            draft_tokens=min(drafts, MAX_DRAFT_TOKENS),
            wire_format=options.wire_format,
        )
        live = LiveRequest(
            request=request,
            seed=seed & (2**64 - 1),
            max_new_tokens=max_new_tokens,
            eos_token_ids=model.eos_token_ids,
            arrived_s=self._loop.time(),
            sequences=[new_sequence(request, model.tokenizer, index=index) for index in range(sampling.n)],
            fanned_out=True,
        )
        wishes: list[SessionWish] = []
        for index in range(sampling.n):
            own = msgspec.structs.replace(first.sampling, sample_index=index)
            wishes.append(replace(first, id=SessionId(self._rng.bytes(16).hex()), sampling=own))
        return wishes, live

    def _route_wish(self, request: GenerationRequest, need_tokens: int) -> RouteWish:
        """How this request's chains are to be chosen, now and when one breaks: names are looked up once."""
        route, ask = self.options.route, request.route
        if ask is not None and ask.fields:
            route = wish_of_fields(ask.fields, route, self.lookout.view())
        return replace(route, need_tokens=need_tokens)

    def _start(self, running: _Running, index: int, wish: SessionWish, route: RouteWish) -> None:
        session = ChainSession(wish, self.options.times, own=self._network.peer)

        async def find_hops(wanted: FindRoute) -> tuple[ChainHop, ...]:
            nonlocal route
            began_s = time.perf_counter()  # a loop's own clock may stand still meanwhile
            routed = await self._find_chain(wanted, route)
            log.info(
                "session=%s request=%s mode=%s chain=%s expected_s=%.4f found_in_s=%.4f",
                wish.id[:12],
                running.live.request.id,
                routed.mode,
                ",".join(f"{hop.peer[:8]}[{hop.span.start}:{hop.span.stop}]" for hop in routed.chain),
                routed.expected_step_s,
                time.perf_counter() - began_s,
            )
            if route.mode == "pinned":
                # From here on, if a pinned peer is lost: whoever can take its place.
                route = replace(route, mode="load", pinned=())
            running.live.scheduled_s = running.live.scheduled_s or self._loop.time()
            return tuple(ChainHop(hop.peer, hop.span.start, hop.span.stop) for hop in routed.chain)

        def on_end(error: ServingError | None) -> None:
            self._forget(driver)
            if error is not None:
                running.stream.put(error)

        driver = SessionDriver(
            session,
            SessionHooks(
                post=self._outbox.post,
                find_hops=find_hops,
                on_ban=self._on_ban,
                on_tokens=lambda emit: self._on_tokens(running, index, driver, emit),
                on_end=on_end,
            ),
        )
        running.drivers.append(driver)
        self._drivers[wish.id] = driver
        self._sessions_total += 1
        driver.start()

    def _forget(self, driver: SessionDriver) -> None:
        if self._drivers.pop(driver.session.id, None) is not None:
            self._router.ended(self.lookout.view(), [hop.peer for hop in driver.session.hops])
            self._recoveries += driver.session.recoveries
            self._replayed += driver.session.replayed_tokens

    def _on_tokens(self, running: _Running, index: int, driver: SessionDriver, emit: Emit) -> None:
        live, now_s = running.live, self._loop.time()
        sequence = live.sequences[index]
        if not live.first_token_s:
            live.first_token_s = now_s
        if not sequence.output_token_ids:
            for hop in driver.session.hops:
                self.lookout.trust(hop.peer)
        for hop in driver.session.hops:
            self._tokens_by_peer[hop.peer] += len(emit.token_ids)
        pace_s = running.paces[index].count(len(emit.token_ids), now_s, epoch=driver.session.epoch)
        if pace_s is not None:
            self._judge(driver.session.hops, pace_s, now_s)
        for place, token_id in enumerate(emit.token_ids):
            report = emit.reports[place] if emit.reports is not None else None
            completes = emit.finished == "stop" and place == len(emit.token_ids) - 1
            self._generated_tokens += 1
            live.take_token(sequence, _sampled(token_id, report), completes=completes)
            if sequence.finish_reason is not None:
                break
        delta = live.take_delta(now_s)
        if sequence.finish_reason is not None and not emit.finished:
            driver.cancel()  # a stop string, which only the text shows
            self._forget(driver)
        if delta is not None:
            running.stream.put(delta)

    # -- routes -------------------------------------------------------------------------------------------

    async def _find_chain(self, wanted: FindRoute, route: RouteWish) -> Routed:
        view = self.lookout.view()
        deadline_s = self._loop.time() + self.options.route_s

        def choose() -> Routed:
            return self._router.choose(
                view,
                wanted.blocks,
                route,
                rng=self._rng,
                without=wanted.avoiding,
                after=wanted.after,
                before=wanted.before,
                deadline=lambda: self._loop.time() > deadline_s,
            )

        async with self._routing:
            # A front may take as long as `route_s`, everything else a few milliseconds.
            return await self._run_blocking(choose) if route.mode in ("exact", "tradeoff") else choose()

    def _judge(self, hops: Sequence[ChainHop], pace_s: float, now_s: float) -> None:
        """Compare what a token took with what it should, so that machines which overstate themselves are avoided."""
        if pace_s < _SLOW_S or now_s < self._judged_s + _JUDGE_EVERY_S:
            return
        self._judged_s = now_s
        expected_s = expected_round_s(self.lookout.view(), tuple(Hop(hop.peer, hop.blocks) for hop in hops))
        if expected_s < math.inf:
            self.lookout.judge([hop.peer for hop in hops], expected_s, pace_s)

    def _on_ban(self, ban: Ban) -> None:
        log.warning("peer=%s failed: %s", ban.peer[:12], ban.reason)
        self._banned += 1
        self.lookout.ban(ban.peer)
        if ban.misbehaved:
            self._spawn(self._network.drop(ban.peer, ban.reason))

    # -- the network --------------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        """Take a message; what does not concern a gateway is ignored."""
        match message:
            case Opened() | Refused() | Fenced() | Tokens() | Fault():
                driver = self._drivers.get(message.session)
                if driver is not None:
                    driver.dispatch(Heard(peer, message))
            case _:
                pass

    def on_lost(self, peer: PeerId, reason: str) -> None:
        """A peer is gone: its sessions go on without it."""
        if self._lookout is not None:
            self._lookout.lose(peer)
        for driver in list(self._drivers.values()):
            driver.dispatch(Lost(peer, reason))

    def view_changed(self) -> None:
        """Records have changed: sessions that wait look again, those over peers that leave are moved."""
        if self._lookout is None:
            return
        self._lookout.changed()
        for peer in self._lookout.worth_trying():
            self._spawn(self._reconnect(peer))
        back = self._lookout.take_back()
        view = self._lookout.view()
        for peer in self._tokens_by_peer.keys() - view.records.keys():
            del self._tokens_by_peer[peer]
        for driver in list(self._drivers.values()):
            driver.dispatch(ViewChanged(back))
            for hop in driver.session.hops:
                record = view.records.get(hop.peer)
                leaving = record is not None and record.state in ("draining", "offline")
                if leaving and not view.missing_blocks(hop.blocks):
                    driver.dispatch(Leaving(hop.peer))

    async def _reconnect(self, peer: PeerId) -> None:
        """A lost peer has said something: if it can be reached, it is there again."""
        with suppress(ServingError):
            await self._network.connect(peer)
            self.view_changed()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- loading ------------------------------------------------------------------------------------------

    async def _load_model(self) -> None:
        def on_progress(progress: LoadProgress) -> None:
            self.load_progress = progress

        try:
            model: SwarmModel = await self._run_blocking(lambda: self._load(on_progress))
            self._lookout = self._look(model)
        except ServingError as error:
            self.failure = error
        except Exception as error:
            log.exception("loading failed")
            self.failure = BadSetup(f"loading failed: {type(error).__name__}: {error}")
        else:
            self._swarm_model = model
            self._served = ServedModel(
                names=self.names,
                max_model_tokens=model.max_model_tokens,
                tokenizer=model.tokenizer,
                created_unix_s=int(self._unix_now()),
            )
        self.state = "ready" if self.failure is None else "failed"
        self._settled.set()


def _session_state(session: ChainSession) -> SessionState:
    if session.phase == "flowing":
        return "flowing"
    return "recovering" if session.recoveries else "opening"


def _sampled(token_id: int, report: TokenReport | None) -> SampledToken:
    if report is None:
        return SampledToken(token_id)
    top = tuple(TokenLogprob(other, logprob) for other, logprob in report.top)
    return SampledToken(token_id, PositionLogprobs(TokenLogprob(token_id, report.logprob), top))
