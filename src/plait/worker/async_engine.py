"""The engine in a thread of its own, seen from asyncio.

The thread owns the engine: it takes commands (add, abort) between steps, runs steps while there is work, and
sends what each step produced to the event loop in one call. The event loop owns the streams. Neither touches
the other's state; the status is a frozen value that the thread replaces after each step.

Constraints are compiled in a second thread, one at a time: a hostile one takes seconds, during which no stream
may stand still.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from plait.engine import Engine, EngineOptions, EngineStatus, Matcher, Tokenizer
from plait.errors import BadSetup, EngineFailure, EngineLost, NotReady, ServingError
from plait.ids import RequestId
from plait.session import Constraint, GenerationRequest, RequestDelta
from plait.worker.request_stream import RequestStream
from plait.worker.tensor_parallel import load_divided

EngineState = Literal["loading", "ready", "draining", "failed"]
log = logging.getLogger(__name__)

# A step that fails ends the requests in it. This many in a row without one good step between them means that
# the engine itself is broken: it stops, and /health says so.
MAX_FAILED_STEPS = 3
# How soon a loading or draining server may be asked again.
RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading has come; `total_bytes` is 0 while it is not known yet."""

    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind an engine, as clients see it; the first name is the one that answers carry."""

    names: tuple[str, ...]
    max_model_tokens: int
    tokenizer: Tokenizer
    created_unix_s: int


@dataclass(frozen=True, slots=True)
class _Add:
    request: GenerationRequest
    matcher: Matcher | None


@dataclass(frozen=True, slots=True)
class _Abort:
    id: RequestId


class _Stop:
    pass


_Command = _Add | _Abort | _Stop
_ToCompile = tuple[Constraint, "asyncio.Future[Matcher]"]
_Sent = Sequence[tuple[RequestId, RequestDelta | ServingError]]


class AsyncEngine:
    """Serves one model to many asyncio tasks; enter it to start loading, leave it to stop.

    `options` is called in the engine's thread, so that choosing them (which may look at the checkpoint or the
    GPU, or download) does not hold up the event loop; it gets a callback for progress.
    """

    def __init__(
        self,
        options: Callable[[Callable[[LoadProgress], None]], EngineOptions],
        *,
        names: tuple[str, ...],
    ) -> None:
        self.names = names
        self.state: EngineState = "loading"
        self.load_progress = LoadProgress("starting", 0, 0)
        self.failure: ServingError | None = None
        self._options = options
        self._model: ServedModel | None = None
        self._status = EngineStatus()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._to_compile: queue.SimpleQueue[_ToCompile | None] = queue.SimpleQueue()
        self._streams: dict[RequestId, RequestStream] = {}
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._settled: asyncio.Event = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="plait-engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state == "ready":
            self.state = "draining"
        self._commands.put(_Stop())
        stopping = NotReady("the server is stopping; retry elsewhere")
        with suppress(queue.Empty):
            while (asked := self._to_compile.get_nowait()) is not None:
                _settle(asked[1], stopping)
        self._to_compile.put(None)
        await asyncio.to_thread(self._thread.join)
        self._deliver([(id, stopping) for id in self._streams])

    @property
    def model(self) -> ServedModel:
        """The served model.

        Raises:
            NotReady: it is still loading, or could not be loaded.
        """
        if self._model is None:
            raise not_ready(self.state, self.failure)
        return self._model

    async def wait_settled(self) -> EngineState:
        """Wait until loading has ended, well or not."""
        await self._settled.wait()
        return self.state

    def status(self) -> EngineStatus:
        """Counts as of the engine's latest step."""
        return self._status

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestDelta, None]:
        """Run a request; closing the iterator early aborts it, which frees all it held within one step.

        Raises:
            NotReady: loading, draining or failed.
            BadRequest: the request can never run on this model.
            NoCapacity: the queue is full.
            EngineFailure: the engine broke while it ran the request.
        """
        if self.state != "ready":
            raise not_ready(self.state, self.failure)
        if request.id in self._streams:
            raise EngineFailure(f"request id {request.id!r} is already running")
        stream = self._streams[request.id] = RequestStream()
        self._idle.clear()
        finished = True
        try:
            constraint = request.sampling.constraint
            matcher = None if constraint is None else await self._compiled(constraint)
            self._commands.put(_Add(request, matcher))
            finished = False
            while not finished:
                item = await stream.take()
                if isinstance(item, ServingError):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            del self._streams[request.id]
            if not finished:
                self._commands.put(_Abort(request.id))
            if not self._streams:
                self._idle.set()

    async def _compiled(self, constraint: Constraint) -> Matcher:
        answer: asyncio.Future[Matcher] = self._loop.create_future()
        self._to_compile.put((constraint, answer))
        return await answer

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

    def _deliver(self, sent: _Sent) -> None:
        for id, item in sent:
            stream = self._streams.get(id)
            if stream is not None:
                stream.put(item)

    # -- the thread that compiles constraints ----------------------------------------------------------

    def _compile_constraints(self, engine: Engine) -> None:
        while (asked := self._to_compile.get()) is not None:
            constraint, answer = asked
            if answer.cancelled():
                continue
            try:
                self._post(_settle, answer, engine.compile(constraint))
            except ServingError as error:
                self._post(_settle, answer, error)
            except Exception as error:
                log.exception("a constraint could not be compiled")
                failure = EngineFailure(
                    f"a constraint could not be compiled: {type(error).__name__}: {error}"
                )
                self._post(_settle, answer, failure)

    # -- the engine's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        with ExitStack() as ranks:  # processes that share the model: they end with this thread
            self._load_and_serve(ranks)

    def _load_and_serve(self, ranks: ExitStack) -> None:
        try:
            engine = self._load(ranks)
        except ServingError as error:
            self._fail(error)
            return
        except Exception as error:
            log.exception("loading failed")
            self._fail(BadSetup(f"loading failed: {type(error).__name__}: {error}"))
            return
        threading.Thread(
            target=self._compile_constraints, args=(engine,), name="plait-constraints", daemon=True
        ).start()
        self._post(self._become_ready, engine)
        try:
            self._serve(engine)
        except Exception as error:
            log.exception("the engine stopped")
            self._fail(EngineFailure(f"the engine stopped: {_described(error)}"))

    def _load(self, ranks: ExitStack) -> Engine:
        def on_progress(progress: LoadProgress) -> None:
            self.load_progress = progress

        options = self._options(on_progress)
        return load_divided(
            options,
            ranks,
            on_progress=lambda done, total: on_progress(LoadProgress("reading weights", done, total)),
        )

    def _become_ready(self, engine: Engine) -> None:
        self._model = ServedModel(
            names=self.names,
            max_model_tokens=engine.max_model_tokens,
            tokenizer=engine.tokenizer,
            created_unix_s=int(time.time()),
        )
        self._status = engine.status()
        self.state = "ready"
        self._settled.set()

    def _fail(self, error: ServingError) -> None:
        def settle() -> None:
            self.failure = error
            self.state = "failed"
            self._settled.set()
            self._deliver([(id, EngineFailure(error.message)) for id in self._streams])

        self._post(settle)

    def _serve(self, engine: Engine) -> None:
        failed_steps = 0
        while True:
            sent: list[tuple[RequestId, RequestDelta | ServingError]] = []
            if not self._take_commands(engine, sent):
                return
            if engine.has_work:
                try:
                    deltas = engine.step()
                    failed_steps = 0
                    sent.extend((delta.request_id, delta) for delta in deltas)
                except Exception as error:
                    failed_steps = MAX_FAILED_STEPS if isinstance(error, EngineLost) else failed_steps + 1
                    log.exception("a step failed")
                    failure = EngineFailure(f"a step of the engine failed: {_described(error)}")
                    sent.extend((id, failure) for id in engine.abort_running())
                    if failed_steps == MAX_FAILED_STEPS:
                        self._post(self._deliver, sent)
                        raise
            sent.extend(engine.take_failures())
            self._status = engine.status()
            if sent:
                self._post(self._deliver, sent)

    def _take_commands(
        self, engine: Engine, sent: list[tuple[RequestId, RequestDelta | ServingError]]
    ) -> bool:
        """Apply what has arrived, waiting for something when there is nothing to run; False means stop."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work and not sent)
            except queue.Empty:
                return True
            match command:
                case _Add(request, matcher):
                    try:
                        engine.add(request, matcher=matcher)
                    except ServingError as error:
                        sent.append((request.id, error))
                    except Exception as error:
                        # A request that nobody foresaw ends alone.
                        log.exception("a request could not be added")
                        failure = f"the engine could not take this request: {type(error).__name__}: {error}"
                        sent.append((request.id, EngineFailure(failure)))
                case _Abort(id):
                    engine.abort(id)
                    self._status = engine.status()
                case _Stop():
                    return False

    def _post(self, call: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            # The event loop is closed: nobody is left to be told.
            log.debug("event loop is closed")


def not_ready(state: EngineState, failure: ServingError | None) -> NotReady:
    """Why an engine in this state takes no request."""
    if state == "failed":
        reason = failure.message if failure else "it stopped"
        return NotReady(f"the engine has failed: {reason}", retry_after_s=60.0)
    if state == "draining":
        return NotReady("the server is shutting down and takes no new requests", retry_after_s=RETRY_S)
    return NotReady("the model is still loading", retry_after_s=RETRY_S)


def _described(error: Exception) -> str:
    return error.message if isinstance(error, ServingError) else f"{type(error).__name__}: {error}"


def _settle(answer: "asyncio.Future[Matcher]", outcome: Matcher | ServingError) -> None:
    if answer.done():
        return
    if isinstance(outcome, ServingError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
