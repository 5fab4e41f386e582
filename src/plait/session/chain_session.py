"""One session as its gateway drives it: events in, actions out, nothing performed.

Theory. The chain is a row of slots, one for each hop, that together cover the model's blocks; blocks without a slot
are a gap. Whatever goes wrong, whoever is lost (a hop, two neighbours, the first, the last, all of them), the same
four steps follow, and opening a session is the case in which everything is a gap:

    1. Drop the slots that are lost and begin a new epoch: what the old one still sends is ignored. Survivors are
       fenced: they stop and say what they know.
    2. Ask for a route through each gap. Without one, wait until the view changes, or the deadline.
    3. Open the session on the new hops. When all have answered, plan where everyone goes on (resume_plan.py), resume.
    4. Send the first hop the tokens that it does not know.

A loss on the way begins again at 1. Sampling depends on (seed, position) and what came before, so the tokens are those
that would have come anyway.

    gathering ──all hops have answered──▶ flowing ──last token, cancelled──▶ ended
        ▲                                    │
        └──a hop is lost, silent, wrong──────┘          gathering ──deadline──▶ ended with an error

Every wait has a deadline: `deadline_s` says when the next one passes, and `TimePassed` must come then. A chain that
gives no token in time is fenced and resumed as it is; a hop that is behind the one before it and has computed nothing
between two such rounds is replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, assert_never

from plait.cluster import format_blocks
from plait.errors import BadRequest, EngineFailure, NoCapacity, NoRoute, ServingError
from plait.ids import PeerId, SessionId
from plait.session.chain_events import (
    Ban,
    Begun,
    Cancelled,
    Emit,
    Ended,
    Fail,
    FindRoute,
    Heard,
    Leaving,
    Lost,
    Routed,
    Send,
    SessionAction,
    SessionEvent,
    TimePassed,
    Unroutable,
    ViewChanged,
)
from plait.session.resume_plan import plan_resume
from plait.session.session_wish import SessionTimes, SessionWish
from plait.wire import (
    MAX_STEP_TOKENS,
    ChainHop,
    CloseSession,
    Fault,
    Fence,
    Fenced,
    FinishCode,
    Opened,
    OpenSession,
    Refused,
    Resume,
    Step,
    Tokens,
)

MAX_AVOID_S = 30.0
MAX_FRUITLESS_RECOVERIES = 24


@dataclass(slots=True)
class _Slot:
    """A hop of the chain; `known` and `kept_from` once it has answered in this epoch."""

    hop: ChainHop
    is_new: bool
    answered: bool = False
    known: int = 0
    kept_from: int = 0


@dataclass(frozen=True, slots=True)
class _Refusal:
    code: str
    message: str


class ChainSession:
    """The state of one session at its gateway."""

    def __init__(self, wish: SessionWish, times: SessionTimes, *, own: PeerId) -> None:
        assert wish.prompt_token_ids and len(wish.prompt_token_ids) < wish.max_tokens
        self.wish = wish
        self.epoch = 1
        self.phase: Literal["gathering", "flowing", "ended"] = "gathering"
        self.token_ids = list(wish.prompt_token_ids)
        self.recoveries = 0
        """How often the chain was changed or resumed after it had begun to flow."""
        self.replayed_tokens = 0
        """Positions that hops were to compute again for that, over all hops."""
        self._times = times
        self._own = own
        self._slots: list[_Slot] = []
        self._asked: set[range] = set()  # routes that are being looked for
        self._no_route: dict[range, NoRoute] = {}
        self._opened = False  # this epoch's new hops were sent `OpenSession`
        self._avoided_until_s: dict[PeerId, float] = {}
        self._failures: dict[PeerId, int] = {}
        self._refusals: dict[PeerId, _Refusal] = {}
        self._last_loss = ""
        self._answer_by_s = 0.0
        self._retry_at_s = 0.0
        self._give_up_s = 0.0
        self._token_by_s = 0.0
        self._step_number = 0
        self._tokens_number = 0
        self._fruitless = 0
        self._stalled_at: tuple[PeerId, int] | None = None  # who was behind at the latest stall, and where
        self._stalled = False

    # -- what it is --------------------------------------------------------------------------------------

    @property
    def id(self) -> SessionId:
        return self.wish.id

    @property
    def hops(self) -> tuple[ChainHop, ...]:
        """The chain, without its gaps."""
        return tuple(slot.hop for slot in self._slots)

    @property
    def started(self) -> bool:
        """Whether it has given a token."""
        return len(self.token_ids) > len(self.wish.prompt_token_ids)

    @property
    def deadline_s(self) -> float:
        """When `TimePassed` is due, on the clock of `now_s`."""
        if self.phase == "flowing":
            return self._token_by_s
        if self._gaps():
            return min(self._give_up_s, self._retry_at_s) if self._no_route else self._give_up_s
        return min(self._give_up_s, self._answer_by_s)

    def on_event(self, event: SessionEvent, now_s: float) -> list[SessionAction]:
        """Decide what to do next. Lost work is replayed: PETALS (2023), algorithm 1, from the hops' own outputs."""
        if self.phase == "ended":
            return []
        match event:
            case Begun():
                self._give_up_s = now_s + self._times.opening_s
                return self._find_routes(now_s)
            case Heard(peer, message):
                return self._on_message(peer, message, now_s)
            case Lost(peer, reason):
                if self._slot_of(peer) is None:
                    return []
                return [Ban(peer, reason, False), *self._lose([peer], reason, now_s)]
            case Leaving(peer):
                if self._slot_of(peer) is None:
                    return []
                return self._lose([peer], f"{_short(peer)} is leaving", now_s)
            case Routed(blocks, hops):
                return self._on_route(blocks, hops, now_s)
            case Unroutable(blocks, error):
                return self._on_no_route(blocks, error, now_s)
            case ViewChanged(back):
                for peer in back:
                    self._avoided_until_s.pop(peer, None)
                    self._failures.pop(peer, None)
                return self._find_again(now_s)
            case TimePassed():
                return self._on_time(now_s) if now_s >= self.deadline_s else []
            case Cancelled():
                return self._end()
            case _:
                assert_never(event)

    def check(self) -> None:
        """Assert that the chain is one."""
        spans = [slot.hop.blocks for slot in self._slots]
        assert all(one.stop <= following.start for one, following in pairwise(spans))
        peers = [slot.hop.peer for slot in self._slots]
        assert len(set(peers)) == len(peers)
        assert len(self.token_ids) <= self.wish.max_tokens
        if self.phase == "flowing":
            assert not self._gaps() and all(slot.answered for slot in self._slots)

    # -- messages ----------------------------------------------------------------------------------------

    def _on_message(
        self, peer: PeerId, message: Opened | Refused | Fenced | Tokens | Fault, now_s: float
    ) -> list[SessionAction]:
        slot = self._slot_of(peer)
        if slot is None or message.epoch != self.epoch:
            return []
        match message:
            case Opened():
                if self.phase != "gathering" or not self._opened or not slot.is_new:
                    return []
                slot.answered = True
                return self._when_gathered(now_s)
            case Fenced(known=known, kept_from=kept_from):
                if self.phase != "gathering" or slot.is_new:
                    return []
                if known > len(self.token_ids) or kept_from > known:
                    return self._misbehaved(peer, f"knows {known} of {len(self.token_ids)} tokens", now_s)
                slot.answered, slot.known, slot.kept_from = True, known, kept_from
                return self._when_gathered(now_s)
            case Refused(code=code, message=reason):
                if self.phase != "gathering":
                    return []
                if code in ("no_capacity", "bad_request"):
                    self._refusals[peer] = _Refusal(code, reason)
                ban: list[SessionAction] = [Ban(peer, reason, False)] if code == "not_served" else []
                return ban + self._lose([peer], f"{_short(peer)} refused: {reason}", now_s)
            case Tokens():
                return self._on_tokens(peer, message, now_s)
            case Fault():
                return self._on_fault(peer, message, now_s)
            case _:
                assert_never(message)

    def _on_tokens(self, peer: PeerId, tokens: Tokens, now_s: float) -> list[SessionAction]:
        if self.phase != "flowing" or tokens.number <= self._tokens_number:
            return []
        if peer != self._slots[-1].hop.peer:
            return self._misbehaved(peer, "sent tokens, and is not the last hop", now_s)
        if tokens.number != self._tokens_number + 1:
            return self._lose([], f"tokens {self._tokens_number + 1} did not come", now_s)
        wrong = self._wrong_tokens(tokens)
        if wrong:
            return self._misbehaved(peer, wrong, now_s)
        self._tokens_number = tokens.number
        self.token_ids += tokens.token_ids
        self._token_by_s = now_s + self._times.token_s
        self._fruitless, self._stalled_at = 0, None
        emit = Emit(tokens.token_ids, tokens.reports, tokens.finished)
        return [emit, *self._end()] if tokens.finished else [emit]

    def _wrong_tokens(self, tokens: Tokens) -> str:
        """Why these cannot be the next tokens of the answer; "" if they can."""
        sampling, ids = self.wish.sampling, tokens.token_ids
        room_tokens = self.wish.max_tokens - len(self.token_ids)
        if tokens.position != len(self.token_ids) or len(ids) > min(room_tokens, self.wish.draft_tokens + 1):
            return (
                f"sent {len(ids)} tokens for position {tokens.position} of an answer at {len(self.token_ids)}"
            )
        if max(ids) >= self.wish.vocab_tokens:
            return f"sent token {max(ids)} of a vocabulary of {self.wish.vocab_tokens}"
        if (tokens.reports is None) != (sampling.logprobs is None) or (
            tokens.reports is not None and len(tokens.reports) != len(ids)
        ):
            return "sent log-probabilities that were not asked for, or not those that were"
        finished: FinishCode = "length" if len(ids) == room_tokens else ""
        if ids[-1] in sampling.stop_token_ids:
            finished = "stop"
        if sampling.constraint is not None and tokens.finished == "stop":
            finished = "stop"  # the constraint may allow nothing more
        if any(token_id in sampling.stop_token_ids for token_id in ids[:-1]) or tokens.finished != finished:
            return f"says that the answer {'ends' if tokens.finished else 'goes on'} after {ids}"
        return ""

    def _on_fault(self, peer: PeerId, fault: Fault, now_s: float) -> list[SessionAction]:
        reason = f"{_short(peer)} reports: {fault.reason}"
        match fault.code:
            case "engine":
                return [Ban(peer, reason, False), *self._lose([peer], reason, now_s)]
            case "no_capacity":
                self._refusals[peer] = _Refusal("no_capacity", fault.reason)
                return self._lose([peer], reason, now_s)
            case "bad_request":
                return self._fail(BadRequest(fault.reason))
            case "gap":
                return self._lose([], reason, now_s)
            case "unreachable" | "misbehaved":
                if fault.peer == self._own:
                    return self._fail(
                        EngineFailure(f"a hop does not accept what this gateway sends: {reason}")
                    )
                if self._slot_of(fault.peer) is None:
                    return self._lose([], reason, now_s)
                ban = Ban(fault.peer, reason, fault.code == "misbehaved")
                return [ban, *self._lose([fault.peer], reason, now_s)]
            case _:
                assert_never(fault.code)

    def _misbehaved(self, peer: PeerId, what: str, now_s: float) -> list[SessionAction]:
        reason = f"{_short(peer)} {what}"
        return [Ban(peer, reason, True), *self._lose([peer], reason, now_s)]

    # -- the chain changes -------------------------------------------------------------------------------

    def _lose(self, peers: Sequence[PeerId], reason: str, now_s: float) -> list[SessionAction]:
        """Begin a new epoch without these peers; with none, to resume the chain as it is."""
        self._last_loss = reason
        if self.phase == "flowing":
            self.recoveries += 1
            self._fruitless += 1
            self._give_up_s = now_s + self._times.recovery_s
        if self._fruitless > MAX_FRUITLESS_RECOVERIES:
            return self._fail(
                EngineFailure(f"{self._fruitless} chains in a row gave no token; the last trouble: {reason}")
            )
        actions: list[SessionAction] = []
        for peer in peers:
            failures = self._failures[peer] = self._failures.get(peer, 0) + 1
            avoid_s = min(self._times.avoid_s * 2.0 ** min(failures - 1, 10), MAX_AVOID_S)
            self._avoided_until_s[peer] = now_s + avoid_s
            actions.append(Send(peer, CloseSession(self.id, self.epoch)))
        return actions + self._new_epoch([slot for slot in self._slots if slot.hop.peer not in peers], now_s)

    def _new_epoch(self, slots: list[_Slot], now_s: float) -> list[SessionAction]:
        """Go on with these hops: fence those that have the session, look for the others."""
        self.epoch += 1
        self.phase = "gathering"
        self._slots = slots
        self._opened = self._stalled = False
        self._asked.clear()
        self._no_route.clear()
        self._step_number = self._tokens_number = 0
        self._answer_by_s = now_s + self._times.answer_s
        fences: list[SessionAction] = []
        for slot in slots:
            slot.answered, slot.known, slot.kept_from = False, 0, 0
            if not slot.is_new:
                fence = Fence(self.id, self.epoch, len(self.token_ids), self.token_ids[-1])
                fences.append(Send(slot.hop.peer, fence))
        return fences + self._find_routes(now_s)

    def _gaps(self) -> list[range]:
        """Ranges of blocks that no slot covers."""
        gaps: list[range] = []
        block = self.wish.blocks.start
        for slot in self._slots:
            if block < slot.hop.first_block:
                gaps.append(range(block, slot.hop.first_block))
            block = slot.hop.end_block
        if block < self.wish.blocks.stop:
            gaps.append(range(block, self.wish.blocks.stop))
        return gaps

    def _find_routes(self, now_s: float) -> list[SessionAction]:
        """Ask for a way through each gap; once there is none, open the new hops."""
        gaps = self._gaps()
        if not gaps:
            return self._open_new(now_s)
        return [self._find(gap, now_s) for gap in gaps if gap not in self._asked]

    def _find(self, blocks: range, now_s: float) -> FindRoute:
        self._asked.add(blocks)
        avoiding = {peer for peer, until_s in self._avoided_until_s.items() if until_s > now_s}
        after = before = None
        if blocks != self.wish.blocks:
            # A peer can have one place in a chain; who has none left is asked for all blocks (`_on_no_route`).
            avoiding |= {slot.hop.peer for slot in self._slots}
            after = next((s.hop.peer for s in self._slots if s.hop.end_block == blocks.start), None)
            before = next((s.hop.peer for s in self._slots if s.hop.first_block == blocks.stop), None)
        return FindRoute(blocks, frozenset(avoiding), after, before)

    def _find_again(self, now_s: float) -> list[SessionAction]:
        if self.phase != "gathering" or not self._no_route:
            return []
        for blocks in self._no_route:
            self._asked.discard(blocks)
        self._no_route.clear()
        return self._find_routes(now_s)

    def _on_route(self, blocks: range, hops: tuple[ChainHop, ...], now_s: float) -> list[SessionAction]:
        if self.phase != "gathering" or blocks not in self._asked:
            return []
        assert hops and hops[0].first_block == blocks.start and hops[-1].end_block == blocks.stop
        self._asked.discard(blocks)
        if blocks == self.wish.blocks and self._slots:
            return self._replace_chain(hops, now_s)
        taken = {slot.hop.peer for slot in self._slots}
        if blocks not in self._gaps() or taken & {hop.peer for hop in hops}:
            return self._find_routes(now_s)  # two gaps were given the same peer
        self._slots += [_Slot(hop, is_new=True) for hop in hops]
        self._slots.sort(key=lambda slot: slot.hop.first_block)
        return self._find_routes(now_s)

    def _replace_chain(self, hops: tuple[ChainHop, ...], now_s: float) -> list[SessionAction]:
        """Take another chain as a whole, in which survivors may have another span; those of the same span stay."""
        by_hop = {slot.hop: slot for slot in self._slots}
        leaving = [slot.hop.peer for slot in self._slots if slot.hop not in hops]
        closing: list[SessionAction] = [Send(peer, CloseSession(self.id, self.epoch)) for peer in leaving]
        return closing + self._new_epoch([by_hop.get(hop) or _Slot(hop, is_new=True) for hop in hops], now_s)

    def _on_no_route(self, blocks: range, error: NoRoute, now_s: float) -> list[SessionAction]:
        if self.phase != "gathering" or blocks not in self._asked:
            return []
        self._no_route[blocks] = error
        self._retry_at_s = now_s + self._times.retry_s
        if self._slots and blocks != self.wish.blocks and self.wish.blocks not in self._asked:
            # Perhaps a survivor could serve the gap as well: then another chain as a whole will do.
            return [self._find(self.wish.blocks, now_s)]
        if not self.started and self._refusals:
            return self._fail(self._refused())
        return []

    def _open_new(self, now_s: float) -> list[SessionAction]:
        self._opened = True
        self._answer_by_s = now_s + self._times.answer_s
        wish, hops = self.wish, self.hops
        actions: list[SessionAction] = []
        for index, slot in enumerate(self._slots):
            if not slot.is_new:
                continue
            opening = OpenSession(
                session=wish.id,
                epoch=self.epoch,
                index=index,
                hops=hops,
                model=wish.model,
                prompt_tokens=len(wish.prompt_token_ids),
                max_tokens=wish.max_tokens,
                wire_format=wish.wire_format,
                sampling=wish.sampling if index == len(hops) - 1 else None,
                draft_tokens=wish.draft_tokens,
                arrived_unix_s=wish.arrived_unix_s,
                held=self.epoch > 1,
            )
            actions.append(Send(slot.hop.peer, opening))
        return actions + self._when_gathered(now_s)

    def _when_gathered(self, now_s: float) -> list[SessionAction]:
        """Resume once every hop has answered."""
        if not self._opened or not all(slot.answered for slot in self._slots):
            return []
        if self._stalled and (blamed := self._who_stalls()) is not None:
            reason = f"{_short(blamed)} computed nothing for {self._times.token_s:g} s"
            return [Ban(blamed, reason, False), *self._lose([blamed], reason, now_s)]
        tokens = len(self.token_ids)
        known = plan_resume(
            [slot.known for slot in self._slots], [slot.kept_from for slot in self._slots], tokens
        )
        if self.recoveries:
            self.replayed_tokens += sum(max(0, tokens - 1 - each) for each in known)
        self.phase = "flowing"
        self._token_by_s = now_s + self._times.token_s
        actions: list[SessionAction] = []
        if self.epoch > 1:
            for index, slot in enumerate(self._slots):
                following = known[index + 1] if index + 1 < len(known) else tokens
                resume = Resume(self.id, self.epoch, index, self.hops, tokens, known[index], following)
                actions.append(Send(slot.hop.peer, resume))
        for slot in self._slots:
            slot.is_new = False
        return actions + self._steps(known[0])

    def _steps(self, start: int) -> list[SessionAction]:
        """The first hop's inputs from `start` on; the last of them is to be sampled."""
        actions: list[SessionAction] = []
        while start < len(self.token_ids):
            part = tuple(self.token_ids[start : start + MAX_STEP_TOKENS])
            samples = start + len(part) == len(self.token_ids)
            self._step_number += 1
            step = Step(self.id, self.epoch, self._step_number, start, part, int(samples), 0)
            actions.append(Send(self._slots[0].hop.peer, step))
            start += len(part)
        return actions

    # -- deadlines and ends ------------------------------------------------------------------------------

    def _on_time(self, now_s: float) -> list[SessionAction]:
        if self.phase == "flowing":
            reason = f"no token came for {self._times.token_s:g} s"
            actions = self._lose([], reason, now_s)
            self._stalled = True
            return actions
        if now_s >= self._give_up_s:
            return self._fail(self._why_given_up())
        if self._gaps():
            return self._find_again(now_s)
        silent = [slot.hop.peer for slot in self._slots if not slot.answered]
        reason = f"{', '.join(map(_short, silent))} did not answer within {self._times.answer_s:g} s"
        return [*(Ban(peer, reason, False) for peer in silent), *self._lose(silent, reason, now_s)]

    def _who_stalls(self) -> PeerId | None:
        """After a stall: the first hop behind the one before it, if it was there at the latest stall too."""
        reached = len(self.token_ids)
        for slot in self._slots:
            if slot.known < reached:
                place = slot.hop.peer, slot.known
                if place == self._stalled_at:
                    return slot.hop.peer
                self._stalled_at = place
                self._fruitless = 0
                return None
            reached = slot.known
        return None

    def _refused(self) -> ServingError:
        """No capacity, unless every hop said that it can never run."""
        reasons = self._refusals.values()
        text = "; ".join(dict.fromkeys(refusal.message for refusal in reasons))
        if all(refusal.code == "bad_request" for refusal in reasons):
            return BadRequest(text)
        return NoCapacity(f"no chain of workers has room for this request now: {text}")

    def _why_given_up(self) -> ServingError:
        trouble = f"; before that: {self._last_loss}" if self._last_loss else ""
        if self._no_route:
            missing = sorted({block for error in self._no_route.values() for block in error.missing_blocks})
            return NoRoute(
                f"no worker that could be reached serves blocks {format_blocks(missing)} of {self.wish.model!r}"
                f"{trouble}; start a worker for them, or retry once one has joined",
                missing_blocks=tuple(missing),
            )
        gaps = self._gaps()
        if gaps:
            blocks = tuple(block for gap in gaps for block in gap)
            return NoRoute(
                f"no route through blocks {format_blocks(blocks)} was found in time{trouble}; retry",
                missing_blocks=blocks,
            )
        return EngineFailure(f"the hops of the chain did not answer in time{trouble}; retry")

    def _end(self) -> list[SessionAction]:
        return [*self._close_all(), Ended()]

    def _fail(self, error: ServingError) -> list[SessionAction]:
        return [*self._close_all(), Fail(error)]

    def _close_all(self) -> list[SessionAction]:
        self.phase = "ended"
        return [Send(slot.hop.peer, CloseSession(self.id, self.epoch)) for slot in self._slots]

    def _slot_of(self, peer: PeerId) -> _Slot | None:
        return next((slot for slot in self._slots if slot.hop.peer == peer), None)


def _short(peer: PeerId) -> str:
    return peer[:12]
