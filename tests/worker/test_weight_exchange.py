"""Weights from member to member: what arrives is the model, wherever it came from, and nothing else is kept."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch

from plait.engine import (
    PARTIAL_MARKER,
    Checkpoint,
    EngineOptions,
    load_span_engine,
    open_checkpoint,
    resolve_model,
    side_files,
)
from plait.errors import BadSetup, EngineFailure
from plait.ids import PeerId
from plait.transport import Identity, MemoryNet, Network, SwarmSecret
from plait.wire import PIECE_BYTES, BytesAsk, HashesAsk, ModelTold
from plait.worker.weight_exchange import WEIGHT_MESSAGES, OfferedModel, WeightExchange
from plait.worker.weight_folder import HeldFiles, WeightFolder, span_pieces

TINY = resolve_model("tiny")
CHECKPOINT = open_checkpoint(TINY)


def told(checkpoint: Checkpoint = CHECKPOINT) -> ModelTold:
    return ModelTold(
        request=0,
        name="tiny",
        fingerprint=checkpoint.fingerprint,
        blocks=len(checkpoint.spec.blocks),
        dtype="float32",
        quantization="none",
        kv_cache_dtype="auto",
        files=(),
    )


def whole(checkpoint: Checkpoint = CHECKPOINT) -> OfferedModel:
    files = HeldFiles.of_checkpoint(checkpoint, side_files(checkpoint.folder))
    return OfferedModel(told=told(checkpoint), files=files)


class Members:
    """Members of one swarm in memory, each with its exchange."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._net = MemoryNet()
        self._secret = SwarmSecret.make()
        self.networks: list[Network] = []

    async def add(self, offer: OfferedModel | None) -> tuple[PeerId, WeightExchange]:
        name = f"member-{len(self.networks)}"
        network = Network(Identity.make(), secret=self._secret, carriers={"mem": self._net.carrier(name)})
        exchange = WeightExchange(network)
        exchange.offer = offer
        network.route(WEIGHT_MESSAGES, exchange.on_message)
        network.on_lost = exchange.on_lost
        await self._stack.enter_async_context(network)
        await self._stack.enter_async_context(exchange)
        await network.listen(f"mem://{name}")
        for number, other in enumerate(self.networks):
            network.learn(other.peer, [f"mem://member-{number}"])
        self.networks.append(network)
        return network.peer, exchange


@asynccontextmanager
async def members() -> AsyncGenerator[Members]:
    async with AsyncExitStack() as stack:
        yield Members(stack)


def folder_for(root: Path, offer: OfferedModel) -> WeightFolder:
    return WeightFolder(root, CHECKPOINT.fingerprint, offer.files.files)


def damaged(tmp_path: Path, offset_bytes: int) -> OfferedModel:
    """A copy of tiny with one byte changed, which calls itself tiny."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in TINY.iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[offset_bytes] ^= 1
        (folder / file.name).write_bytes(data)
    return whole(open_checkpoint(folder))


def test_a_span_comes_from_a_peer_and_is_the_same(tmp_path: Path) -> None:
    async def run() -> None:
        async with members() as swarm:
            giver, _ = await swarm.add(whole())
            _, taker = await swarm.add(None)
            assert (await taker.ask_model(giver)).fingerprint == CHECKPOINT.fingerprint
            seen: list[tuple[int, int]] = []
            with folder_for(tmp_path, whole()) as folder:
                progress = lambda done, total: seen.append((done, total))  # noqa: E731
                await taker.fetch(folder, range(1, 3), lambda: [giver], progress)
                assert seen[-1][0] == seen[-1][1] > 0
                assert [done for done, _ in seen] == sorted(done for done, _ in seen)
                options = EngineOptions(folder=folder.path, kv_cache_bytes=2**22, threads=1)
                assert load_span_engine(options, range(1, 3)).blocks == range(1, 3)
                there = open_checkpoint(folder.path)
                assert there.fingerprint == CHECKPOINT.fingerprint
                for piece in span_pieces(CHECKPOINT, range(1, 3)):
                    assert piece_of(folder.path, piece) == piece_of(TINY, piece)

    asyncio.run(run())


def piece_of(folder: Path, piece: tuple[str, int]) -> bytes:
    with (folder / piece[0]).open("rb") as file:
        file.seek(piece[1] * PIECE_BYTES)
        return file.read(PIECE_BYTES)


def test_what_has_come_is_not_fetched_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with members() as swarm:
            giver, _ = await swarm.add(whole())
            _, taker = await swarm.add(None)
            with folder_for(tmp_path, whole()) as folder:
                await taker.fetch(folder, range(6), lambda: [giver])
            with folder_for(tmp_path, whole()) as folder:
                assert not folder.lacks(span_pieces(CHECKPOINT, range(6)))
                await taker.fetch(folder, range(6), list)  # nobody is needed
                assert torch.equal(
                    *(torch.tensor(list(piece_of(f, ("config.json", 0)))) for f in (folder.path, TINY))
                )

    asyncio.run(run())


def test_a_second_process_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    with folder_for(tmp_path, whole()) as first, folder_for(tmp_path, whole()) as second:
        assert first.path != second.path
    with folder_for(tmp_path, whole()) as again:
        assert again.path == first.path


def test_a_partial_folder_is_not_taken_for_a_model(tmp_path: Path) -> None:
    with folder_for(tmp_path, whole()) as folder:
        assert (folder.path / PARTIAL_MARKER).is_file()
        with pytest.raises(BadSetup, match="holds only the weights"):
            resolve_model(str(folder.path))


def test_a_damaged_note_begins_anew(tmp_path: Path) -> None:
    with folder_for(tmp_path, whole()) as folder:
        folder.write(("config.json", 0), memoryview((TINY / "config.json").read_bytes()))
        folder.note()
        path = folder.path
    (path / PARTIAL_MARKER).write_text("{}")
    with folder_for(tmp_path, whole()) as folder:
        assert not folder.holds(("config.json", 0))


def test_a_peer_that_holds_other_bytes_than_most_is_not_believed(tmp_path: Path) -> None:
    async def run() -> None:
        async with members() as swarm:
            liar, _ = await swarm.add(damaged(tmp_path, offset_bytes=PIECE_BYTES + 5))
            others = [(await swarm.add(whole()))[0] for _ in range(2)]
            _, taker = await swarm.add(None)
            with folder_for(tmp_path, whole()) as folder:
                await taker.fetch(folder, range(6), lambda: [liar, *others])
                for piece in span_pieces(CHECKPOINT, range(6)):
                    assert piece_of(folder.path, piece) == piece_of(TINY, piece)

    asyncio.run(run())


def test_bytes_that_are_not_what_they_hash_to_are_not_kept(tmp_path: Path) -> None:
    async def run() -> None:
        async with members() as swarm:
            offer = damaged(tmp_path, offset_bytes=PIECE_BYTES + 5)
            liar, exchange = await swarm.add(offer)
            giver, _ = await swarm.add(whole())
            _, taker = await swarm.add(None)
            # It says what the others say, and sends something else.
            exchange._hash_pieces(whole().files, "model.safetensors", 0, 3)  # pyright: ignore[reportPrivateUsage]
            with folder_for(tmp_path, whole()) as folder:
                await taker.fetch(folder, range(6), lambda: [liar, giver])
                for piece in span_pieces(CHECKPOINT, range(6)):
                    assert piece_of(folder.path, piece) == piece_of(TINY, piece)

    asyncio.run(run())


def test_a_member_gives_on_what_it_has_got(tmp_path: Path) -> None:
    async def run() -> None:
        async with members() as swarm:
            giver, _ = await swarm.add(whole())
            middle, relay = await swarm.add(None)
            _, taker = await swarm.add(None)
            with folder_for(tmp_path / "a", whole()) as first, folder_for(tmp_path / "b", whole()) as second:
                relay.offer = OfferedModel(told=told(), files=HeldFiles.of_folder(first))
                with pytest.raises(BadSetup, match="no peer of the swarm gives"):
                    await taker.fetch(second, range(1), lambda: [middle])
                await relay.fetch(first, range(1), lambda: [giver])
                await taker.fetch(second, range(1), lambda: [middle])
                assert not second.lacks(span_pieces(CHECKPOINT, range(1)))

    asyncio.run(run())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with members() as swarm:
            giver, _ = await swarm.add(whole())
            _, taker = await swarm.add(None)
            other = WeightFolder(tmp_path, "0" * 32, whole().files.files)
            with other as folder, pytest.raises(BadSetup, match="not the model they named"):
                await taker.fetch(folder, range(1), lambda: [giver])

    asyncio.run(run())


@pytest.mark.parametrize("name", ["../secret", ".hidden", "a/b", "", PARTIAL_MARKER])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadSetup, match="no name of a model's file"):
        WeightFolder(tmp_path, "0" * 32, {name: 1})


def test_only_the_files_of_the_model_are_given() -> None:
    async def run() -> None:
        async with members() as swarm:
            giver, _ = await swarm.add(whole())
            _, taker = await swarm.add(None)
            ask = taker._ask  # pyright: ignore[reportPrivateUsage]
            from plait.wire import BytesTold, HashesTold

            for file, offset in (
                ("setup.py", 0),
                ("config.json", 10**9),
                ("model.safetensors", PIECE_BYTES - 1),
            ):
                with pytest.raises(EngineFailure, match="is not here"):
                    await ask(giver, BytesAsk(1, file, offset, 2), BytesTold)
            hashes, _ = await ask(giver, HashesAsk(2, "setup.py", 0, 1), HashesTold)
            assert hashes.sha256 == (b"",)

    asyncio.run(run())
