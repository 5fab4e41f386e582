# pyright: standard
"""A rank that is not the engine's: it loads its part of the model and takes part in steps until rank 0 stops it.

On rank 0's own host it is a process that rank 0 starts (rank_process.py); on another it is `plait serve
--tensor-parallel-rank`.
"""

import math
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from plait.engine import Rank, RankPlan, TensorParallel, load_rank, usable_cores, vocabularies
from plait.errors import EngineLost, ServingError
from plait.worker.gloo_link import JOIN_TIMEOUT_S, GlooLink
from plait.worker.rank_links import Frame, FrameKind, GroupSizes, RankLink
from plait.worker.rank_results import gather_results
from plait.worker.step_message import StepBounds, apply_moves, decode_step

# Rank 0 reads last words as soon as it finds that a rank has failed.
_LAST_WORDS_S = 1.0


def follow_elsewhere(options: TensorParallel, folder: Path, threads: int) -> None:
    """Be a rank on another host than rank 0's, with a model that lies in `folder` here.

    Raises:
        BadSetup: rank 0 was not found, or this part of the model cannot be loaded.
        EngineLost: another rank failed, rank 0 included.
    """
    assert options.address is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        # Waits for other hosts return to Python only when they have ended.
        signal.signal(number, signal.SIG_DFL)
    link = GlooLink(options.rank, options.size, options.address, join_timeout_s=JOIN_TIMEOUT_S)
    follow(link, folder=folder, threads=threads or usable_cores())


def follow(
    link: RankLink,
    *,
    folder: Path | None = None,
    threads: int = 0,
    on_plan: Callable[[RankPlan], None] = lambda plan: None,
) -> None:
    """Be a rank until rank 0 says that it is over; `folder` and `threads` are those of the plan unless given.

    Raises:
        BadSetup: this part of the model cannot be loaded. Rank 0 has been told.
        EngineLost: another rank failed, rank 0 included.
    """
    try:
        frame = link.receive(0, timeout_s=math.inf)
        plan = RankPlan.from_json(frame.body)
        on_plan(plan)
        collective = link.open_sums(
            GroupSizes(max_floats=plan.max_floats, max_gather_bytes=plan.max_gather_bytes), plan.timeout_s
        )
        own = load_rank(
            plan, link.rank, collective, folder=folder or Path(plan.folder), threads=threads or plan.threads
        )
        link.send(0, Frame(FrameKind.READY), timeout_s=math.inf)
        run_steps(link, own, plan)
    except Exception as error:
        sentence = error.message if isinstance(error, ServingError) else f"{type(error).__name__}: {error}"
        _say_last(link, sentence)
        raise
    finally:
        link.close()


def run_steps(link: RankLink, own: Rank, plan: RankPlan) -> None:
    """Run steps as rank 0 sends them, until it sends no more.

    Raises:
        EngineLost: another rank failed.
        EngineFailure: rank 0 sent what cannot be run.
    """
    spec = own.decoder.spec
    vocabulary_of = vocabularies(spec, plan.ranks)
    bounds = StepBounds(
        vocab_tokens=spec.vocab_tokens,
        step_tokens=plan.step_tokens,
        block_tokens=plan.block_tokens,
        kv_blocks=plan.kv_blocks,
        host_kv_blocks=plan.host_kv_blocks,
    )
    while (frame := link.receive(0, timeout_s=math.inf)).kind is FrameKind.STEP:
        step = decode_step(frame.body, bounds)
        apply_moves(step.moves, own.store, own.host_store)
        logits = own.decoder.forward(step.chunks, own.store)
        gather_results(link, step.chunks, vocabulary_of, logits, own.decoder.best, plan.max_gather_bytes)


def _say_last(link: RankLink, sentence: str) -> None:
    with suppress(EngineLost):  # it may be rank 0 that was lost
        link.send(0, Frame(FrameKind.FAILED, sentence.encode()), timeout_s=_LAST_WORDS_S)
