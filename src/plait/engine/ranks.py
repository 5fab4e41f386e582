# pyright: standard
"""One rank of a tensor-parallel group: what it needs to know to load its part of a model, and the part.

Rank 0 is the process of the engine; it decides everything here and tells the others. Where and how they run, and how
they talk, is decided above this package.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.decoder import SpanDecoder
from plait.engine.kernel_kv import KernelKvStore
from plait.engine.kv_store import KvExtents
from plait.engine.loader import Progress
from plait.engine.native import NativeDecoder, kernel_kv_format, uses_kernels, weight_format
from plait.engine.options import EngineOptions, usable_cores
from plait.engine.packed import WEIGHT_FORMATS, load_packed, packed_cache_folder
from plait.engine.packed_layout import Shard, check_shard, vocabulary_of
from plait.errors import BadSetup
from plait.model import ModelSpec

if TYPE_CHECKING:
    from plait.kernels._native import Collective


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What all ranks of a group have in common.

    `folder` is where the model lies; on another machine it may lie elsewhere, and `fingerprint` tells whether it is the
    same. `kv_blocks` and `host_kv_blocks` are how many KV blocks there are: every rank has its heads' part of each.
    """

    ranks: int
    folder: str
    fingerprint: str
    weight_format: str
    kv_format: str
    block_tokens: int
    kv_blocks: int
    host_kv_blocks: int
    step_tokens: int
    token_limit: int
    hidden: int
    packed_cache: bool
    threads: int
    timeout_s: float

    @property
    def max_floats(self) -> int:
        """Numbers in the largest sum of a step."""
        return self.step_tokens * self.hidden

    @property
    def max_gather_bytes(self) -> int:
        """What one rank may bring to one gather; more is brought in pieces. A decoding batch fits into one."""
        return 2 * 2**20

    def to_json(self) -> bytes:
        """As it is told to the other ranks."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "RankPlan":
        """What `to_json` wrote.

        Raises:
            BadSetup: it is not a plan, or not of this version of plait.
        """
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        names = {field.name: field.type for field in fields(cls)}
        if (
            not isinstance(values, dict)
            or values.keys() != names.keys()
            or not all(type(values[name]) is kind for name, kind in names.items())
            or values["weight_format"] not in WEIGHT_FORMATS
        ):
            raise BadSetup(
                "rank 0 sent no plan that this rank understands; install the same version of plait for all ranks"
            )
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A loaded rank: its part of the weights, ready to run, and of the KV memory."""

    decoder: SpanDecoder
    store: KvExtents
    host_store: KvExtents | None


class RankGroup(Protocol):
    """The other ranks, as the engine's loading sees them; the engine is in rank 0's process."""

    ranks: int

    def start(self, plan: RankPlan) -> "Collective":
        """Have every other rank load its part; returns what rank 0 sums through, before they are done."""
        ...

    def lead(self, own: Rank, plan: RankPlan) -> Rank:
        """Wait until all are loaded, and return a rank whose steps run on all of them.

        Raises:
            BadSetup: one could not load its part.
        """
        ...


def lead_ranks(
    group: RankGroup,
    options: EngineOptions,
    checkpoint: Checkpoint,
    *,
    kv_blocks: int,
    host_kv_blocks: int,
    token_limit: int,
    on_progress: Progress | None,
) -> Rank:
    """Load a model on a group of ranks, this process being rank 0.

    Raises:
        BadSetup: the model cannot be divided so, or a rank could not load its part.
    """
    spec, ranks = checkpoint.spec, group.ranks
    if not uses_kernels(options, spec):
        raise BadSetup(
            f"--tensor-parallel-size {ranks} needs plait's CPU kernels, which do not serve this model here; they want "
            "--device cpu and --dtype bfloat16, or --quantization"
        )
    check_shard(spec, spec.all_blocks, Shard(ranks=ranks))
    plan = RankPlan(
        ranks=ranks,
        folder=str(options.folder),
        fingerprint=checkpoint.fingerprint,
        weight_format=weight_format(options),
        kv_format=kernel_kv_format(options),
        block_tokens=options.block_tokens,
        kv_blocks=kv_blocks,
        host_kv_blocks=host_kv_blocks,
        step_tokens=options.limits.step_tokens,
        token_limit=token_limit,
        hidden=spec.hidden,
        packed_cache=options.packed_cache,
        threads=options.threads or max(1, usable_cores() // ranks),
        timeout_s=float(options.tensor_parallel.timeout_s),
    )
    collective = group.start(plan)
    own = load_rank(plan, 0, collective, folder=options.folder, threads=plan.threads, on_progress=on_progress)
    return group.lead(own, plan)


def load_rank(
    plan: RankPlan,
    rank: int,
    collective: "Collective",
    *,
    folder: Path,
    threads: int,
    on_progress: Progress | None = None,
) -> Rank:
    """Load a rank's part of the model in `folder`.

    Raises:
        BadSetup: the model is another one, cannot be divided so, or does not fit.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.fingerprint != plan.fingerprint:
        raise BadSetup(
            f"the model in {folder} is not the one that rank 0 serves (fingerprints {checkpoint.fingerprint!r} and "
            f"{plan.fingerprint!r}); give every rank the same files"
        )
    spec, weight_format = checkpoint.spec, plan.weight_format
    assert weight_format in WEIGHT_FORMATS
    weights = load_packed(
        checkpoint,
        format=weight_format,  # pyright: ignore[reportArgumentType] - one of the keys, as the line above says
        shard=Shard(rank=rank, ranks=plan.ranks),
        threads=threads,
        cache=packed_cache_folder(checkpoint) if plan.packed_cache else None,
        on_progress=on_progress,
    )
    decoder = NativeDecoder(
        spec,
        weights,
        threads=threads,
        kv_format=plan.kv_format,
        block_tokens=plan.block_tokens,
        token_limit=plan.token_limit,
        collective=collective,
    )
    return Rank(
        decoder=decoder,
        store=_kv_memory(plan, spec, plan.kv_blocks),
        host_store=_kv_memory(plan, spec, plan.host_kv_blocks) if plan.host_kv_blocks else None,
    )


def vocabularies(spec: ModelSpec, ranks: int) -> list[range]:
    """The token ids whose logits each rank computes."""
    return [vocabulary_of(spec, Shard(rank=rank, ranks=ranks)) for rank in range(ranks)]


def _kv_memory(plan: RankPlan, spec: ModelSpec, kv_blocks: int) -> KvExtents:
    return KernelKvStore(
        spec, spec.all_blocks, kv_blocks, plan.block_tokens, plan.kv_format, ranks=plan.ranks
    )
