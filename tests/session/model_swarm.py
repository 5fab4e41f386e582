"""A swarm in one thread, for tests of the session's state machines: links with queues, hops with a model of an engine.

Hidden states are hashes of all that came before, block by block, so that any wrong, missing or stale input changes
every later token. Each step of the world (a delivery, an engine step, a loss) is drawn from a seeded generator.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from plait.errors import NoRoute, ServingError
from plait.ids import PeerId, SessionId
from plait.session import (
    Ban,
    Begun,
    Cancelled,
    ChainSession,
    CutOff,
    Emit,
    Ended,
    Fail,
    Feed,
    FindRoute,
    Forget,
    Forward,
    Heard,
    HopAction,
    HopFacts,
    HopSession,
    Lost,
    Routed,
    SampledRow,
    Send,
    SessionAction,
    SessionEvent,
    SessionTimes,
    SessionWish,
    Tell,
    TimePassed,
    Unroutable,
    ViewChanged,
)
from plait.wire import (
    ChainHop,
    CloseSession,
    Fault,
    Fence,
    Fenced,
    Opened,
    OpenSession,
    Refused,
    Resume,
    Step,
    Taken,
    Tokens,
    WireSampling,
)

VOCAB = 50
HIDDEN = 4
SESSION = SessionId("5" * 32)
GATEWAY = PeerId("f" * 64)
FACTS = HopFacts(hidden_values=HIDDEN, vocab_tokens=VOCAB, message_tokens=64)


def peer_named(number: int) -> PeerId:
    return PeerId(f"{number:064x}")


def mix(*values: int) -> int:
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ value) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 29
    return state


def as_row(value: int) -> np.ndarray:
    return np.array([value >> shift & 0xFFFF for shift in (0, 16, 32, 48)], np.float32)


def of_row(row: np.ndarray) -> int:
    return sum(int(part) << shift for part, shift in zip(row, (0, 16, 32, 48), strict=True))


class ModelSpan:
    """The keys and values of one session over some blocks: each depends on all positions before it."""

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self.states: list[dict[int, int]] = []

    def run(self, value: int) -> int:
        before = self.states[-1] if self.states else dict.fromkeys(self.blocks, 0)
        now: dict[int, int] = {}
        for block in self.blocks:
            now[block] = mix(block, before[block], value)
            value = mix(now[block])
        self.states.append(now)
        return value


def sample(value: int, token_ids: Sequence[int], seed: int) -> int:
    """The token after `token_ids`: mostly the one seven positions before, so that guessing is worth while."""
    drawn = mix(value, seed, len(token_ids))
    if drawn % 5 and len(token_ids) > 7:
        return token_ids[-7]
    return drawn // 5 % VOCAB


def expected_tokens(wish: SessionWish) -> list[int]:
    """What one machine would answer."""
    span, token_ids = ModelSpan(wish.blocks), list(wish.prompt_token_ids)
    values = [span.run(mix(token_id)) for token_id in token_ids]
    while len(token_ids) < wish.max_tokens:
        token_ids.append(sample(values[-1], token_ids, wish.sampling.seed))
        if token_ids[-1] in wish.sampling.stop_token_ids:
            break
        values.append(span.run(mix(token_ids[-1])))
    return token_ids[len(wish.prompt_token_ids) :]


def wish_for(
    blocks: int, prompt_tokens: int, answer_tokens: int, *, drafts: int = 0, stops: tuple[int, ...] = ()
) -> SessionWish:
    sampling = WireSampling(
        seed=7,
        sample_index=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
        min_tokens=0,
        stop_token_ids=stops,
        logprobs=None,
        constraint=None,
    )
    return SessionWish(
        id=SESSION,
        model="model",
        blocks=range(blocks),
        vocab_tokens=VOCAB,
        prompt_token_ids=tuple(mix(at) % VOCAB for at in range(prompt_tokens)),
        max_tokens=prompt_tokens + answer_tokens,
        sampling=sampling,
        draft_tokens=drafts,
    )


@dataclass
class ModelHop:
    """A worker with one span, its engine, and at most one session."""

    peer: PeerId
    blocks: range
    all_blocks: range
    alive: bool = True
    frozen: bool = False
    full: bool = False
    session: HopSession | None = None
    last_epoch: int = 0  # that it was opened or closed in
    opening: OpenSession | None = None
    kv: ModelSpan | None = None
    inputs: list[tuple[int, np.ndarray | None]] = field(default_factory=list)
    feeds: deque[Feed] = field(default_factory=deque)
    ran: Counter[int] = field(default_factory=Counter)  # how often each position was computed

    def feed(self, feed: Feed) -> None:
        assert feed.start <= len(self.inputs)
        self.forget(feed.start)
        rows = [None] * len(feed.token_ids) if feed.rows is None else list(feed.rows)
        self.inputs += list(zip(feed.token_ids, rows, strict=True))
        self.feeds.append(feed)

    def forget(self, known: int) -> None:
        assert self.kv is not None
        if known < len(self.inputs):
            self.feeds.clear()
        del self.inputs[known:]
        del self.kv.states[known:]

    def run(self, limit: int) -> list[HopAction]:
        """Run some of the first feed."""
        assert self.session is not None and self.kv is not None and self.opening is not None
        feed = self.feeds[0]
        end = feed.start + len(feed.token_ids)
        at = len(self.kv.states)
        to = min(end, at + limit)
        if feed.sample_rows and to > end - feed.sample_rows:
            to = end
        values: list[int] = []
        for position in range(at, to):
            token_id, row = self.inputs[position]
            values.append(self.kv.run(mix(token_id) if row is None else of_row(row)))
            self.ran[position] += 1
        if to == end:
            self.feeds.popleft()
        if self.kv.blocks.stop < self.all_blocks.stop:
            return self.session.on_output(at, to - at, np.stack([as_row(value) for value in values]), ())
        sampled: list[SampledRow] = []
        if to == end and feed.sample_rows:
            assert self.opening.sampling is not None
            known = [token_id for token_id, _ in self.inputs]
            for position in range(end - feed.sample_rows, end):
                token_id = sample(values[position - at], known[: position + 1], self.opening.sampling.seed)
                sampled.append(SampledRow(token_id, None))
                if position + 1 < end and known[position + 1] != token_id:
                    break
        return self.session.on_output(at, to - at, None, sampled)


class ModelSwarm:
    """A gateway with one session, hops, and links between all of them."""

    def __init__(
        self, wish: SessionWish, spans: Sequence[range], *, seed: int = 0, times: SessionTimes | None = None
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.session = ChainSession(wish, times or SessionTimes(), own=GATEWAY)
        self.hops = {
            peer_named(number): ModelHop(peer_named(number), span, wish.blocks)
            for number, span in enumerate(spans, start=1)
        }
        self.links: dict[tuple[PeerId, PeerId], deque[object]] = {}
        self.now_s = 0.0
        self.emitted: list[int] = []
        self.error: ServingError | None = None
        self.ended = False
        self.rounds = 0
        self.bans: list[Ban] = []
        self.most_tokens = 600
        """That an engine's step computes of a session."""
        self.duplicates = 0.0
        """Share of messages that come twice, the second time at any later moment."""
        self.old: list[tuple[PeerId, PeerId, object]] = []
        self.dispatch(Begun())

    # -- the gateway -------------------------------------------------------------------------------------

    def dispatch(self, event: SessionEvent) -> None:
        pending = deque(self.session.on_event(event, self.now_s))
        self.session.check()
        while pending:
            pending += self.perform(pending.popleft())
            self.session.check()

    def perform(self, action: SessionAction) -> list[SessionAction]:
        match action:
            case FindRoute():
                return self.session.on_event(self.route(action), self.now_s)
            case Send(peer, message):
                if not self.hops[peer].alive:
                    return self.session.on_event(Lost(peer, "it is dead"), self.now_s)
                self.post(GATEWAY, peer, (message, None) if isinstance(message, Step) else message)
            case Emit(token_ids):
                self.emitted += token_ids
                self.rounds += 1
            case Ban():
                self.bans.append(action)
            case Fail(error):
                assert not self.ended
                self.error, self.ended = error, True
            case Ended():
                assert not self.ended
                self.ended = True
        return []

    def route(self, wanted: FindRoute) -> Routed | Unroutable:
        """Any chain of hops that are alive; each is left at its own end or where the range ends."""
        hops: list[ChainHop] = []
        block = wanted.blocks.start
        while block < wanted.blocks.stop:
            holders = [
                hop
                for hop in self.hops.values()
                if hop.alive
                and block in hop.blocks
                and hop.peer not in wanted.avoiding
                and hop.peer not in {used.peer for used in hops}
            ]
            if not holders:
                return Unroutable(wanted.blocks, NoRoute(f"nobody has {block}", missing_blocks=(block,)))
            chosen = holders[int(self.rng.integers(len(holders)))]
            end = min(chosen.blocks.stop, wanted.blocks.stop)
            hops.append(ChainHop(chosen.peer, block, end))
            block = end
        return Routed(wanted.blocks, tuple(hops))

    # -- the hops ----------------------------------------------------------------------------------------

    def arrive(self, sender: PeerId, hop: ModelHop, message: object) -> list[HopAction]:
        session = hop.session
        match message:
            case (Step() as step, rows):
                if session is None or step.epoch != session.epoch:
                    return []
                return session.on_step(sender, step, rows)
            case Tokens():
                return session.on_tokens(sender, message) if session else []
            case Taken():
                return session.on_taken(sender, message) if session else []
            case OpenSession():
                if hop.full:
                    self.post(hop.peer, sender, Refused(SESSION, message.epoch, "no_capacity", "full"))
                    return []
                if message.epoch <= hop.last_epoch:
                    return []
                hop.last_epoch = message.epoch
                self.open(hop, message)
                self.post(hop.peer, sender, Opened(SESSION, message.epoch))
                return []
            case Fence():
                if session is None:
                    self.post(hop.peer, sender, Refused(SESSION, message.epoch, "unknown_session", "gone"))
                    return []
                return session.on_fence(message)
            case Resume():
                return session.on_resume(message) if session else []
            case CloseSession():
                hop.last_epoch = max(hop.last_epoch, message.epoch)
                if session is not None and message.epoch >= session.epoch:
                    self.close(hop)
                return []
        raise AssertionError(message)

    def open(self, hop: ModelHop, opening: OpenSession) -> None:
        self.close(hop)
        hop.session = HopSession(opening, own=hop.peer, gateway=GATEWAY, facts=FACTS)
        hop.opening = opening
        hop.kv = ModelSpan(opening.hops[opening.index].blocks)

    def close(self, hop: ModelHop) -> None:
        hop.session = hop.kv = hop.opening = None
        hop.inputs.clear()
        hop.feeds.clear()

    def carry_out(self, hop: ModelHop, actions: list[HopAction]) -> None:
        for action in actions:
            match action:
                case Feed():
                    hop.feed(action)
                case Forget(known):
                    hop.forget(known)
                case Forward(peer, step, rows):
                    self.post(hop.peer, peer, (step, rows.copy()))
                case Tell(peer, message):
                    self.post(hop.peer, peer, message)
                case CutOff(peer, reason):
                    raise AssertionError(f"{hop.peer} cuts off {peer}: {reason}")

    def post(self, sender: PeerId, receiver: PeerId, message: object) -> None:
        if receiver != GATEWAY and not self.hops[receiver].alive:
            hop = self.hops[sender]
            if hop.session is not None:
                self.carry_out(hop, hop.session.on_lost(receiver))
            return
        self.links.setdefault((sender, receiver), deque()).append(message)

    # -- the world ---------------------------------------------------------------------------------------

    def kill(self, peer: PeerId) -> None:
        hop = self.hops[peer]
        hop.alive = False
        self.close(hop)
        for link in [link for link in self.links if peer in link]:
            del self.links[link]
        for other in self.hops.values():
            if other.session is not None:
                self.carry_out(other, other.session.on_lost(peer))
        self.dispatch(Lost(peer, "killed"))

    def revive(self, peer: PeerId) -> None:
        self.hops[peer].alive = True
        self.dispatch(ViewChanged())

    def lose_message(self, link: tuple[PeerId, PeerId]) -> None:
        """Lose the next message, unless it closes a session: for that one there are leases."""
        if not isinstance(self.links[link][0], CloseSession):
            self.links[link].popleft()

    def deliver(self, link: tuple[PeerId, PeerId]) -> None:
        sender, receiver = link
        message = self.links[link].popleft()
        if self.duplicates and self.rng.random() < self.duplicates:
            self.old.append((sender, receiver, message))
        self.hand_over(sender, receiver, message)

    def hand_over(self, sender: PeerId, receiver: PeerId, message: object) -> None:
        if receiver == GATEWAY:
            assert isinstance(message, Opened | Refused | Fenced | Tokens | Fault)
            self.dispatch(Heard(sender, message))
        elif self.hops[receiver].alive:
            self.carry_out(self.hops[receiver], self.arrive(sender, self.hops[receiver], message))

    def step(self) -> bool:
        """One thing that can happen happens; False if only time can pass."""
        links = [
            link
            for link, queue in self.links.items()
            if queue and not (link[1] != GATEWAY and self.hops[link[1]].frozen)
        ]
        engines = [hop for hop in self.hops.values() if hop.alive and hop.feeds and not hop.frozen]
        choices = len(links) + len(engines)
        if self.old and self.rng.random() < 0.1:
            self.hand_over(*self.old.pop(int(self.rng.integers(len(self.old)))))
            return True
        if not choices:
            return False
        choice = int(self.rng.integers(choices))
        if choice < len(links):
            self.deliver(links[choice])
        else:
            hop = engines[choice - len(links)]
            self.carry_out(hop, hop.run(int(self.rng.integers(1, self.most_tokens + 1))))
        return True

    def pass_time(self) -> None:
        self.now_s = max(self.now_s, self.session.deadline_s)
        self.dispatch(TimePassed())

    def run(self, until_tokens: int | None = None) -> None:
        """Let things happen until the session has ended, or has emitted so many tokens."""
        for _ in range(200_000):
            if self.ended or (until_tokens is not None and len(self.emitted) >= until_tokens):
                return
            if not self.step():
                self.pass_time()
        raise AssertionError("the session does not end")

    def drain(self) -> None:
        """Let all messages arrive."""
        while self.step():
            pass

    def cancel(self) -> None:
        self.dispatch(Cancelled())

    @property
    def block_tokens(self) -> int:
        """Positions computed, each as often as it was, times blocks."""
        return sum(self.work(hop) for hop in self.hops)

    def work(self, peer: PeerId) -> int:
        return sum(self.hops[peer].ran.values())
