"""Weights from the members that have them: asks for what this one lacks, answers what others lack.

Every piece is verified by its SHA-256, and where several members hold it, by what most of them say it is. Whoever
sends other bytes, or says that they are others, is asked no more. What has come is on the disk and noted there, so a
member that is stopped goes on where it was.
"""

import asyncio
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, get_args

import msgspec

from plait.engine import Checkpoint, open_checkpoint
from plait.errors import BadSetup, EngineFailure, PeerLost, ServingError
from plait.ids import PeerId
from plait.units import format_bytes
from plait.wire import (
    MAX_ASKED_HASHES,
    MAX_PART_BYTES,
    PIECE_BYTES,
    Buffer,
    BytesAsk,
    BytesTold,
    HashesAsk,
    HashesTold,
    Message,
    ModelAsk,
    ModelTold,
    WeightAnswer,
    WeightMessage,
    WeightsRefused,
)
from plait.worker.weight_folder import HeldFiles, Piece, WeightFolder, span_pieces

log = logging.getLogger(__name__)

ANSWER_S = 30.0
"""How long an answer may take: hashes of 256 MiB from a slow disk, or a part behind a slow link."""
PARTS_IN_FLIGHT = 4
MAX_HOLDERS = 4
# Pieces whose hashes are asked for and which are then fetched, before the next.
BATCH_PIECES = MAX_ASKED_HASHES
# Questions of one member that are answered at the same time; more are refused.
MAX_OPEN_ANSWERS = 16
NOTE_S = 2.0

WEIGHT_MESSAGES: tuple[type, ...] = get_args(WeightMessage)
"""What `Network.route` is to send here."""

Progress = Callable[[int, int], None]
_Told = TypeVar("_Told", bound=WeightAnswer)


class Messenger(Protocol):
    """What the exchange needs of a network."""

    async def send(self, peer: PeerId, message: Message, tensors: Sequence[Buffer] = ()) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedModel:
    """The model that this member can describe to others, and its files; see `ModelTold`."""

    told: ModelTold
    files: HeldFiles


@dataclass(slots=True)
class _Batch:
    """Pieces on their way: what is to be fetched, what each must hash to, and who has it."""

    todo: deque[Piece]
    sha256: Mapping[Piece, bytes]
    holders: Mapping[Piece, frozenset[PeerId]]
    in_flight: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, peer: PeerId) -> Piece | None:
        """The next piece that a peer has."""
        for piece in self.todo:
            if peer in self.holders[piece]:
                self.todo.remove(piece)
                self.in_flight += 1
                return piece
        return None

    def end(self, piece: Piece, *, came: bool) -> None:
        self.in_flight -= 1
        if not came:
            self.todo.appendleft(piece)
        self.changed.set()


class WeightExchange:
    """Both sides of the exchange over one network; enter it to answer, hand it the messages that come."""

    def __init__(self, network: Messenger) -> None:
        self.offer: OfferedModel | None = None
        self._network = network
        self._next_request = 1
        self._waiting: dict[
            int, tuple[PeerId, asyncio.Future[tuple[WeightAnswer, Sequence[memoryview]]]]
        ] = {}
        self._answering: dict[PeerId, int] = {}
        self._hashes: dict[Piece, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "WeightExchange":
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what comes ------------------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        """Take one of `WEIGHT_MESSAGES`; must not be called before this is entered."""
        match message:
            case ModelAsk() | HashesAsk() | BytesAsk():
                if self._answering.get(peer, 0) >= MAX_OPEN_ANSWERS:
                    busy = f"{MAX_OPEN_ANSWERS} questions are open already"
                    self._spawn(self._send(peer, WeightsRefused(message.request, busy)))
                    return
                self._answering[peer] = self._answering.get(peer, 0) + 1
                self._spawn(self._answer(peer, message))
            case ModelTold() | HashesTold() | BytesTold() | WeightsRefused():
                asked, future = self._waiting.get(message.request, (None, None))
                if asked == peer and future is not None and not future.done():
                    future.set_result((message, tensors))
            case _:
                raise AssertionError("not a message about weights")

    def on_lost(self, peer: PeerId, reason: str) -> None:
        """A peer is gone: what was asked of it will not come."""
        self._answering.pop(peer, None)
        for asked, future in self._waiting.values():
            if asked == peer and not future.done():
                future.set_exception(PeerLost(f"{peer[:8]} is gone: {reason}"))

    # -- asking ----------------------------------------------------------------------------------------

    async def ask_model(self, peer: PeerId) -> ModelTold:
        """Which model a member serves.

        Raises:
            PeerLost: no answer.
            EngineFailure: it does not know itself yet.
        """
        told, _ = await self._ask(peer, ModelAsk(self._request()), ModelTold)
        return told

    async def fetch_description(
        self, folder: WeightFolder, holders: Callable[[], Sequence[PeerId]]
    ) -> Checkpoint:
        """Bring all but the tensors into the folder: configuration, tokenizer, headers; `holders` says whom to ask now.

        Raises:
            BadSetup: nobody has a piece, or what came is not the model of the folder's fingerprint.
        """
        need = [*folder.side_pieces(), *folder.first_pieces()]
        await self._fetch_pieces(folder, need, holders, None)
        heads = await asyncio.to_thread(folder.header_pieces)
        await self._fetch_pieces(folder, heads, holders, None)
        checkpoint = await asyncio.to_thread(open_checkpoint, folder.path)
        if checkpoint.fingerprint != folder.fingerprint:
            raise BadSetup(
                f"what peers sent is not the model they named: its fingerprint is {checkpoint.fingerprint}, not "
                f"{folder.fingerprint}"
            )
        return checkpoint

    async def fetch(
        self,
        folder: WeightFolder,
        blocks: range,
        holders: Callable[[], Sequence[PeerId]],
        on_progress: Progress | None = None,
    ) -> None:
        """Bring all that `blocks` need into the folder; `on_progress` is told bytes there and bytes needed.

        Raises:
            BadSetup: as for `fetch_description`.
        """
        checkpoint = await self.fetch_description(folder, holders)
        pieces = await asyncio.to_thread(span_pieces, checkpoint, blocks)
        await self._fetch_pieces(folder, pieces, holders, on_progress)

    async def _fetch_pieces(
        self,
        folder: WeightFolder,
        pieces: Sequence[Piece],
        holders: Callable[[], Sequence[PeerId]],
        on_progress: Progress | None,
    ) -> None:
        pieces = tuple(dict.fromkeys(pieces))
        total_bytes = sum(map(folder.piece_bytes, pieces))
        done_bytes = total_bytes - sum(map(folder.piece_bytes, folder.lacks(pieces)))
        loop = asyncio.get_running_loop()
        noted_s = loop.time()

        def came(piece: Piece) -> None:
            nonlocal done_bytes
            done_bytes += folder.piece_bytes(piece)
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)

        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
        refused: set[PeerId] = set()
        try:
            while lacking := folder.lacks(pieces)[:BATCH_PIECES]:
                await self._fetch_batch(folder, lacking, holders, refused, came)
                if loop.time() - noted_s > NOTE_S:
                    noted_s = loop.time()
                    await asyncio.to_thread(folder.note)
        finally:
            folder.note()

    async def _fetch_batch(
        self,
        folder: WeightFolder,
        pieces: Sequence[Piece],
        holders: Callable[[], Sequence[PeerId]],
        refused: set[PeerId],
        came: Callable[[Piece], None],
    ) -> None:
        """Fetch some pieces, or at least one of them.

        Raises:
            BadSetup: not even one came.
        """
        asked = [peer for peer in holders() if peer not in refused][:MAX_HOLDERS]
        problems: list[str] = []
        said = await asyncio.gather(*(self._hashes_of(peer, pieces, problems) for peer in asked))
        batch = _agreed(pieces, dict(zip(asked, said, strict=True)), refused)
        before = len(batch.todo)

        async def work(peer: PeerId) -> None:
            while batch.todo or batch.in_flight:
                piece = batch.take(peer)
                if piece is None:
                    if not batch.in_flight:
                        return
                    batch.changed.clear()
                    await batch.changed.wait()  # another's piece may come back to be fetched from here
                    continue
                fetched = False
                try:
                    data = await self._fetch_piece(peer, folder, piece)
                    if hashlib.sha256(data).digest() != batch.sha256[piece]:
                        raise EngineFailure("it sent other bytes than it said")
                    await asyncio.to_thread(folder.write, piece, data)
                    fetched = True
                    came(piece)
                except ServingError as error:
                    log.warning(
                        "no more weights are asked of a peer: peer=%s reason=%r", peer[:8], error.message
                    )
                    problems.append(f"{peer[:8]}: {error.message}")
                    refused.add(peer)
                    return
                finally:
                    batch.end(piece, came=fetched)

        async with asyncio.TaskGroup() as group:
            for peer in asked:
                if peer not in refused:
                    group.create_task(work(peer))
        if before == 0 or len(batch.todo) == before:
            file, number = pieces[0]
            raise BadSetup(
                f"no peer of the swarm gives bytes {format_bytes(number * PIECE_BYTES)} on of {file!r} "
                f"({len(asked)} asked{'; ' if problems else ''}{'; '.join(problems[:3])})"
            )

    async def _hashes_of(
        self, peer: PeerId, pieces: Sequence[Piece], problems: list[str]
    ) -> Mapping[Piece, bytes]:
        """What a peer says that pieces hash to; without those it does not have."""
        said: dict[Piece, bytes] = {}
        try:
            for file, first, count in _runs(pieces):
                ask = HashesAsk(self._request(), file, first, count)
                told, _ = await self._ask(peer, ask, HashesTold)
                if len(told.sha256) != count:
                    raise EngineFailure(f"it told {len(told.sha256)} hashes of {count}")
                said |= {(file, first + at): hash for at, hash in enumerate(told.sha256) if len(hash) == 32}
        except ServingError as error:
            problems.append(f"{peer[:8]}: {error.message}")
        return said

    async def _fetch_piece(self, peer: PeerId, folder: WeightFolder, piece: Piece) -> memoryview:
        file, number = piece
        size_bytes = folder.piece_bytes(piece)
        data = bytearray(size_bytes)
        turn = asyncio.Semaphore(PARTS_IN_FLIGHT)

        async def part(start: int) -> None:
            count = min(MAX_PART_BYTES, size_bytes - start)
            async with turn:
                ask = BytesAsk(self._request(), file, number * PIECE_BYTES + start, count)
                _, tensors = await self._ask(peer, ask, BytesTold)
            if len(tensors) != 1 or tensors[0].nbytes != count:
                raise EngineFailure(f"it sent other than the {count} bytes that were asked for")
            data[start : start + count] = tensors[0]

        try:
            async with asyncio.TaskGroup() as group:
                for start in range(0, size_bytes, MAX_PART_BYTES):
                    group.create_task(part(start))
        except* ServingError as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            assert isinstance(first, ServingError)
            raise first from None
        return memoryview(data)

    async def _ask(
        self, peer: PeerId, ask: ModelAsk | HashesAsk | BytesAsk, answer: type[_Told]
    ) -> tuple[_Told, Sequence[memoryview]]:
        future: asyncio.Future[tuple[WeightAnswer, Sequence[memoryview]]]
        future = asyncio.get_running_loop().create_future()
        self._waiting[ask.request] = (peer, future)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._network.send(peer, ask)
                told, tensors = await future
        except TimeoutError:
            raise PeerLost(f"no answer within {ANSWER_S:g} s") from None
        finally:
            del self._waiting[ask.request]
        if isinstance(told, WeightsRefused):
            raise EngineFailure(told.reason)
        if not isinstance(told, answer):
            raise EngineFailure("it answered another question")
        return told, tensors

    def _request(self) -> int:
        self._next_request += 1
        return self._next_request

    # -- answering -------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, ask: ModelAsk | HashesAsk | BytesAsk) -> None:
        try:
            if self.offer is None:
                await self._send(peer, WeightsRefused(ask.request, "this member knows no model yet"))
                return
            files = self.offer.files
            match ask:
                case ModelAsk(request):
                    told = self.offer.told
                    await self._send(peer, msgspec.structs.replace(told, request=request))
                case HashesAsk(request, file, first, count):
                    hashes = await asyncio.to_thread(self._hash_pieces, files, file, first, count)
                    await self._send(peer, HashesTold(request, hashes))
                case BytesAsk(request, file, offset_bytes, size_bytes):
                    piece = (file, offset_bytes // PIECE_BYTES)
                    inside = (offset_bytes + size_bytes - 1) // PIECE_BYTES == piece[1]
                    if not (inside and files.has(piece)):
                        await self._send(peer, WeightsRefused(request, f"{file!r} is not here at that place"))
                        return
                    data = await asyncio.to_thread(files.read, file, offset_bytes, size_bytes)
                    await self._send(peer, BytesTold(request), (data,))
        except OSError as error:
            log.warning("a file of the model cannot be read: %s", error)
            await self._send(peer, WeightsRefused(ask.request, "its disk failed"))
        finally:
            left = self._answering.get(peer, 0) - 1
            if left > 0:
                self._answering[peer] = left
            else:
                self._answering.pop(peer, None)

    def _hash_pieces(self, files: HeldFiles, file: str, first: int, count: int) -> tuple[bytes, ...]:
        hashes: list[bytes] = []
        for number in range(first, first + count):
            piece = (file, number)
            if not files.has(piece):
                hashes.append(b"")
                continue
            if piece not in self._hashes:
                data = files.read(file, number * PIECE_BYTES, PIECE_BYTES)
                self._hashes[piece] = hashlib.sha256(data).digest()
            hashes.append(self._hashes[piece])
        return tuple(hashes)

    async def _send(self, peer: PeerId, message: WeightAnswer, tensors: Sequence[Buffer] = ()) -> None:
        with suppress(PeerLost):  # it asks somebody else, or is gone
            await self._network.send(peer, message, tensors)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _agreed(
    pieces: Sequence[Piece], said: Mapping[PeerId, Mapping[Piece, bytes]], refused: set[PeerId]
) -> _Batch:
    """What most of the holders of a piece say it hashes to, the first of them if they are even; others are refused."""
    sha256: dict[Piece, bytes] = {}
    for piece in pieces:
        votes = Counter(hashes[piece] for hashes in said.values() if piece in hashes)
        if votes:
            sha256[piece] = votes.most_common(1)[0][0]
    for peer, hashes in said.items():
        wrong = next((piece for piece, hash in hashes.items() if sha256[piece] != hash), None)
        if wrong is not None:
            log.warning("a peer holds other bytes than most: peer=%s file=%r piece=%d", peer[:8], *wrong)
            refused.add(peer)
    holders = {
        piece: frozenset(peer for peer, hashes in said.items() if peer not in refused and piece in hashes)
        for piece in sha256
    }
    todo = deque(piece for piece in pieces if holders.get(piece))
    return _Batch(todo=todo, sha256=sha256, holders=holders)


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[str, int, int]]:
    """Consecutive pieces as (file, first, count), none longer than one question may be."""
    start = 0
    for end in range(1, len(pieces) + 1):
        file, first = pieces[start]
        count = end - start
        if end == len(pieces) or pieces[end] != (file, first + count) or count == MAX_ASKED_HASHES:
            yield file, first, count
            start = end
