"""One trial: a swarm lives through a fault schedule, and everything that should never happen is written down.

What is checked, at every event that could break it:

- the tokens of an answer, so far, begin the answer of a single engine; a finished one is that answer;
- a position is computed once in an epoch, and nobody touches an engine while it computes;
- KV blocks and kept inputs are held by those who should hold them (`SpanEngine.check`), chains are chains
  (`SwarmEngine.check`);
- only who lied is cut off; nothing is logged as an error but what was caused on purpose;
- messages that are said twice change nothing: no session begins another epoch;
- where an unharmed chain is there all the time, what is lost is noticed by heartbeats and not by deadlines.

And at the end: every request has its tokens, or an error that says why (an error only where the schedule allows for
it); no worker has a session, a KV block or a task left; nothing waits for ever (`Deadlock`, `Livelock`, and requests or
sessions that outlive their deadlines).
"""

import asyncio
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from plait.errors import NoRoute, ServingError
from plait.ids import PeerId, RequestId, SessionId
from plait.session import GenerationRequest, SessionTimes
from plait.simulator.fault_schedule import (
    DISHONEST,
    HARMLESS,
    LETHAL,
    PROMPT,
    SLOWEST_LINK_S,
    Fault,
    FaultKind,
    FaultSchedule,
    MachinePlan,
    RequestPlan,
)
from plait.simulator.faulty_network import Mischief
from plait.simulator.hash_model import MODEL_BLOCKS, true_answer
from plait.simulator.machine import GRACE_S, LEASE_S, GatewayMachine, Machine, Observer, WorkerMachine
from plait.simulator.virtual_loop import VirtualLoop, place_of, run_virtual
from plait.transport import MemoryNet, NetworkLimits, TicketPeer, Wire
from plait.wire import Fence, Message, OpenSession, Resume, Step, Tokens
from plait.worker import SwarmOptions

TIMES = SessionTimes(opening_s=30.0, answer_s=5.0, token_s=8.0, recovery_s=40.0)
STARTED_BY_S = 30.0
"""When all machines of the beginning must be there."""
ENDED_BY_S = 400.0
"""After the last fault: no session may go on without a token for so long (24 rounds of `TIMES.token_s`, and more)."""
FREED_BY_S = LEASE_S + GRACE_S + 30.0
FREED_SOON_S = 3.0
LEFT_BY_S = 30.0
NOTICED_BY_S = NetworkLimits().dead_after_s + 1.0
"""A machine that vanishes, by heartbeats; the rest is the way there and back, and the step that runs meanwhile."""
_RECENT_S = 10.0
_JOINED_S = 2.0
"""Until all have heard of a machine that joins: a hop that has not is told of a peer that it cannot reach."""
_GATEWAY = "gateway"

Ending = Literal["answered", "failed", "cancelled", "lost with its gateway", "never ended"]


@dataclass(slots=True, kw_only=True)
class RequestReport:
    """How a request ended: its error, if it failed, as class name and message."""

    ending: Ending = "never ended"
    error: str = ""
    tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Recovery:
    """A session that went on in a later epoch, and the faults that struck in the seconds before.

    `noticed_s`: from the latest of these faults until the gateway began the new epoch; `gathered_s`: from there until
    it told the hops to go on; `stalled_s`: from the token before to the token after.
    """

    after: tuple[FaultKind, ...]
    noticed_s: float
    gathered_s: float
    stalled_s: float


@dataclass(slots=True, kw_only=True)
class TrialReport:
    """What became of a schedule; it is right if there are no `violations`.

    `digest` is that of all that happened: the same for the same seed. `struck` are the faults that found a victim.
    `computed_block_tokens` is the work of all engines, `needed_block_tokens` what the tokens that clients got needed:
    the rest are replays, wrong guesses and tokens that nobody heard of.
    """

    seed: int
    digest: str = ""
    events: int = 0
    virtual_s: float = 0.0
    struck: Counter[FaultKind] = field(default_factory=Counter[FaultKind])
    requests: list[RequestReport] = field(default_factory=list[RequestReport])
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    computed_block_tokens: int = 0
    needed_block_tokens: int = 0
    violations: list[str] = field(default_factory=list[str])


def run_trial(schedule: FaultSchedule, *, trace: Callable[[str], None] | None = None) -> TrialReport:
    """Run a schedule on a clock of its own; `trace` gets every event as a line."""
    trial = Trial(schedule, trace=trace)
    logger, handler = logging.getLogger("plait"), _Listener(trial)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        run_virtual(trial.run())
    except Exception as error:
        trial.violate(f"{type(error).__name__}: {error}")
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
    return trial.finished()


class Trial:
    """The state of one run; `run` is for a `VirtualLoop`."""

    def __init__(self, schedule: FaultSchedule, *, trace: Callable[[str], None] | None = None) -> None:
        self.schedule = schedule
        self.report = TrialReport(seed=schedule.seed)
        self._trace = trace
        self._digest = hashlib.sha256()
        self._machines: dict[str, WorkerMachine] = {}
        self._all: list[Machine] = []
        self._names: dict[PeerId, str] = {}
        self._liars: set[str] = set()
        self._struck: list[tuple[float, FaultKind]] = []
        self._harmed: set[str] = set()
        self._joined_s = 0.0
        self._undo: dict[int, Callable[[], None]] = {}
        self._broken = False
        self._over = False
        self._given_tokens = 0
        self._to_come = list(enumerate(self.schedule.faults))
        self._last_fault_s = 0.0
        self._origin_s = 0.0
        self._flows: dict[SessionId, _Flow] = {}

    def violate(self, text: str) -> None:
        """Something happened that never should."""
        self.note(f"VIOLATION {text}")
        if len(self.report.violations) < 20:
            self.report.violations.append(text)

    def note(self, text: str) -> None:
        line = f"{self._now_s():.6f} {text}"
        self._digest.update(line.encode())
        if self._trace is not None:
            self._trace(line)

    def finished(self) -> TrialReport:
        """The report, once it has run."""
        self.report.digest = self._digest.hexdigest()
        return self.report

    def expects_error(self, message: str) -> bool:
        """Whether this was caused on purpose."""
        return self._broken and message == "a step failed"

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        loop.set_exception_handler(self._unhandled)
        self._net = MemoryNet(self.schedule.wire, seed=self.schedule.seed)
        await self._start()
        self._origin_s = self._last_fault_s = loop.time()
        self._let_strike()
        for plan in self.schedule.machines:
            if plan.joins_s:
                loop.call_later(plan.joins_s, self._join, plan)
        await self._serve_clients()
        self._over = True
        for place in list(self._undo):
            self._put_right(place)
        await self._see_freed()
        await self._see_left()
        self.report.events, self.report.virtual_s = loop.events, loop.time()
        for machine in self._all:
            if isinstance(machine, WorkerMachine):
                self.report.computed_block_tokens += machine.worker.block_tokens_total

    def _now_s(self) -> float:
        try:
            return asyncio.get_running_loop().time() - self._origin_s
        except RuntimeError:
            return math.nan

    # -- machines ----------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._gateway = GatewayMachine(
            _GATEWAY,
            self._net,
            rng=self._rng(_GATEWAY),
            options=SwarmOptions(draft_tokens=self.schedule.draft_tokens, times=TIMES),
            observer=self._observer(),
        )
        self._add(self._gateway)
        await self._gateway.up.wait()
        for plan in self.schedule.machines:
            if not plan.joins_s:
                self._join(plan)
        async with asyncio.timeout(STARTED_BY_S):
            while any(len(machine.membership.records()) < len(self._all) for machine in self._all):
                await asyncio.sleep(0.1)

    def _join(self, plan: MachinePlan) -> None:
        if self._over:
            return
        introducers = (TicketPeer(self._gateway.peer, (self._gateway.address,)),)
        earlier = next((machine for machine in self._machines.values() if not machine.dead), None)
        if earlier is not None:
            introducers += (TicketPeer(earlier.peer, (earlier.address,)),)
        if self._origin_s:
            self._joined_s = self._loop.time()
        machine = WorkerMachine(
            plan,
            self._net,
            rng=self._rng(plan.name),
            introducers=introducers,
            observer=self._observer(),
        )
        self._machines[plan.name] = machine
        self._add(machine)

    def _add(self, machine: Machine) -> None:
        self.note(f"{machine.name} starts")
        self._names[machine.peer] = machine.name
        self._all.append(machine)
        machine.start()

    def _rng(self, name: str) -> np.random.Generator:
        """A component's own, so that one more draw of it changes nothing elsewhere."""
        return np.random.default_rng([self.schedule.seed, len(self._all), *name.encode()])

    def _observer(self) -> Observer:
        return Observer(
            note=self.note,
            violate=self.violate,
            on_send=self._on_send,
            on_hear=self._on_hear,
            on_drop=self._on_drop,
        )

    # -- what is seen ------------------------------------------------------------------------------------

    def _on_send(self, machine: Machine, peer: PeerId, message: Message) -> None:
        if machine is not self._gateway:
            return
        now_s = self._loop.time()
        match message:
            case OpenSession() | Fence():
                flow = self._flows.setdefault(message.session, _Flow(message.epoch, now_s))
                if message.epoch > flow.epoch and flow.began_s is None:
                    flow.began_s = now_s
            case Resume():
                self._flows[message.session].gathered_s = now_s
            case _:
                pass

    def _on_hear(self, machine: Machine, peer: PeerId, message: Message) -> None:
        session = getattr(message, "session", "")
        detail = f" {session[:6]} e{message.epoch}" if session else ""  # type: ignore[union-attr]
        if isinstance(message, Step):
            detail += f" n{message.number} {message.start}+{len(message.token_ids)}"
        elif isinstance(message, Tokens):
            detail += f" n{message.number} {message.position}: {message.token_ids}"
        self.note(f"{machine.name} hears {type(message).__name__}{detail} of {self._name(peer)}")
        if machine is self._gateway:
            self._loop.call_soon(self._check_gateway)
            if isinstance(message, Tokens):
                self._see_tokens(message)

    def _check_gateway(self) -> None:
        try:
            self._gateway.engine.check()
        except AssertionError as error:
            self.violate(f"a chain is none: {error}")

    def _see_tokens(self, tokens: Tokens) -> None:
        now_s = self._loop.time()
        flow = self._flows[tokens.session]
        if tokens.epoch > flow.epoch and flow.began_s is not None:
            began_s = flow.began_s
            recent = [fault for fault in self._struck if flow.token_s - _RECENT_S <= fault[0] <= began_s]
            recovery = Recovery(
                after=tuple(kind for _, kind in recent),
                noticed_s=began_s - max((struck_s for struck_s, _ in recent), default=began_s),
                gathered_s=flow.gathered_s - began_s,
                stalled_s=now_s - flow.token_s,
            )
            self.report.recoveries.append(recovery)
            self.note(f"session {tokens.session[:6]} recovered: {recovery}")
            self._check_recovery(recovery, began_s)
            flow.began_s = None
        if tokens.epoch >= flow.epoch:
            flow.epoch, flow.token_s = tokens.epoch, now_s

    def _check_recovery(self, recovery: Recovery, began_s: float) -> None:
        if began_s - self._joined_s < _JOINED_S:
            return
        kinds = set(self.report.struck)
        if kinds <= HARMLESS:
            self.violate(f"a session began another epoch after {sorted(kinds)}")
        spared = [plan.name for plan in self.schedule.machines if plan.sheltered]
        unharmed = bool(spared) and not self._harmed & set(spared) and not self.schedule.tight
        if unharmed and kinds <= PROMPT:
            if recovery.noticed_s > NOTICED_BY_S:
                self.violate(f"a loss was noticed after {recovery.noticed_s:.2f} s: {recovery.after}")
            if recovery.gathered_s > NOTICED_BY_S * len(recovery.after):
                self.violate(f"a chain was gathered in {recovery.gathered_s:.2f} s: {recovery.after}")

    def _on_drop(self, machine: Machine, peer: PeerId, reason: str) -> None:
        self.note(f"{machine.name} cuts off {self._name(peer)}: {reason}")
        if self._name(peer) not in self._liars:
            self.violate(f"{machine.name} cut off {self._name(peer)}, which had not lied: {reason}")

    def _name(self, peer: PeerId) -> str:
        return self._names.get(peer, peer[:6])

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.violate(f"nobody handled this: {context.get('exception') or context.get('message')!r}")

    # -- clients -----------------------------------------------------------------------------------------

    async def _serve_clients(self) -> None:
        tasks: list[asyncio.Task[None]] = []
        for number, plan in enumerate(self.schedule.requests):
            report = RequestReport()
            self.report.requests.append(report)
            tasks.append(self._gateway.process.start(self._ask(number, plan, report)))
        while any(not task.done() for task in tasks) and not self._gateway.dead:
            if self._loop.time() > self._last_fault_s + ENDED_BY_S:
                break
            await asyncio.wait(tasks, timeout=1.0)
        for number, (task, report) in enumerate(zip(tasks, self.report.requests, strict=True)):
            if task.done():
                task.result()
            elif self._gateway.dead:
                report.ending = "lost with its gateway"
            else:
                self.violate(f"request {number} has neither its tokens nor an error: {report.tokens} tokens")
            allowed = not self.schedule.sheltered or (self.schedule.tight and "NoCapacity" in report.error)
            if report.ending == "failed" and not allowed:
                self.violate(f"request {number} failed, though machines were there: {report.error}")

    async def _ask(self, number: int, plan: RequestPlan, report: RequestReport) -> None:
        await asyncio.sleep(plan.arrives_s)
        request = GenerationRequest(
            id=RequestId(f"request-{number}"),
            prompt_token_ids=plan.prompt_token_ids,
            sampling=plan.sampling,
        )
        truth = true_answer(request)
        got: list[list[int]] = [[] for _ in truth]
        finished = 0
        try:
            async with asyncio.timeout(None if math.isinf(plan.gives_up_s) else plan.gives_up_s):
                async for delta in self._gateway.engine.generate(request):
                    for part in delta.sequences:
                        got[part.index] += part.token_ids
                        report.tokens += len(part.token_ids)
                        self._given_tokens += len(part.token_ids)
                        finished += part.finish_reason is not None
                        needed_tokens = len(part.token_ids)
                        if len(got[part.index]) == len(part.token_ids):
                            needed_tokens += len(plan.prompt_token_ids) - 1
                        self.report.needed_block_tokens += MODEL_BLOCKS * needed_tokens
                        if tuple(got[part.index]) != truth[part.index][: len(got[part.index])]:
                            self.violate(f"request {number}: {got[part.index]} begins no {truth[part.index]}")
                    self._let_strike()
            report.ending = "answered"
            if tuple(map(tuple, got)) != truth or finished != len(truth):
                self.violate(f"request {number} ended with {got} and not with {truth}")
        except TimeoutError:
            report.ending = "cancelled"
        except ServingError as error:
            report.ending, report.error = "failed", f"{type(error).__name__}: {error.message}"
            if isinstance(error, NoRoute) and not error.missing_blocks:
                self.violate(f"request {number}: no block is named in {report.error}")
        self.note(f"request {number} {report.ending}, {report.tokens} tokens {report.error}")

    # -- faults ------------------------------------------------------------------------------------------

    def _let_strike(self) -> None:
        """Start the faults that so many tokens were to come before."""
        due = [(place, fault) for place, fault in self._to_come if fault.after_tokens <= self._given_tokens]
        for place, fault in due:
            self._to_come.remove((place, fault))
            # In nobody's process: it is to happen whoever is stopped by then.
            self._loop.call_later(fault.delay_s, self._strike, place, fault, context=self._net.context)

    def _strike(self, place: int, fault: Fault) -> None:
        """Let a fault happen to somebody, and put it right when its time is over."""
        if self._over:
            return
        victim: Machine | None = self._gateway
        if not fault.kind.endswith("_gateway"):
            victim = self._victim(fault)
        if victim is None or victim.dead:
            return
        self.note(f"FAULT {fault.kind} of {victim.name} for {fault.duration_s:.2f} s")
        self.report.struck[fault.kind] += 1
        now_s = self._loop.time()
        self._struck.append((now_s, fault.kind))
        if fault.kind not in HARMLESS:
            self._harmed.add(victim.name)
        self._last_fault_s = max(self._last_fault_s, now_s + fault.duration_s)
        undo = self._hurt(victim, fault)
        if undo is not None:
            self._undo[place] = undo
            self._loop.call_later(fault.duration_s, self._put_right, place)

    def _put_right(self, place: int) -> None:
        undo = self._undo.pop(place, None)
        if undo is not None:
            undo()

    def _victim(self, fault: Fault) -> WorkerMachine | None:
        """Who is struck: preferably one that a session crosses."""

        def may_be(machine: WorkerMachine) -> bool:
            spared = fault.kind in LETHAL and machine.plan.sheltered
            return not (machine.dead or machine.leaving or spared)

        names = [self._name(hop.peer) for hops in self._gateway.engine.chains().values() for hop in hops]
        candidates = [self._machines[name] for name in names if name in self._machines]
        candidates = [machine for machine in candidates if may_be(machine)]
        if not candidates or fault.draw % 5 == 0:
            candidates = [machine for machine in self._machines.values() if may_be(machine)]
        return candidates[fault.draw % len(candidates)] if candidates else None

    def _hurt(self, machine: Machine, fault: Fault) -> Callable[[], None] | None:
        """Do it; returns what ends it."""
        match fault.kind:
            case "kill" | "kill_gateway":
                return self._kill(machine, fault)
            case "vanish":
                machine.process.kill()
                self._net.freeze(machine.name)
                return None
            case "freeze" | "freeze_gateway":
                machine.process.stop()
                self._net.freeze(machine.name)
                return lambda: self._thaw(machine)
            case "partition" | "isolate":
                side = {machine.name}
                if fault.kind == "partition":
                    names = [each.name for each in self._all if not each.dead]
                    rng = np.random.default_rng(fault.draw)
                    side |= {name for name in names if rng.random() < 0.4}
                nodes = frozenset(side)
                self._net.partition(nodes)
                return lambda: self._net.heal(nodes)
            case "cut":
                for other in self._all:
                    self._net.cut(machine.name, other.name)
                return None
            case "slow_link":
                slow = Wire(delay_s=fault.strength / 3, jitter_s=fault.strength)
                return self._rewire(machine, slow)
            case "slow_node":
                assert isinstance(machine, WorkerMachine)
                return self._slow_down(machine, fault.strength)
            case "duplicate" | "replay" | "reorder" | "lose" | "lie":
                if fault.kind in DISHONEST:
                    self._liars.add(machine.name)
                return self._mislead(machine, fault.kind)
            case "break":
                assert isinstance(machine, WorkerMachine)
                self._broken = True
                machine.fail_next_step()
                return None
            case "leave":
                machine.leave()
                return None

    def _kill(self, machine: Machine, fault: Fault) -> Callable[[], None] | None:
        machine.process.kill()
        self._net.kill(machine.name)
        if not isinstance(machine, WorkerMachine) or fault.draw % 2:
            return None

        def restart() -> None:
            self._net.revive(machine.name)
            self._join(machine.plan)

        return restart

    def _thaw(self, machine: Machine) -> None:
        self._net.thaw(machine.name)
        machine.process.go_on()

    def _rewire(self, machine: Machine, wire: Wire) -> Callable[[], None]:
        def set_all(wire: Wire) -> None:
            for other in self._all:
                self._net.set_wire(machine.name, other.name, wire)

        set_all(wire)
        return lambda: set_all(self.schedule.wire)

    def _slow_down(self, machine: WorkerMachine, strength: float) -> Callable[[], None]:
        def speed_up() -> None:
            machine.slowness /= strength

        machine.slowness *= strength
        return speed_up

    def _mislead(self, machine: Machine, mischief: Mischief) -> Callable[[], None]:
        network, only = machine.network, frozenset[Mischief]({mischief})

        def behave() -> None:
            network.mischief -= only

        network.mischief |= only
        return behave

    # -- the end -----------------------------------------------------------------------------------------

    def _living(self) -> list[WorkerMachine]:
        return [machine for machine in self._machines.values() if not machine.dead]

    async def _see_freed(self) -> None:
        """No worker keeps anything of a session that has ended."""
        kinds = set(self.report.struck)
        deadline_s = self._loop.time() + (FREED_SOON_S if kinds <= HARMLESS else FREED_BY_S)
        # What was sent over a slow link may open a session later, and close it later still.
        quiet_s = SLOWEST_LINK_S if "slow_link" in kinds else 1.0
        free_since_s = self._loop.time()
        while self._loop.time() < min(deadline_s, free_since_s + quiet_s):
            await asyncio.sleep(0.2)
            if any(machine.worker.sessions or machine.engine.computing for machine in self._living()):
                free_since_s = self._loop.time()
        for machine in self._living():
            load = machine.engine.load()
            if machine.worker.sessions or load.sessions:
                self.violate(
                    f"{machine.name} has {machine.worker.sessions} sessions left, its engine {load.sessions}"
                )
            elif load.kv_free_tokens != load.kv_total_tokens:
                self.violate(
                    f"{machine.name} has {load.kv_free_tokens} of {load.kv_total_tokens} KV tokens free"
                )
            if machine.worker.failure is not None:
                self.violate(f"{machine.name} has stopped: {machine.worker.failure.message}")
        counts = self._gateway.engine.counts()
        if not self._gateway.dead and counts.sessions:
            self.violate(f"the gateway has {counts.sessions} sessions left")

    async def _see_left(self) -> None:
        """All leave in good order, and leave no task behind."""
        living: list[Machine] = [machine for machine in self._all if not machine.dead]
        for machine in living:
            machine.leave()
        for machine in living:
            try:
                async with asyncio.timeout(LEFT_BY_S):
                    await machine.left()
            except TimeoutError:
                self.violate(f"{machine.name} does not leave")
            except Exception as error:
                self.violate(f"{machine.name} died of {type(error).__name__}: {error}")
        await asyncio.sleep(0)
        for machine in living:
            for task in self._loop.unfinished(machine.process):
                self.violate(f"{machine.name} left a task behind: {place_of(task)}")


@dataclass(slots=True)
class _Flow:
    """A session as its gateway sees it: the epoch and time of its latest tokens, and how far the next epoch is."""

    epoch: int
    token_s: float
    began_s: float | None = None
    gathered_s: float = 0.0


class _Listener(logging.Handler):
    """Hears of errors that were logged and not raised."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(logging.ERROR)
        self._trial = trial

    def emit(self, record: logging.LogRecord) -> None:
        if not self._trial.expects_error(str(record.msg)):
            cause = record.exc_info[1] if record.exc_info else None
            self._trial.violate(f"logged: {record.getMessage()} {'' if cause is None else repr(cause)}")
