"""A model on one machine of a swarm: where its files are, how many blocks fit, what a loaded span is."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from plait.cluster import PeerRates
from plait.engine import EngineOptions, Wishes, open_checkpoint, resolve_model
from plait.errors import BadSetup
from plait.ids import PeerId
from plait.transport import Identity, MemoryNet, Network, SwarmSecret
from plait.wire import ModelTold
from plait.worker.measure import KeptRates
from plait.worker.span_source import SpanLimits, SpanSource, source_of_folder, source_of_swarm
from plait.worker.weight_exchange import WEIGHT_MESSAGES, WeightExchange

TINY = resolve_model("tiny")
OPTIONS = EngineOptions(folder=TINY, threads=1, packed_cache=False)
WISHES = Wishes(dtype="float32")
LIMITS = SpanLimits(memory_bytes=2**28, context_tokens=1024)


def source(tmp_path: Path, limits: SpanLimits = LIMITS) -> SpanSource:
    return source_of_folder("tiny", OPTIONS, WISHES, limits, kept_rates=KeptRates(tmp_path))


def ignore_progress(stage: str, done_bytes: int, total_bytes: int) -> None:
    pass


def test_more_memory_holds_more_blocks(tmp_path: Path) -> None:
    lengths = [
        source(tmp_path, replace(LIMITS, memory_bytes=megabytes << 20)).longest_span()
        for megabytes in (12, 16, 24, 32, 64)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == 6


def test_more_context_leaves_room_for_fewer_blocks(tmp_path: Path) -> None:
    memory = replace(LIMITS, memory_bytes=40 << 20)
    assert (
        source(tmp_path, replace(memory, context_tokens=8192)).longest_span()
        < source(tmp_path, replace(memory, context_tokens=512)).longest_span()
    )


def test_no_room_for_a_single_block_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="not even one block"):
        source(tmp_path, replace(LIMITS, memory_bytes=1 << 20)).longest_span()


def test_a_span_is_loaded_measured_once_and_serves(tmp_path: Path) -> None:
    async def run() -> PeerRates:
        made = source(tmp_path)
        loaded = await made.load(range(2, 4), list, ignore_progress)
        try:
            assert loaded.engine.blocks == range(2, 4)
            assert await loaded.run_step(lambda: 7) == 7
            assert loaded.engine.load().kv_total_tokens >= 1024
            assert made.known_rates() == loaded.rates
        finally:
            await loaded.close()
        return loaded.rates

    first = asyncio.run(run())
    assert first.decode_tokens_per_s > 0
    assert asyncio.run(run()) == first  # remembered, not measured again


@pytest.mark.parametrize("blocks", [range(1), range(3), range(3, 6)])
def test_a_span_holds_the_context_that_it_was_asked_for(tmp_path: Path, blocks: range) -> None:
    async def run() -> int:
        loaded = await source(tmp_path).load(blocks, list, ignore_progress)
        try:
            return loaded.engine.load().kv_total_tokens
        finally:
            await loaded.close()

    assert asyncio.run(run()) >= LIMITS.context_tokens


def test_a_span_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    made = source(tmp_path, replace(LIMITS, memory_bytes=8 << 20))
    with pytest.raises(BadSetup, match="more than the"):
        asyncio.run(made.load(range(6), list, ignore_progress))


def test_blocks_beyond_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="3:60 are asked for, and 'tiny' has 6"):
        asyncio.run(source(tmp_path).load(range(3, 60), list, ignore_progress))


def test_what_others_are_told_of_a_folder_is_its_name_alone(tmp_path: Path) -> None:
    made = source_of_folder(str(TINY), OPTIONS, WISHES, LIMITS, kept_rates=KeptRates(tmp_path))
    told = made.offer.told
    assert told.name == "tiny"
    assert (told.dtype, told.blocks, told.fingerprint) == ("float32", 6, open_checkpoint(TINY).fingerprint)
    assert "model.safetensors" in {file.name for file in told.files}


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    other = ModelTold(
        request=0,
        name="other",
        fingerprint="f" * 32,
        blocks=6,
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        files=(),
    )
    with pytest.raises(BadSetup, match="is not the 'other' that the swarm serves"):
        source_of_folder("tiny", OPTIONS, WISHES, LIMITS, told=other)


class TestOfSwarm:
    """The model of a swarm that another member describes."""

    def run(self, tmp_path: Path, name: str, weights: str, *, holds: bool = True) -> tuple[SpanSource, bool]:
        """The source, and whether its files came from the peer."""
        offer = source(tmp_path).offer
        told = ModelTold(
            **{**{f: getattr(offer.told, f) for f in offer.told.__struct_fields__}, "name": name}
        )

        async def work() -> tuple[SpanSource, bool]:
            net, secret = MemoryNet(), SwarmSecret.make()
            async with AsyncExitStack() as stack:
                exchanges: list[WeightExchange] = []
                networks: list[Network] = []
                for node in ("giver", "taker"):
                    network = Network(Identity.make(), secret=secret, carriers={"mem": net.carrier(node)})
                    exchange = WeightExchange(network)
                    network.route(WEIGHT_MESSAGES, exchange.on_message)
                    await stack.enter_async_context(network)
                    await stack.enter_async_context(exchange)
                    await network.listen(f"mem://{node}")
                    exchanges.append(exchange)
                    networks.append(network)
                if holds:
                    exchanges[0].offer = offer
                networks[1].learn(networks[0].peer, ["mem://giver"])
                holders: list[PeerId] = [networks[0].peer]
                made, filling = await source_of_swarm(
                    told,
                    exchanges[1],
                    lambda: holders,
                    OPTIONS,
                    Wishes(),
                    LIMITS,
                    weights=weights,  # type: ignore[arg-type]
                    root=tmp_path / "weights",
                    offline=True,
                    on_progress=ignore_progress,
                    kept_rates=KeptRates(tmp_path),
                )
                if filling is not None:
                    stack.callback(filling.__exit__)
                    loaded = await made.load(range(1, 3), lambda: holders, ignore_progress)
                    await loaded.close()
                return made, filling is not None

        return asyncio.run(work())

    def test_a_model_that_is_here_is_not_fetched(self, tmp_path: Path) -> None:
        made, fetched = self.run(tmp_path, "tiny", "auto")
        assert not fetched and made.checkpoint.folder == TINY
        assert made.options.dtype == "float32"  # as the swarm computes, not as this machine would

    def test_a_model_that_is_not_here_comes_from_peers(self, tmp_path: Path) -> None:
        made, fetched = self.run(tmp_path, "someone/small", "auto")
        assert fetched and made.checkpoint.folder != TINY
        assert made.model == open_checkpoint(TINY).fingerprint

    def test_from_the_cache_alone_it_does_not_come(self, tmp_path: Path) -> None:
        with pytest.raises(BadSetup, match="takes it from nowhere else"):
            self.run(tmp_path, "someone/small", "cache")

    def test_peers_that_have_nothing_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(BadSetup, match="no peer of the swarm gives"):
            self.run(tmp_path, "someone/small", "peers", holds=False)

    def test_then_the_hub_is_asked(self, tmp_path: Path) -> None:
        with pytest.raises(BadSetup, match="offline mode is on"):
            self.run(tmp_path, "someone/small", "auto", holds=False)
