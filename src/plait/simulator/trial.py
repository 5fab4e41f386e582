"""One trial: a swarm lives through a fault schedule, and everything that should never happen is written down.

What is checked after every event, of the machine that it happened to (`Invariants`):

- each KV block and each page of kept inputs is free or held by exactly one session, which is open at this worker;
- within an epoch no session goes back by more than the guesses that it may have made, and no epoch comes twice;
- what a hop has computed, was fed and knows follow one another; what it keeps for replays is what it computed;
- at the gateway, the hops of a session that flows cover the model once and have all answered.

As it happens:

- the tokens of an answer, so far, begin the answer of a single engine; a finished one is that answer, told once;
- a position is computed once in an epoch, and nobody touches an engine while it computes;
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
from collections.abc import Callable
from typing import Any

from plait.errors import NoRoute, ServingError
from plait.ids import PeerId, RequestId
from plait.session import GenerationRequest
from plait.simulator.fault_schedule import HARMLESS, PROMPT, SLOWEST_LINK_S, FaultSchedule, RequestPlan
from plait.simulator.hash_model import MODEL_BLOCKS, true_answer
from plait.simulator.havoc import Havoc
from plait.simulator.invariants import Invariants
from plait.simulator.machine import GRACE_S, LEASE_S, Machine, Observer
from plait.simulator.recovery_watch import RecoveryWatch
from plait.simulator.trial_report import MOST_VIOLATIONS, Recovery, RequestReport, TrialReport
from plait.simulator.trial_swarm import TrialSwarm
from plait.simulator.virtual_loop import VirtualLoop, place_of, run_virtual
from plait.transport import NetworkLimits
from plait.wire import Fault, Message, Refused, Step, Tokens
from plait.worker import MembershipLimits

ENDED_BY_S = 400.0
"""After the last fault: no session may go on without a token for so long (24 rounds of `TIMES.token_s`, and more)."""
FREED_BY_S = LEASE_S + GRACE_S + 30.0
FREED_SOON_S = 3.0
LEFT_BY_S = 30.0
NOTICED_BY_S = NetworkLimits().dead_after_s + 1.0
"""A machine that vanishes, by heartbeats; the rest is the way there and back, and the step that runs meanwhile."""
_JOINED_S = MembershipLimits().digest_s + 1.0
"""Until all have heard of a machine that joins: a hop that has not is told of a peer that it cannot reach. Rumours take
less, but may miss somebody; digests miss nobody."""


def run_trial(schedule: FaultSchedule, *, trace: Callable[[str], None] | None = None) -> TrialReport:
    """Run a schedule on a clock of its own; `trace` gets what happens, line by line."""
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
        self._loop: VirtualLoop | None = None
        self._invariants = Invariants(self.violate)
        self._recoveries = RecoveryWatch(self._now_s, self._on_recovery)
        self._given_tokens = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        loop.after_event = self._invariants.after_event
        loop.set_exception_handler(self._unhandled)
        self._swarm = TrialSwarm(self.schedule, self._observer(), self._on_machine)
        self._havoc = Havoc(self.schedule, self._swarm, note=self.note, on_strike=self._recoveries.struck)
        self.report.struck = self._havoc.struck
        await self._swarm.start()
        self._havoc.given(0)
        for plan in self.schedule.machines:
            if plan.joins_s:
                loop.call_later(plan.joins_s, self._swarm.join, plan)
        await self._serve_clients()
        self._swarm.closed = True
        self._havoc.end()
        await self._see_freed()
        await self._see_left()
        for machine in self._swarm.workers.values():
            self.report.computed_block_tokens += machine.worker.block_tokens_total
        self.report.replayed_tokens = self._swarm.gateway.engine.counts().replayed_tokens_total

    def violate(self, text: str) -> None:
        """Something happened that never should."""
        where = "before the first event" if self._loop is None else f"event {self._loop.events}"
        text = f"{where}, {self._now_s():.3f} s: {text}"
        self.note(f"VIOLATION {text}")
        if len(self.report.violations) < MOST_VIOLATIONS:
            self.report.violations.append(text)

    def note(self, text: str) -> None:
        line = f"{self._now_s():.6f} {text}"
        self._digest.update(line.encode())
        if self._trace is not None:
            self._trace(line)

    def finished(self) -> TrialReport:
        """The report, once it has run."""
        report = self.report
        report.digest, report.checks = self._digest.hexdigest(), self._invariants.checks
        if self._loop is not None:
            report.events, report.virtual_s = self._loop.events, self._loop.time()
        return report

    def expects_error(self, message: str) -> bool:
        """Whether this was caused on purpose."""
        return self._havoc.broken and message == "a step failed"

    def _now_s(self) -> float:
        return 0.0 if self._loop is None else self._loop.time()

    # -- what is seen ------------------------------------------------------------------------------------

    def _observer(self) -> Observer:
        return Observer(
            note=self.note,
            violate=self.violate,
            on_send=self._on_send,
            on_hear=self._on_hear,
            on_drop=self._on_drop,
        )

    def _on_machine(self, machine: Machine) -> None:
        self.note(f"{machine.name} starts")
        self._invariants.watch(machine)

    def _on_send(self, machine: Machine, peer: PeerId, message: Message) -> None:
        if machine is self._swarm.gateway:
            self._recoveries.sent(message)

    def _on_hear(self, machine: Machine, peer: PeerId, message: Message) -> None:
        session = getattr(message, "session", "")
        detail = f" {session[:6]} e{message.epoch}" if session else ""  # type: ignore[union-attr]
        if isinstance(message, Step):
            detail += f" n{message.number} {message.start}+{len(message.token_ids)}"
        elif isinstance(message, Tokens):
            detail += f" n{message.number} {message.position}: {message.token_ids}"
        elif isinstance(message, Fault | Refused):
            detail += f" {message.code}"
        self.note(f"{machine.name} hears {type(message).__name__}{detail} of {self._swarm.name(peer)}")
        if machine is self._swarm.gateway and isinstance(message, Tokens):
            self._recoveries.heard(message)

    def _on_recovery(self, recovery: Recovery, began_s: float) -> None:
        self.report.recoveries.append(recovery)
        self.note(f"a session recovered: {recovery}")
        if began_s - self._swarm.joined_s < _JOINED_S:
            return
        kinds = set(self.report.struck)
        if kinds <= HARMLESS:
            self.violate(f"a session began another epoch after {sorted(kinds)}")
        spared = {plan.name for plan in self.schedule.machines if plan.sheltered}
        unharmed = bool(spared) and not self._havoc.harmed & spared and not self.schedule.tight
        if unharmed and kinds <= PROMPT:
            if recovery.noticed_s > NOTICED_BY_S:
                self.violate(f"a loss was noticed after {recovery.noticed_s:.2f} s: {recovery.after}")
            if recovery.gathered_s > NOTICED_BY_S * len(recovery.after):
                self.violate(f"a chain was gathered in {recovery.gathered_s:.2f} s: {recovery.after}")

    def _on_drop(self, machine: Machine, peer: PeerId, reason: str) -> None:
        name = self._swarm.name(peer)
        self.note(f"{machine.name} cuts off {name}: {reason}")
        if name not in self._havoc.liars:
            self.violate(f"{machine.name} cut off {name}, which had not lied: {reason}")

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.violate(f"nobody handled this: {context.get('exception') or context.get('message')!r}")

    # -- clients -----------------------------------------------------------------------------------------

    async def _serve_clients(self) -> None:
        gateway = self._swarm.gateway
        tasks: list[asyncio.Task[None]] = []
        for number, plan in enumerate(self.schedule.requests):
            report = RequestReport()
            self.report.requests.append(report)
            tasks.append(gateway.process.start(self._ask(number, plan, report)))
        while any(not task.done() for task in tasks) and not gateway.dead:
            if self._now_s() > self._havoc.last_s + ENDED_BY_S:
                break
            await asyncio.wait(tasks, timeout=1.0)
        for number, (task, report) in enumerate(zip(tasks, self.report.requests, strict=True)):
            if task.done():
                task.result()
            elif gateway.dead:
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
        answer = _Answer(true_answer(request))
        try:
            async with asyncio.timeout(None if math.isinf(plan.gives_up_s) else plan.gives_up_s):
                async for delta in self._swarm.gateway.engine.generate(request):
                    for part in delta.sequences:
                        first = answer.take(part.index, part.token_ids, part.finish_reason is not None)
                        if not answer.begins_truth(part.index):
                            self.violate(f"request {number}: {answer.got} begins no {answer.truth}")
                        self._count(report, len(part.token_ids), len(plan.prompt_token_ids) if first else 1)
                    self._havoc.given(self._given_tokens)
            report.ending = "answered"
            if not answer.is_truth:
                self.violate(f"request {number} ended with {answer.got} and not with {answer.truth}")
        except TimeoutError:
            report.ending = "cancelled"
        except ServingError as error:
            report.ending, report.error = "failed", f"{type(error).__name__}: {error.message}"
            if isinstance(error, NoRoute) and not error.missing_blocks:
                self.violate(f"request {number}: no block is named in {report.error}")
        self.note(f"request {number} {report.ending}, {report.tokens} tokens {report.error}")

    def _count(self, report: RequestReport, tokens: int, input_tokens: int) -> None:
        """A part of an answer has come, for which so many inputs were needed before its first token."""
        report.tokens += tokens
        self._given_tokens += tokens
        self.report.needed_block_tokens += MODEL_BLOCKS * (input_tokens + tokens - 1)

    # -- the end -----------------------------------------------------------------------------------------

    async def _see_freed(self) -> None:
        """No worker keeps anything of a session that has ended."""
        workers, kinds = self._swarm.living_workers(), set(self.report.struck)
        deadline_s = self._now_s() + (FREED_SOON_S if kinds <= HARMLESS else FREED_BY_S)
        # What was sent over a slow link may open a session later, and close it later still.
        quiet_s = SLOWEST_LINK_S if kinds & {"slow_link", "narrow_link"} else 1.0
        free_since_s = self._now_s()
        while self._now_s() < min(deadline_s, free_since_s + quiet_s):
            await asyncio.sleep(0.2)
            if any(machine.worker.sessions or machine.engine.computing for machine in workers):
                free_since_s = self._now_s()
        for machine in workers:
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
        gateway = self._swarm.gateway
        if not gateway.dead and gateway.engine.counts().sessions:
            self.violate(f"the gateway has {gateway.engine.counts().sessions} sessions left")

    async def _see_left(self) -> None:
        """All leave in good order, and leave no task behind."""
        living = self._swarm.living()
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
        assert self._loop is not None
        for machine in living:
            for task in self._loop.unfinished(machine.process):
                self.violate(f"{machine.name} left a task behind: {place_of(task)}")


class _Answer:
    """What a client has got of the `truth`, the tokens of each sample."""

    def __init__(self, truth: tuple[tuple[int, ...], ...]) -> None:
        self.truth = truth
        self.got: list[tuple[int, ...]] = [() for _ in truth]
        self._finished = 0

    def take(self, index: int, token_ids: tuple[int, ...], finished: bool) -> bool:
        """More of a sample; whether it is the first of it."""
        first = not self.got[index]
        self.got[index] += token_ids
        self._finished += finished
        return first

    def begins_truth(self, index: int) -> bool:
        return self.got[index] == self.truth[index][: len(self.got[index])]

    @property
    def is_truth(self) -> bool:
        """Whether every sample is there, and was said to be finished once."""
        return tuple(self.got) == self.truth and self._finished == len(self.truth)


class _Listener(logging.Handler):
    """Hears of errors that were logged and not raised."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(logging.ERROR)
        self._trial = trial

    def emit(self, record: logging.LogRecord) -> None:
        if not self._trial.expects_error(str(record.msg)):
            cause = record.exc_info[1] if record.exc_info else None
            self._trial.violate(f"logged: {record.getMessage()} {'' if cause is None else repr(cause)}")
