# pyright: standard
"""`plait profile`: load a model, measure it, and put a profile together."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from plait.costs import (
    NO_OVERHEAD,
    PROFILE_FORMAT,
    PROFILE_VERSION,
    CostModel,
    LiveFactors,
    Profile,
    ProfiledModel,
    SpanFacts,
    SpanShape,
    apply_factors,
    calibrated_roofline,
    formats_of,
)
from plait.engine import (
    Checkpoint,
    EngineOptions,
    Tokenizer,
    computing_format,
    load_span_engine,
    open_checkpoint,
    read_span_sizes,
    usable_cores,
)
from plait.errors import BadSetup
from plait.model import ModelSpec
from plait.profiler.fingerprint import hardware_fingerprint, library_versions
from plait.profiler.grid import ProfileGrid
from plait.profiler.live import fit, judge, run_live
from plait.profiler.loopback import measure_loopback
from plait.profiler.operations import MeasuredOperations, measure_operations
from plait.profiler.stopwatch import Clock, PassMaker, Stopwatch

_HIDDEN_BYTES = 4
"""Of a number that goes on to the next span: float32, unless the swarm is told otherwise."""
OnProgress = Callable[[str, int, int], None]
"""A stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileWish:
    """What to measure. `blocks` None: all; a few of the last stand for all where all are equal.

    `temperature` is that of the engine's requests: 0 takes the best token, for which the host has less to do. `clock`
    `cpu` counts the time in which the computing thread ran; it needs a CPU and one thread.
    """

    name: str
    blocks: range | None = None
    step_tokens: int = 512
    context_tokens: int = 4096
    sequences: int = 64
    repeats: int = 9
    live_steps: int = 240
    temperature: float = 1.0
    clock: Clock = "wall"
    seed: int = 0


def profile_model(
    options: EngineOptions, wish: ProfileWish, on_progress: OnProgress | None = None
) -> Profile:
    """Measure a model on this machine; takes minutes, and its memory twice where `blocks` are not all.

    Raises:
        BadSetup: the wish does not fit the model or the machine.
    """
    report = on_progress or (lambda stage, done, total: None)
    options = replace(options, threads=options.threads or usable_cores())
    checkpoint = open_checkpoint(options.folder)
    spec = checkpoint.spec
    blocks = wish.blocks or spec.all_blocks
    _check(wish, options, spec, blocks)
    engine = load_span_engine(options, blocks, on_progress=lambda done, all: report("weights", done, all))
    stopwatch = Stopwatch(engine.decoder, wish.clock)
    rng = np.random.default_rng(wish.seed)
    grid = ProfileGrid(
        # Without phases each token is a sequence of its own once.
        step_tokens=wish.step_tokens
        if stopwatch.tells_operations
        else min(wish.step_tokens, engine.store.kv_blocks),
        context_tokens=min(wish.context_tokens, engine.max_model_tokens - 1),
        sequences=wish.sequences,
        kv_blocks=engine.store.kv_blocks,
        block_tokens=engine.store.block_tokens,
        sequence_tokens=engine.max_model_tokens,
    )
    measured = measure_operations(
        PassMaker(stopwatch, engine.store, rng),
        grid,
        tells_operations=stopwatch.tells_operations,
        clock=wish.clock,
        repeats=wish.repeats,
        rng=rng,
        on_progress=lambda done, all: report("operations", done, all),
    )
    profile = _profile(options, wish, checkpoint, blocks, measured)
    if blocks != spec.all_blocks:
        del engine, stopwatch
        engine = load_span_engine(
            options, spec.all_blocks, on_progress=lambda done, all: report("all weights", done, all)
        )
        stopwatch = Stopwatch(engine.decoder, wish.clock)
    steps = run_live(
        engine,
        stopwatch,
        Tokenizer(options.folder, model_vocab_tokens=spec.vocab_tokens),
        steps=wish.live_steps,
        step_tokens=min(grid.step_tokens, options.limits.step_tokens),
        sequences=min(wish.sequences, grid.step_tokens),
        temperature=wish.temperature,
        rng=rng,
        on_progress=lambda done, all: report("engine", done, all),
    )
    factors, host = fit(steps, profile.table_costs(extrapolates=True))
    share = len(blocks) / len(spec.blocks)
    tables = apply_factors(profile.tables, factors, block_share=share)
    profile = replace(profile, factors=factors, tables=tables)
    errors = judge(steps, _models(profile, spec), host)
    return replace(profile, host=host, errors={**profile.errors, **errors})


def _check(wish: ProfileWish, options: EngineOptions, spec: ModelSpec, blocks: range) -> None:
    if wish.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        raise BadSetup(
            "the clock of processor time needs a CPU and one thread; add --threads 1, or take --clock wall"
        )
    if wish.repeats < 1 or wish.live_steps < 20:
        raise BadSetup("a profile needs at least 1 repeat and 20 steps of the engine")
    if not 0 <= wish.temperature <= 2:
        raise BadSetup(f"temperature {wish.temperature} is not between 0 and 2")
    if blocks.stop != len(spec.blocks) or (blocks != spec.all_blocks and not _equal_blocks(spec)):
        raise BadSetup(
            f"blocks {blocks.start}:{blocks.stop} cannot stand for all {len(spec.blocks)}: take the last ones of a "
            "model whose blocks are equal, or all"
        )


def _profile(
    options: EngineOptions,
    wish: ProfileWish,
    checkpoint: Checkpoint,
    blocks: range,
    measured: MeasuredOperations,
) -> Profile:
    """What is known before the engine has run: the host's part is yet to come."""
    spec = checkpoint.spec
    weight_format, kv_format = computing_format(options, spec)
    sizes = read_span_sizes(checkpoint, options)
    return Profile(
        format=PROFILE_FORMAT,
        version=PROFILE_VERSION,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        fingerprint=hardware_fingerprint(device=options.device, threads=options.threads),
        versions=library_versions(),
        model=ProfiledModel(
            name=wish.name,
            shape=hashlib.sha256(repr(spec).encode()).hexdigest()[:16],
            first_block=blocks.start,
            end_block=blocks.stop,
            model_blocks=len(spec.blocks),
            equal_blocks=_equal_blocks(spec),
            weight_format=weight_format,
            kv_format=kv_format,
        ),
        clock=wish.clock,
        facts=SpanFacts(
            weight_bytes=sizes.weight_bytes(spec.all_blocks),
            kv_bytes_per_token=round(sum(sizes.kv_bytes_per_token)),
            hidden_bytes_per_token=spec.hidden * _HIDDEN_BYTES,
        ),
        temperature=wish.temperature,
        host=NO_OVERHEAD,
        factors=LiveFactors(),
        tables=measured.tables,
        regression=measured.regression,
        links={"loopback": measure_loopback()},
        samples=measured.samples,
        errors=measured.errors,
    )


def _models(profile: Profile, spec: ModelSpec) -> dict[str, CostModel]:
    """What the engine's steps judge, by name."""
    formats = formats_of(profile.model.weight_format, profile.model.kv_format)
    roofline = calibrated_roofline(
        profile.tables,
        SpanShape(spec, profile.blocks, formats),
        NO_OVERHEAD,
        span=SpanShape(spec, spec.all_blocks, formats),
    )
    return {
        "steps": profile.table_costs(extrapolates=True),
        "steps by regression": profile.regression_costs(),
        "steps by roofline": roofline,
    }


def _equal_blocks(spec: ModelSpec) -> bool:
    return len(set(spec.blocks)) == 1
