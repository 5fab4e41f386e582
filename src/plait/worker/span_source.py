# pyright: standard
"""Where a machine's spans come from: the model's files, how many of its blocks fit, and engines that are loaded.

A span's engine has a thread of its own, which loads it, measures it and runs its steps: torch keeps some settings for
each thread. The files are a whole checkpoint of this machine, or a folder that peers' weights are fetched into.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from plait.cluster import PeerRates, format_blocks
from plait.engine import (
    Checkpoint,
    EngineOptions,
    SpanEngine,
    Wishes,
    available_memory_bytes,
    computing_format,
    decide_options,
    download_model,
    find_in_cache,
    load_span_engine,
    open_checkpoint,
    read_span_sizes,
    resolve_model,
    side_files,
    usable_cores,
)
from plait.errors import BadSetup
from plait.ids import PeerId
from plait.placement import BlockCost
from plait.units import format_bytes
from plait.wire import ModelFile, ModelTold
from plait.worker.engine_thread import EngineThread, RunStep
from plait.worker.lending import LendingLimits
from plait.worker.measure import KeptRates, MeasuredOn, measure_rates
from plait.worker.weight_exchange import OfferedModel, WeightExchange
from plait.worker.weight_folder import HeldFiles, WeightFolder

log = logging.getLogger(__name__)

WeightSource = Literal["auto", "cache", "peers", "hub"]
MEMORY_FRACTION = 0.8
"""Of what is free, where nobody said how much memory a span may take."""


class StageProgress(Protocol):
    """Told what is going on, bytes done and bytes in total (0: not known)."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSpan:
    """A span that is ready to serve; `run_step` runs its engine's steps, `close` ends what runs them."""

    engine: SpanEngine
    rates: PeerRates
    run_step: RunStep
    close: Callable[[], Awaitable[None]]
    lending: LendingLimits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLimits:
    """How much a span may take: memory for weights and cache, None for most of what is free; and context to keep.

    `lending`: how KV memory of it is lent and other borrowed, None for not at all.
    """

    memory_bytes: int | None
    context_tokens: int
    kv_cache_bytes: int | None = None
    lending: LendingLimits | None = None


class SpanSource:
    """One model on one machine, as far as its swarm is concerned; see `of_folder` and `of_peers`."""

    def __init__(
        self,
        *,
        name: str,
        checkpoint: Checkpoint,
        options: EngineOptions,
        limits: SpanLimits,
        filling: WeightFolder | None = None,
        exchange: WeightExchange | None = None,
        kept_rates: KeptRates | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.weight_format, self.kv_format = computing_format(options, checkpoint.spec)
        self.memory_bytes = limits.memory_bytes or int(MEMORY_FRACTION * available_memory_bytes())
        self._name = name
        self._limits = limits
        self._sizes = read_span_sizes(checkpoint, options)
        self._filling = filling
        self._exchange = exchange
        self._kept_rates = kept_rates or KeptRates()

    @property
    def model(self) -> str:
        """The model's fingerprint."""
        return self.checkpoint.fingerprint

    @property
    def model_blocks(self) -> int:
        return len(self.checkpoint.spec.blocks)

    @property
    def hidden_bytes(self) -> int:
        """What one token's hidden state takes on a link, uncompressed."""
        return 4 * self.checkpoint.spec.hidden

    @property
    def offer(self) -> OfferedModel:
        """What other members are told of the model, and given."""
        if self._filling is None:
            held = HeldFiles.of_checkpoint(self.checkpoint, side_files(self.checkpoint.folder))
        else:
            held = HeldFiles.of_folder(self._filling)
        told = ModelTold(
            request=0,
            name=self._name,
            fingerprint=self.model,
            blocks=self.model_blocks,
            dtype=self.options.dtype,
            quantization=self.options.quantization,
            kv_cache_dtype=self.options.kv_cache_dtype,
            files=tuple(ModelFile(name, size_bytes) for name, size_bytes in held.files.items()),
        )
        return OfferedModel(told=told, files=held)

    @property
    def measured_on(self) -> MeasuredOn:
        """What this machine's rates depend on."""
        return MeasuredOn(
            model=self.model,
            weight_format=self.weight_format,
            kv_format=self.kv_format,
            device=self.options.device,
            threads=self.options.threads or usable_cores(),
        )

    def known_rates(self) -> PeerRates:
        """Rates of an earlier start, unknown if there was none."""
        return self._kept_rates.find(self.measured_on) or PeerRates()

    def block_cost(self) -> BlockCost:
        """What the largest block takes."""
        return BlockCost(
            weight_bytes=max(self._sizes.block_bytes),
            kv_bytes_per_token=math.ceil(max(self._sizes.kv_bytes_per_token)),
        )

    @property
    def context_tokens(self) -> int:
        """The context, over all sessions, that a machine is to have room for when it chooses how much to serve."""
        return self._limits.context_tokens

    def longest_span(self) -> int:
        """How many blocks fit, wherever they begin.

        Raises:
            BadSetup: not one.
        """
        memory_bytes, context_tokens = self.memory_bytes, self._limits.context_tokens
        if self._limits.kv_cache_bytes is not None:
            memory_bytes, context_tokens = memory_bytes - self._limits.kv_cache_bytes, 0
        return self._sizes.longest_span(memory_bytes, context_tokens)

    async def load(
        self, blocks: range, holders: Callable[[], Sequence[PeerId]], on_progress: StageProgress
    ) -> LoadedSpan:
        """Fetch what is missing of a span from `holders`, load it and measure it.

        Raises:
            BadSetup: it does not fit, its weights cannot be had, or the model has no such blocks.
        """
        if blocks.stop > self.model_blocks:
            raise BadSetup(
                f"blocks {format_blocks(blocks)} are asked for, and {self._name!r} has {self.model_blocks}; choose "
                "others with --blocks"
            )
        weights_bytes = self._sizes.weight_bytes(blocks)
        kv_bytes = self._limits.kv_cache_bytes or self._sizes.kv_bytes(blocks, self._limits.context_tokens)
        if weights_bytes + kv_bytes > self.memory_bytes:
            raise BadSetup(
                f"blocks {format_blocks(blocks)} need {format_bytes(weights_bytes)} and {format_bytes(kv_bytes)} for "
                f"their cache, more than the {format_bytes(self.memory_bytes)} of memory that they may take; choose "
                "fewer with --blocks, raise --memory, or lower --set swarm.context_tokens"
            )
        if self._filling is not None and self._exchange is not None:
            await self._exchange.fetch(
                self._filling,
                blocks,
                holders,
                lambda done, total: on_progress("fetching weights", done, total),
            )
        options = replace(self.options, kv_cache_bytes=kv_bytes)
        lending = self._limits.lending
        if lending is not None:
            borrowable_blocks = lending.borrow_tokens // options.block_tokens
            options = replace(options, limits=replace(options.limits, borrowable_blocks=borrowable_blocks))
        async with AsyncExitStack() as stack:
            thread = await stack.enter_async_context(EngineThread())
            engine, rates = await thread.run(lambda: self._load_and_measure(options, blocks, on_progress))
            stopping = stack.pop_all()
        return LoadedSpan(
            engine=engine, rates=rates, run_step=thread.run, close=stopping.aclose, lending=lending
        )

    def _load_and_measure(
        self, options: EngineOptions, blocks: range, on_progress: StageProgress
    ) -> tuple[SpanEngine, PeerRates]:
        lending = self._limits.lending
        engine = load_span_engine(
            options,
            blocks,
            on_progress=lambda done, total: on_progress("reading weights", done, total),
            loan_terms=None if lending is None else lending.terms(0),
        )
        if lending is not None and engine.loans is not None:
            engine.loans.book.terms = lending.terms(engine.store.kv_blocks)
        rates = self._kept_rates.find(self.measured_on)
        if rates is None:
            on_progress("measuring", 0, 0)
            rates = measure_rates(engine.decoder, engine.store, step_tokens=options.limits.step_tokens)
            self._kept_rates.keep(self.measured_on, rates)
        return engine, rates


def source_of_folder(
    name: str,
    options: EngineOptions,
    wishes: Wishes,
    limits: SpanLimits,
    *,
    told: ModelTold | None = None,
    kept_rates: KeptRates | None = None,
) -> SpanSource:
    """A model whose files are all in `options.folder`; `told` is what the swarm serves, if there is one already.

    Raises:
        BadSetup: model, machine and wishes do not fit together, or the swarm serves another model.
    """
    checkpoint = open_checkpoint(options.folder)
    if told is not None:
        _check_model(checkpoint, told)
        wishes = _with_formats(wishes, told)
    return SpanSource(
        name=_shown_name(name),
        checkpoint=checkpoint,
        options=decide_options(options, replace(wishes, kv_cache_bytes=1)),
        limits=limits,
        kept_rates=kept_rates,
    )


async def source_of_swarm(
    told: ModelTold,
    exchange: WeightExchange,
    holders: Callable[[], Sequence[PeerId]],
    options: EngineOptions,
    wishes: Wishes,
    limits: SpanLimits,
    *,
    weights: WeightSource = "auto",
    root: Path,
    offline: bool = False,
    on_progress: StageProgress,
    kept_rates: KeptRates | None = None,
) -> tuple[SpanSource, WeightFolder | None]:
    """The model that a swarm serves, in the formats in which it does unless `wishes` say otherwise.

    Its files are those of this machine if they are here (`tiny`, the Hugging Face cache), else a folder in `root` into
    which peers' weights come, else the hub's. The folder, if there is one, is entered; the caller leaves it.

    Raises:
        BadSetup: the files cannot be had, or model, machine and wishes do not fit together.
    """
    wishes = _with_formats(wishes, told)
    folder = await asyncio.to_thread(_local_folder, told)
    if folder is None and weights == "cache":
        raise BadSetup(
            f"the swarm's model {told.name!r} is not on this machine, and --weights cache takes it from nowhere else"
        )
    filling: WeightFolder | None = None
    if folder is None and weights in ("auto", "peers"):
        filling = WeightFolder(root, told.fingerprint, {file.name: file.size_bytes for file in told.files})
        filling.__enter__()
        try:
            on_progress("asking for the model", 0, 0)
            await exchange.fetch_description(filling, holders)
            folder = filling.path
        except BadSetup as error:
            filling.__exit__()
            filling = None
            if weights == "peers":
                raise
            log.warning("peers do not give the model, so the hub is asked: %s", error.message)
        except BaseException:
            filling.__exit__()
            raise
    if folder is None:
        folder = await asyncio.to_thread(
            download_model,
            told.name,
            offline=offline,
            on_progress=lambda done, total: on_progress("downloading", done, total),
        )
    try:
        checkpoint = await asyncio.to_thread(open_checkpoint, folder)
        _check_model(checkpoint, told)
        options = replace(options, folder=folder)
        source = SpanSource(
            name=told.name,
            checkpoint=checkpoint,
            options=await asyncio.to_thread(decide_options, options, replace(wishes, kv_cache_bytes=1)),
            limits=limits,
            filling=filling,
            exchange=exchange,
            kept_rates=kept_rates,
        )
    except BaseException:
        if filling is not None:
            filling.__exit__()
        raise
    return source, filling


def _check_model(checkpoint: Checkpoint, told: ModelTold) -> None:
    if checkpoint.fingerprint != told.fingerprint:
        raise BadSetup(
            f"{str(checkpoint.folder)!r} is not the {told.name!r} that the swarm serves, or another version of it; "
            "--weights peers takes the swarm's"
        )


def _local_folder(told: ModelTold) -> Path | None:
    """A whole checkpoint of this machine that is the swarm's."""
    found = resolve_model("tiny") if told.name == "tiny" else find_in_cache(told.name)
    if found is None or open_checkpoint(found).fingerprint != told.fingerprint:
        return None
    return found


def _with_formats(wishes: Wishes, told: ModelTold) -> Wishes:
    """The swarm's formats where nothing else was asked for: other formats give other tokens."""
    # A cache is of the arithmetic's type unless it is int8.
    kv_cache_dtype = "int8" if told.kv_cache_dtype == "int8" else "auto"
    return replace(
        wishes,
        dtype=told.dtype if wishes.dtype == "auto" else wishes.dtype,
        quantization=told.quantization if wishes.quantization == "none" else wishes.quantization,
        kv_cache_dtype=kv_cache_dtype if wishes.kv_cache_dtype == "auto" else wishes.kv_cache_dtype,
    )


def _shown_name(name: str) -> str:
    """What others are told: the last part of a folder's path, or the repository id."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
