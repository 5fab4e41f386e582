# pyright: standard
"""Tensor parallelism, from rank 0: the other ranks are started, or awaited, and every step runs on all of them.

Each rank has its heads, its inner columns and its slice of the vocabulary. A step goes out as token ids and block
tables; every rank looks the embeddings up itself, runs all blocks, and adds up with the others after each output and
each down projection; then rank 0 gathers what it needs of the logits, samples, and the next step carries the tokens.

One rank that fails ends them all: a step needs every part of the model. What rank 0 raises names the rank and says why.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor

from plait.engine import (
    Engine,
    EngineOptions,
    KvExtents,
    Rank,
    RankPlan,
    SequenceChunk,
    SpanDecoder,
    TensorParallel,
    load_engine,
    vocabularies,
)
from plait.errors import BadSetup, EngineLost, ServingError
from plait.worker.gloo_link import JOIN_TIMEOUT_S, GlooLink
from plait.worker.rank_links import Frame, FrameKind, GroupSizes, LocalLink, RankLink
from plait.worker.rank_results import gather_results
from plait.worker.step_message import Move, MoveKind, Step, encode_step

if TYPE_CHECKING:
    from plait.kernels._native import Collective

# A process imports torch before it reads its plan. Ranks load parts of one size: one that takes so many times longer
# than rank 0 will not come.
START_TIMEOUT_S = 120.0
LOAD_PATIENCE = 10.0
# How long a rank that was told to stop may take, before it is killed.
STOP_TIMEOUT_S = 5.0
# How long a rank that has failed may take to say why.
LAST_WORDS_S = 1.0


def load_divided(
    options: EngineOptions, ranks: ExitStack, *, on_progress: Callable[[int, int], None] | None = None
) -> Engine:
    """`load_engine`, on as many ranks as the options say; the other ranks end when `ranks` is closed.

    Raises:
        BadSetup: as for `load_engine`, on any rank.
    """
    if options.tensor_parallel.rank:
        raise BadSetup("only `plait serve` can be a rank beside rank 0; leave out --tensor-parallel-rank")
    if options.tensor_parallel.size == 1:
        return load_engine(options, on_progress=on_progress)
    group = ranks.enter_context(TensorParallelGroup(options.tensor_parallel))
    return load_engine(options, on_progress=on_progress, group=group)


class TensorParallelGroup:
    """The other ranks of a model; leave it when the engine has ended, or could not be loaded."""

    def __init__(self, options: TensorParallel) -> None:
        assert options.size > 1 and options.rank == 0
        self.ranks = options.size
        self._options = options
        self._link: RankLink | None = None
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started_s = 0.0
        self._led = False
        self._lost: EngineLost | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what the engine's loading asks for: engine.RankGroup ------------------------------------------

    def start(self, plan: RankPlan) -> "Collective":
        """Start the ranks on this host, or wait for those of other hosts, and have them load."""
        self._started_s = time.monotonic()
        self._link = self._connect()
        collective = self._link.open_sums(
            GroupSizes(max_floats=plan.max_floats, max_gather_bytes=plan.max_gather_bytes), plan.timeout_s
        )
        for rank in range(1, self.ranks):
            self._link.send(rank, Frame(FrameKind.PLAN, plan.to_json()), timeout_s=START_TIMEOUT_S)
        return collective

    def lead(self, own: Rank, plan: RankPlan) -> Rank:
        """Wait until all ranks are loaded; what the engine gets runs on all of them.

        Raises:
            BadSetup: one could not load its part.
        """
        assert self._link is not None
        patience_s = START_TIMEOUT_S + LOAD_PATIENCE * (time.monotonic() - self._started_s)
        for rank in range(1, self.ranks):
            try:
                frame = self._link.receive(rank, timeout_s=patience_s)
            except EngineLost as lost:
                sentence = self._with_last_words(lost.message)
                raise BadSetup(f"while rank {rank} loaded its part of the model: {sentence}") from None
            if frame.kind is FrameKind.FAILED:
                raise BadSetup(f"rank {rank} could not load its part of the model: {_text(frame)}")
        self._led = True
        store = MirroredKv(own.store)
        return Rank(
            decoder=TensorParallelDecoder(own.decoder, self, self._link, store, plan),
            store=store,
            host_store=own.host_store,
        )

    # -- the end ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises EngineLost if a rank has failed before."""
        if self._lost is not None:
            raise EngineLost(self._lost.message)

    def fail(self, error: BaseException) -> EngineLost:
        """End all ranks, since one has failed; returns what is known of it, in a sentence."""
        if self._lost is None:
            sentence = (
                error.message if isinstance(error, ServingError) else f"{type(error).__name__}: {error}"
            )
            self._lost = EngineLost(
                f"{self._with_last_words(sentence)}; the model runs on {self.ranks} ranks and needs them all: "
                "start it again"
            )
            self._end(kill=True)
        return self._lost

    def close(self) -> None:
        """Stop all ranks, once the engine takes no more steps. It may be called again."""
        if self._link is not None and self._led:
            for rank in range(1, self.ranks):
                with suppress(EngineLost):
                    self._link.send(rank, Frame(FrameKind.STOP), timeout_s=STOP_TIMEOUT_S)
        self._end(kill=not self._led)
        self._lost = self._lost or EngineLost("the tensor-parallel group was closed")

    def _end(self, *, kill: bool) -> None:
        deadline_s = time.monotonic() + (0.0 if kill else STOP_TIMEOUT_S)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - time.monotonic()))
            process.kill()
            process.wait()
        self.processes.clear()
        if self._link is not None:
            self._link.close()
            self._link = None

    def _with_last_words(self, sentence: str) -> str:
        """A sentence about a rank, with what the rank said itself, or how its process ended."""
        named = re.search(r"\brank (\d+)", sentence)
        process = self.processes.get(int(named[1])) if named else None
        if named is None or process is None or self._link is None:
            return sentence
        with suppress(EngineLost):
            while True:
                frame = self._link.receive(int(named[1]), timeout_s=LAST_WORDS_S)
                if frame.kind is FrameKind.FAILED:
                    return f"{sentence} ({_text(frame)})"
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(LAST_WORDS_S)
            return f"{sentence} ({f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'})"
        return sentence

    def _connect(self) -> RankLink:
        address = self._options.address
        if address is None:
            return self._start_processes()
        return GlooLink(0, self.ranks, address, join_timeout_s=JOIN_TIMEOUT_S)

    def _start_processes(self) -> LocalLink:
        memory_fd = os.memfd_create("plait-tensor-parallel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        pairs = {rank: socket.socketpair() for rank in range(1, self.ranks)}
        link = LocalLink(0, self.ranks, {rank: own_end for rank, (own_end, _) in pairs.items()}, memory_fd)
        for rank, (_, other_end) in pairs.items():
            with other_end:
                arguments = [other_end.fileno(), memory_fd, rank, self.ranks]
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", "plait.worker.rank_process", *map(str, arguments)],
                    pass_fds=[other_end.fileno(), memory_fd],
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # a terminal's signals are for rank 0 alone
                )
        return link


class TensorParallelDecoder:
    """A decoder (engine.SpanDecoder) whose passes run on all ranks at once."""

    finds_best = True

    def __init__(
        self,
        own: SpanDecoder,
        group: TensorParallelGroup,
        link: RankLink,
        store: "MirroredKv",
        plan: RankPlan,
    ) -> None:
        self.spec = own.spec
        self.blocks = own.blocks
        self.best: Sequence[Sequence[tuple[int, float]]] = ()
        self.sent_bytes = 0
        """Bytes of step messages so far, to each of the other ranks."""
        self.received_bytes = 0
        """Bytes of results so far, from all of them."""
        self._own, self._group, self._link, self._store, self._plan = own, group, link, store, plan
        self._vocabularies = vocabularies(own.spec, plan.ranks)

    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: KvExtents,
        hidden: Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> Tensor:
        """As `NativeDecoder.forward`, for a whole model.

        Raises:
            EngineLost: a rank failed, now or before.
        """
        assert store is self._store and hidden is None and blocks is None
        self._group.check()
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        assert tokens <= self._plan.step_tokens, "the ranks have no room for such a sum"
        try:
            message = encode_step(Step(self._store.take_moves(), chunks))
            for rank in range(1, self._plan.ranks):
                self._link.send(rank, Frame(FrameKind.STEP, message), timeout_s=self._plan.timeout_s)
            self.sent_bytes += len(message)
            own_logits = self._own.forward(chunks, store)
            results = gather_results(
                self._link,
                chunks,
                self._vocabularies,
                own_logits,
                self._own.best,
                self._plan.max_gather_bytes,
            )
        except BaseException as error:
            # Whatever it was, the other ranks are in the middle of a step that rank 0 has left.
            lost = self._group.fail(error)
            if isinstance(error, Exception):
                raise lost from error
            raise
        self.best = results.best
        self.received_bytes += results.received_bytes
        return results.logits

    def non_finite(self) -> str:
        """Where rank 0's part of the latest pass first met a value that is not finite."""
        return self._own.non_finite()


class MirroredKv(KvExtents):
    """Rank 0's part of the KV memory, which notes what is moved so that all ranks move theirs alike."""

    def __init__(self, own: KvExtents) -> None:
        self.blocks, self.kv_blocks, self.block_tokens = own.blocks, own.kv_blocks, own.block_tokens
        self.extents = own.extents
        self._moves: list[Move] = []

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        super().copy_blocks(pairs)
        self._note("copy", pairs)

    def swap_out(self, pairs: Sequence[tuple[int, int]], host: KvExtents) -> None:
        super().swap_out(pairs, host)
        self._note("swap_out", pairs)

    def swap_in(self, pairs: Sequence[tuple[int, int]], host: KvExtents) -> None:
        super().swap_in(pairs, host)
        self._note("swap_in", pairs)

    def take_moves(self) -> list[Move]:
        """What was moved since the last call, in order."""
        moves, self._moves = self._moves, []
        return moves

    def _note(self, kind: MoveKind, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            self._moves.append(Move(kind, tuple(pairs)))


def _text(frame: Frame) -> str:
    return frame.body.decode(errors="replace")
