"""One span of a model in a swarm: takes sessions' messages from the network, runs the engine, sends on what comes out.

A session crosses the span or a part of it: chains enter where the hop before ends, and leave where the next one begins.

Everything but the forward pass happens on the event loop. The engine belongs to one task: between two steps it
applies what has arrived (open, feed, close), then has a step run (`run_step`: in a thread, live), and hands the
outputs to their sessions, which say what to send. So the engine is never touched while it computes, and every step
batches all that is ready.

Sessions end when their gateway says so, when it has been gone for `grace_s`, or when nobody has said anything about
them for `lease_s`: nothing stays behind.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from plait.cluster import PeerLoad, format_blocks
from plait.engine import Matcher, SampledToken, SpanEngine, SpanOutput, SpanSession
from plait.errors import BadFrame, BadRequest, EngineFailure, NoCapacity, NotFound, ServingError
from plait.ids import PeerId, SessionId
from plait.scheduling import SHARED_TOKENS, Round, gather_until_s
from plait.session import (
    CutOff,
    Feed,
    Forget,
    Forward,
    HopAction,
    HopFacts,
    HopSession,
    Rows,
    SampledRow,
    SamplingParams,
    Tell,
    Unreadable,
    from_wire_sampling,
)
from plait.transport import Network
from plait.wire import (
    CloseSession,
    FaultCode,
    Fence,
    LoanMessage,
    Message,
    Opened,
    OpenSession,
    RefusalCode,
    Refused,
    Resume,
    Step,
    Taken,
    TokenReport,
    Tokens,
    decode_hidden,
    encode_hidden,
    reason_text,
)
from plait.worker.engine_thread import RunStep
from plait.worker.lending import LendingLimits, WorkerLending
from plait.worker.outbox import Outbox

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""In a row; then the engine itself is broken, and the worker stops."""
_MESSAGE_BYTES = 4 << 20
"""Hidden states in one message: long enough to be sent at full speed, short enough for others to come in between."""
_LOAD_EVERY_S = 0.25
_STEP_SMOOTHING = 0.1
_MAX_CLOSED = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanWorkerOptions:
    """Bounds of one worker.

    `max_sessions` in all and `max_gateway_sessions` of one gateway are live at once. `kept_bytes`: outputs kept for
    replay; beyond, those of the oldest sessions go, which costs computing them again if the next hop is lost. `lending`
    is for an engine that has loans.
    """

    max_sessions: int = 4096
    max_gateway_sessions: int = 1024
    kept_bytes: int = 1 << 30
    lease_s: float = 300.0
    grace_s: float = 20.0
    lending: LendingLimits | None = None


@dataclass(slots=True)
class _Live:
    """A session here; outputs of steps up to `stale_step` are not its, or not any more."""

    session: HopSession
    opening: OpenSession
    blocks: range
    heard_s: float
    round: Round
    stale_step: int = 0
    kept_bytes: int = 0
    orphaned_s: float | None = None  # since when its gateway is gone


class SpanWorker:
    """Serves one span; enter it to start. The owner of the network calls `on_message` and `on_lost`.

    `model` names the model: sessions of another one are refused. `run_step` runs the engine's steps; where memory is
    lent, in a thread. `first_number`: above all that loans of this peer were ever numbered, such as the time of day.
    `failure` is set when the engine is broken and the worker has stopped, which `broken` is waited for.
    """

    def __init__(
        self,
        network: Network,
        engine: SpanEngine,
        *,
        model: str,
        run_step: RunStep,
        options: SpanWorkerOptions = SpanWorkerOptions(),
        first_number: int = 0,
    ) -> None:
        self.engine = engine
        self.blocks = engine.blocks
        self.failure: ServingError | None = None
        self.broken = asyncio.Event()
        self.block_tokens_total = 0
        """Positions that have come out, times the blocks they went through."""
        self._network = network
        self._model = model
        self._model_blocks = len(engine.spec.blocks)
        self._run_step = run_step
        self._options = options
        self._outbox = Outbox(network, self.on_lost)
        self._facts = HopFacts(
            hidden_values=engine.spec.hidden,
            vocab_tokens=engine.spec.vocab_tokens,
            message_tokens=max(64, _MESSAGE_BYTES // (4 * engine.spec.hidden)),
        )
        self._live: dict[SessionId, _Live] = {}
        self._closed: OrderedDict[tuple[PeerId, SessionId], int] = (
            OrderedDict()
        )  # each gateway's; the last epoch
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._step = 0  # the number of the latest step
        self._step_s = 0.0
        self._small_step_s = 0.0  # of those of few tokens
        self._failed_steps = 0
        self._kept_bytes = 0
        self._draining = False
        self._closing = False
        self._load = engine.load()
        self._load_at_s = 0.0
        self._computes = False  # the engine must not be touched
        self._tasks: set[asyncio.Task[None]] = set()
        self.lending: WorkerLending | None = None
        if options.lending is not None:
            self.lending = WorkerLending(
                network.peer,
                engine,
                options.lending,
                post=self._outbox.post,
                command=self._command,
                first_number=first_number,
            )

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if self.lending is not None:
            await self.lending.__aenter__()
        self._running = self._loop.create_task(self._run())
        self._spawn(self._expire())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for id in list(self._live):
            self._session_failed(id, "no_capacity", "this worker is leaving")
        self._closing = True
        self._wake.set()
        # A step that runs in a thread cannot be stopped, and nobody may touch its engine meanwhile.
        await asyncio.shield(self._running)
        if self.lending is not None:
            await self.lending.__aexit__(kind, error, trace)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._outbox.close()

    # -- what the member asks -----------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """Sessions that cross this worker now."""
        return len(self._live)

    @property
    def lent_blocks(self) -> int:
        """KV blocks that other machines have here now."""
        return 0 if self.lending is None else self.lending.told().lent_blocks

    def drain(self) -> None:
        """Take no new sessions; those that are here go on until their gateways move them."""
        self._draining = True
        if self.lending is not None:
            self.lending.drain()

    def load(self) -> PeerLoad:
        """How busy this worker is, as of a moment ago."""
        if not self._computes:
            self._load = self.engine.load()
        load = self._load
        return PeerLoad(
            sessions=len(self._live),
            queued_tokens=load.queued_tokens,
            step_s=self._step_s,
            kv_free_tokens=load.kv_free_tokens + load.kv_borrowable_tokens,
            kv_total_tokens=load.kv_total_tokens + load.kv_borrowable_tokens,
        )

    def hop_sessions(self) -> Iterable[HopSession]:
        """The sessions that cross this worker now."""
        return [live.session for live in self._live.values()]

    def check(self) -> None:
        """Assert that sessions, what they keep and the engine (unless it computes) agree."""
        for live in self._live.values():
            live.session.check()
            assert live.kept_bytes == live.session.kept.held_bytes
        assert self._kept_bytes == sum(live.kept_bytes for live in self._live.values())
        if self._computes:
            return
        self.engine.check()
        if not self._commands:
            ended = self.engine.session_ids() - self._live.keys()
            assert not ended, f"the engine holds sessions that have ended: {sorted(ended)}"

    # -- the network --------------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        """Take a message; what does not concern a hop of a chain is ignored."""
        match message:
            case OpenSession():
                self._open(peer, message)
            case Step():
                self._on_step(peer, message, tensors)
            case Tokens() | Taken():
                live = self._live.get(message.session)
                if live is not None:
                    live.heard_s = self._loop.time()
                    if isinstance(message, Tokens):
                        live.round.come_back(live.heard_s)
                        self._carry_out(live, live.session.on_tokens(peer, message))
                    else:
                        self._carry_out(live, live.session.on_taken(peer, message))
            case Fence() | Resume() | CloseSession():
                self._on_gateway(peer, message)
            case _:
                if self.lending is not None and isinstance(message, LoanMessage):
                    self.lending.on_message(peer, message, tensors)

    def on_lost(self, peer: PeerId, reason: str) -> None:
        """A peer is gone: sessions that would go on to it cannot, those of a gateway wait for it for a while."""
        now_s = self._loop.time()
        if self.lending is not None:
            self.lending.on_lost(peer)
        for live in list(self._live.values()):
            if live.session.gateway == peer and live.orphaned_s is None:
                live.orphaned_s = now_s
            self._carry_out(live, live.session.on_lost(peer))

    def _on_gateway(self, peer: PeerId, message: Fence | Resume | CloseSession) -> None:
        live = self._live.get(message.session)
        if live is None:
            if isinstance(message, CloseSession):
                self._remember_closed(peer, message.session, message.epoch)
            elif isinstance(message, Fence):
                self._refuse(peer, message, "unknown_session", "the session is not here, or not any more")
            return
        if peer != live.session.gateway:
            self._cut_off(peer, "it spoke for the gateway of a session")
            return
        live.heard_s, live.orphaned_s = self._loop.time(), None
        match message:
            case Fence():
                self._carry_out(live, live.session.on_fence(message))
            case Resume():
                self._carry_out(live, live.session.on_resume(message))
            case CloseSession():
                if message.epoch >= live.session.epoch:
                    self._end_session(live)

    def _on_step(self, peer: PeerId, step: Step, tensors: tuple[memoryview, ...]) -> None:
        live = self._live.get(step.session)
        if live is None or step.epoch != live.session.epoch:
            return
        live.heard_s = self._loop.time()
        live.round.come_back(live.heard_s)
        rows: Rows | Unreadable | None = None
        if tensors or not live.session.first:
            try:
                rows = decode_hidden(
                    tensors, live.opening.wire_format, len(step.token_ids), self._facts.hidden_values
                )
            except BadFrame as error:
                rows = Unreadable(error.message)
        self._carry_out(live, live.session.on_step(peer, step, rows))

    # -- sessions come and go -----------------------------------------------------------------------------

    def _open(self, peer: PeerId, opening: OpenSession) -> None:
        if opening.epoch <= self._closed.get((peer, opening.session), 0):
            return
        live = self._live.get(opening.session)
        if live is not None:
            if peer == live.session.gateway and opening.epoch <= live.session.epoch:
                return
            if peer != live.session.gateway:
                self._refuse(peer, opening, "bad_request", "the session is somebody else's")
                return
            self._end_session(live)
        why = self._why_not(peer, opening)
        if why is not None:
            self._refuse(peer, opening, *why)
            return
        try:
            sampling = None if opening.sampling is None else from_wire_sampling(opening.sampling)
        except BadRequest as error:
            self._refuse(peer, opening, "bad_request", error.message)
            return
        live = _Live(
            session=HopSession(opening, own=self._network.peer, gateway=peer, facts=self._facts),
            opening=opening,
            blocks=opening.hops[opening.index].blocks,
            heard_s=self._loop.time(),
            round=Round(chain=opening.hops, first=opening.index == 0),
            stale_step=self._step,
        )
        self._live[opening.session] = live
        if sampling is not None and sampling.constraint is not None:
            self._spawn(self._compile(live, sampling))
        else:
            self._command(lambda: self._engine_open(live, sampling, None))

    def _why_not(self, peer: PeerId, opening: OpenSession) -> tuple[RefusalCode, str] | None:
        """Why a session cannot be taken, if so."""
        if self.failure is not None or self._draining:
            return "no_capacity", "this worker is leaving"
        if opening.model != self._model:
            return "not_served", f"this worker serves another model than {opening.model!r}"
        if opening.index >= len(opening.hops) or opening.hops[opening.index].peer != self._network.peer:
            return "not_served", "this worker is not that hop"
        blocks, last = opening.hops[opening.index].blocks, opening.index == len(opening.hops) - 1
        if not (blocks and self.blocks.start <= blocks.start and blocks.stop <= self.blocks.stop):
            asked = f"{blocks.start}:{blocks.stop}"
            return "not_served", f"this worker serves blocks {format_blocks(self.blocks)}, not {asked}"
        if (opening.index == 0) != (blocks.start == 0) or last != (blocks.stop == self._model_blocks):
            return "bad_request", "the chain does not begin or end where the model does"
        of_gateway = sum(live.session.gateway == peer for live in self._live.values())
        if len(self._live) >= self._options.max_sessions or of_gateway >= self._options.max_gateway_sessions:
            return "no_capacity", f"{len(self._live)} sessions cross this worker already"
        return None

    async def _compile(self, live: _Live, sampling: SamplingParams) -> None:
        """A constraint can take seconds: not on the event loop."""
        assert sampling.constraint is not None
        try:
            matcher = await asyncio.to_thread(self.engine.compile, sampling.constraint)
        except ServingError as error:
            self._not_opened(live, error)
        else:
            self._command(lambda: self._engine_open(live, sampling, matcher))

    def _engine_open(self, live: _Live, sampling: SamplingParams | None, matcher: Matcher | None) -> None:
        if self._live.get(live.session.id) is not live:
            return
        opening = live.opening
        wire = opening.sampling
        try:
            self.engine.open(
                SpanSession(
                    id=opening.session,
                    max_tokens=opening.max_tokens,
                    prompt_tokens=opening.prompt_tokens,
                    blocks=live.blocks,
                    sampling=sampling,
                    seed=0 if wire is None else wire.seed,
                    sample_index=0 if wire is None else wire.sample_index,
                    arrived_unix_s=opening.arrived_unix_s,
                ),
                matcher=matcher,
            )
        except ServingError as error:
            self._not_opened(live, error)
            return
        self._outbox.post(live.session.gateway, Opened(opening.session, opening.epoch))

    def _not_opened(self, live: _Live, error: ServingError) -> None:
        if self._live.get(live.session.id) is live:
            del self._live[live.session.id]
            code = "no_capacity" if isinstance(error, NoCapacity) else "bad_request"
            self._refuse(live.session.gateway, live.opening, code, error.message)

    def _refuse(self, peer: PeerId, asked: OpenSession | Fence, code: RefusalCode, reason: str) -> None:
        self._outbox.post(peer, Refused(asked.session, asked.epoch, code, reason_text(reason)))

    def _end_session(self, live: _Live) -> None:
        """Free all that a session holds."""
        id = live.session.id
        del self._live[id]
        self._kept_bytes -= live.kept_bytes
        live.kept_bytes = 0
        self._remember_closed(live.session.gateway, id, live.session.epoch)
        self._command(lambda: self.engine.close(id))

    def _remember_closed(self, gateway: PeerId, id: SessionId, epoch: int) -> None:
        """What is still on its way of a closed session does not open it again."""
        self._closed[gateway, id] = max(epoch, self._closed.pop((gateway, id), 0))
        if len(self._closed) > _MAX_CLOSED:
            self._closed.popitem(last=False)

    async def _expire(self) -> None:
        """End sessions that nobody speaks of any more."""
        options = self._options
        while True:
            await asyncio.sleep(min(options.lease_s, options.grace_s) / 4)
            now_s = self._loop.time()
            for live in list(self._live.values()):
                orphaned = live.orphaned_s is not None and now_s - live.orphaned_s >= options.grace_s
                if orphaned or now_s - live.heard_s >= options.lease_s:
                    why = "its gateway is gone" if orphaned else "nobody spoke of it"
                    log.info("session=%s closed: %s", live.session.id, why)
                    self._end_session(live)

    # -- what sessions want done --------------------------------------------------------------------------

    def _carry_out(self, live: _Live, actions: Iterable[HopAction]) -> None:
        self._see_kept(live)
        for action in actions:
            match action:
                case Feed():
                    self._command(lambda feed=action: self._engine_feed(live, feed))
                case Forget(known):
                    live.stale_step = self._step
                    self._command(lambda known=known: self._engine_rewind(live, known))
                case Forward(peer, step, rows):
                    self._outbox.post(peer, step, encode_hidden(rows, live.opening.wire_format))
                case Tell(peer, message):
                    self._outbox.post(peer, message)
                case CutOff(peer, reason):
                    self._cut_off(peer, reason)

    def _cut_off(self, peer: PeerId, reason: str) -> None:
        log.warning("peer=%s cut off: %s", peer[:12], reason)
        self._spawn(self._network.drop(peer, reason))

    def _engine_rewind(self, live: _Live, known: int) -> None:
        if self._live.get(live.session.id) is live:
            with suppress(NotFound):  # the engine has ended it, and says so with the next step
                self.engine.rewind(live.session.id, known)

    def _engine_feed(self, live: _Live, feed: Feed) -> None:
        if self._live.get(live.session.id) is not live:
            return
        hidden = None if feed.rows is None else torch.from_numpy(feed.rows)  # pyright: ignore[reportUnknownMemberType]
        try:
            self.engine.feed(
                live.session.id,
                feed.start,
                feed.token_ids,
                hidden,
                sample_rows=feed.sample_rows,
                draft_tokens=feed.draft_tokens,
            )
        except NotFound:
            pass  # the engine has ended it, and says so with the next step
        except BadRequest as error:
            self._carry_out(live, live.session.accuse(live.session.before, error.message))

    # -- the engine ---------------------------------------------------------------------------------------

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _apply_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    async def _run(self) -> None:
        try:
            await self._serve()
        except Exception as error:
            log.exception("the worker stopped")
            self._stop(f"the worker stopped: {type(error).__name__}: {error}")

    async def _serve(self) -> None:
        """Apply what has arrived, run a step, hand out what came of it; until the engine is broken."""
        engine = self.engine
        while self.failure is None:
            self._apply_commands()
            if self._closing:
                return
            self._end_who_waits_in_vain()
            if not engine.has_work:
                self._wake.clear()
                if not self._commands:
                    await self._wake.wait()
                continue
            if 1 < len(self._live) <= SHARED_TOKENS:
                await self._gather()
                if not engine.has_work:
                    continue
            self._see_load()
            if self.lending is not None:
                self.lending.before_step()
            self._step += 1
            began_s = self._loop.time()
            self._computes = True
            try:
                outputs = await self._run_step(engine.step)
                self._failed_steps = 0
            except Exception as error:
                self._computes = False
                self._step_failed(error)
                continue
            self._computes = False
            if self.lending is not None:
                self.lending.after_step(self._loop.time() - began_s)
            self._note_step(self._loop.time() - began_s, sum(len(output.token_ids) for output in outputs))
            for output in outputs:
                self._hand_out(output)
            for id, failure in engine.take_failures():
                self._session_failed(id, _fault_code(failure), failure.message)

    async def _gather(self) -> None:
        """Wait for sessions that are about to be here, so that they share the step; see `scheduling/rounds.py`."""
        since_s = self._loop.time()
        while not self._closing:
            until_s = gather_until_s(
                [live.round for live in self._live.values()],
                now_s=self._loop.time(),
                since_s=since_s,
                step_s=self._small_step_s,
            )
            if until_s is None:
                return
            self._wake.clear()
            if not self._commands:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until_s):
                        await self._wake.wait()
            self._apply_commands()

    def _end_who_waits_in_vain(self) -> None:
        """End the session that has waited too long for memory which nobody lends."""
        if self.lending is not None and (waited := self.lending.waited_too_long()) is not None:
            id, why = waited
            self.engine.close(id)
            self._session_failed(id, "no_capacity", f"session {id!r}: {why}")

    def _hand_out(self, output: SpanOutput) -> None:
        live = self._live.get(output.id)
        if live is None:
            return
        self.block_tokens_total += len(output.token_ids) * len(live.blocks)
        if self._step <= live.stale_step:
            return
        actions = live.session.on_output(
            output.start,
            len(output.token_ids),
            None if output.hidden is None else output.hidden.numpy(),
            tuple(map(_sampled_row, output.sampled)),
            completes=output.completes,
        )
        live.round.leave(self._loop.time())
        self._carry_out(live, actions)
        if self._kept_bytes > self._options.kept_bytes:
            self._forget_oldest()

    def _see_kept(self, live: _Live) -> None:
        if live.session.id in self._live:
            held_bytes = live.session.kept.held_bytes
            self._kept_bytes += held_bytes - live.kept_bytes
            live.kept_bytes = held_bytes

    def _forget_oldest(self) -> None:
        """Give up outputs that were kept for replay, of the oldest sessions first."""
        for live in self._live.values():
            live.session.forget_sent()
            self._see_kept(live)
            if self._kept_bytes <= self._options.kept_bytes:
                return

    def _step_failed(self, error: Exception) -> None:
        log.exception("a step failed")
        self._failed_steps += 1
        reason = error.message if isinstance(error, ServingError) else f"{type(error).__name__}: {error}"
        for id in self.engine.abort_running():
            self._session_failed(id, "engine", f"a step failed: {reason}")
        if self._failed_steps >= MAX_FAILED_STEPS:
            self._stop(f"{self._failed_steps} steps in a row failed: {reason}")

    def _stop(self, reason: str) -> None:
        self.failure = EngineFailure(reason)
        self.broken.set()
        for id in list(self._live):
            self._session_failed(id, "engine", reason)

    def _session_failed(self, id: SessionId, code: FaultCode, reason: str) -> None:
        """The engine has ended a session: its gateway is told, and nothing of it stays."""
        live = self._live.get(id)
        if live is not None:
            self._carry_out(live, live.session.engine_failed(code, reason))
            self._end_session(live)

    def _note_step(self, step_s: float, tokens: int) -> None:
        self._step_s += (step_s - self._step_s) * (_STEP_SMOOTHING if self._step_s else 1.0)
        if tokens <= SHARED_TOKENS:
            smoothing = _STEP_SMOOTHING if self._small_step_s else 1.0
            self._small_step_s += (step_s - self._small_step_s) * smoothing

    def _see_load(self) -> None:
        """Remember the load for who asks while the engine computes."""
        now_s = self._loop.time()
        if now_s - self._load_at_s >= _LOAD_EVERY_S:
            self._load, self._load_at_s = self.engine.load(), now_s

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _fault_code(failure: ServingError) -> FaultCode:
    match failure:
        case NoCapacity():
            return "no_capacity"
        case BadRequest():
            return "bad_request"
        case _:
            return "engine"


def _sampled_row(token: SampledToken) -> SampledRow:
    if token.logprobs is None:
        return SampledRow(token.token_id, None)
    top = tuple((each.token_id, each.logprob) for each in token.logprobs.top)
    return SampledRow(token.token_id, TokenReport(token.logprobs.chosen.logprob, top))
