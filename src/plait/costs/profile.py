"""A machine's measurements of one model: what was measured, where, with what error, and the fits to it.

Times depend on the machine they were measured on, so a profile of another machine is refused unless somebody insists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from plait.costs.accuracy import PredictionErrors
from plait.costs.blend import Curve, Grid
from plait.costs.links import SharedLink
from plait.costs.live_factors import LiveFactors
from plait.costs.measured import SpanFacts
from plait.costs.model import HostOverhead
from plait.costs.regression import RegressionCosts
from plait.costs.tables import OperationTables, TableCosts
from plait.errors import BadSetup, MissingCost

PROFILE_FORMAT = "plait-profile"
PROFILE_VERSION = 2

Operation = Literal["dense", "head", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationSample:
    """One measured point. `row` and `place` are its keys as in `tables.py` (`dense` and `head` have no row: 0).

    `spread_fraction`: half the distance between the quartiles of the repeats, over the value. `held_out` points took no
    part in the fit whose prediction is `predicted_s`; the tables that are shipped use all points.
    """

    operation: Operation
    row: int
    place: int
    seconds: float
    spread_fraction: float
    held_out: bool = False
    predicted_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledModel:
    """Which model, blocks and formats were measured. `shape` is a digest of what the model computes.

    `equal_blocks`: all blocks of the model compute alike, so that the measured ones stand for all.
    """

    name: str
    shape: str
    first_block: int
    end_block: int
    model_blocks: int
    equal_blocks: bool
    weight_format: str
    kv_format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One machine, one model. `clock`: `wall`, or `cpu` for the time that the one computing thread was running.

    `tables`, `regression` and `samples` are of the measured blocks, with the head if they end the model; `facts` are of
    the whole model. `tables` are the samples times `factors`; those and `host` were fitted to every other step of the
    engine, whose tokens were drawn at `temperature`.

    `errors`: of held-out points by operation, and by model (`steps`, `steps by regression`) of the steps of the engine
    that took part in no fit.
    """

    format: str
    version: int
    date: str
    fingerprint: Mapping[str, str]
    versions: Mapping[str, str]
    model: ProfiledModel
    clock: Literal["wall", "cpu"]
    facts: SpanFacts
    temperature: float
    host: HostOverhead
    factors: LiveFactors
    tables: OperationTables
    regression: tuple[float, ...]
    links: Mapping[str, SharedLink]
    samples: tuple[OperationSample, ...]
    errors: Mapping[str, PredictionErrors]

    @property
    def blocks(self) -> range:
        return range(self.model.first_block, self.model.end_block)

    def table_costs(
        self, blocks: range | None = None, *, facts: SpanFacts | None = None, extrapolates: bool = False
    ) -> TableCosts:
        """Costs of these blocks of the model (None: all) by tables.

        Without `facts`, a part of the blocks has as large a part of the memory, which ignores embedding and head.

        Raises:
            MissingCost: blocks that were not measured, nor others like them.
        """
        span = self._span(blocks)
        return TableCosts(
            self.tables,
            facts or self._facts(span),
            self.host,
            block_share=len(span) / len(self.blocks),
            decides=self._decides(span),
            extrapolates=extrapolates,
        )

    def regression_costs(
        self, blocks: range | None = None, *, facts: SpanFacts | None = None
    ) -> RegressionCosts:
        """The same by regression.

        Raises:
            MissingCost: as above.
        """
        span = self._span(blocks)
        return RegressionCosts(
            self.regression,
            facts or self._facts(span),
            self.host,
            block_share=len(span) / len(self.blocks),
            head=self.tables.head if self._decides(span) else None,
            domain=self.tables.domain(decides=self._decides(span)),
        )

    def _span(self, blocks: range | None) -> range:
        span = range(self.model.model_blocks) if blocks is None else blocks
        known = range(self.model.model_blocks) if self.model.equal_blocks else self.blocks
        if not span or span.start < known.start or span.stop > known.stop:
            raise MissingCost(
                f"blocks {span.start}:{span.stop} of {self.model.name!r} were not measured, only "
                f"{self.blocks.start}:{self.blocks.stop}; profile them"
            )
        return span

    def _decides(self, span: range) -> bool:
        return span.stop == self.model.model_blocks

    def _facts(self, span: range) -> SpanFacts:
        share = len(span) / self.model.model_blocks
        return replace(
            self.facts,
            weight_bytes=round(self.facts.weight_bytes * share),
            kv_bytes_per_token=round(self.facts.kv_bytes_per_token * share),
        )


def check_fingerprint(profile: Profile, here: Mapping[str, str], *, force: bool = False) -> None:
    """Refuse a profile of another machine.

    Raises:
        BadSetup: the machines differ; the message says in what. Not with `force`.
    """
    differing = [
        f"{key} {profile.fingerprint.get(key, 'unknown')!r} there and {here.get(key, 'unknown')!r} here"
        for key in sorted({*profile.fingerprint, *here})
        if profile.fingerprint.get(key) != here.get(key)
    ]
    if differing and not force:
        raise BadSetup(
            f"the profile of {profile.model.name!r} was measured on another machine ({'; '.join(differing)}); "
            "measure here with plait profile, or insist: --force-profile, or force_profile: true in a scenario"
        )


def tables_of(
    samples: Sequence[OperationSample], most_context_tokens: int, *, use_held_out: bool = True
) -> OperationTables:
    """The tables of measured points.

    Raises:
        MissingCost: nothing was measured of what every token passes.
    """
    points: dict[Operation, dict[int, dict[int, float]]] = {}
    for sample in samples:
        if use_held_out or not sample.held_out:
            value = sample.seconds / sample.row if sample.operation == "prefill" else sample.seconds
            points.setdefault(sample.operation, {}).setdefault(sample.row, {})[sample.place] = value

    def curve(places: Mapping[int, float]) -> Curve:
        ordered = sorted(places)
        return Curve(tuple(map(float, ordered)), tuple(places[place] for place in ordered))

    def grid(operation: Operation) -> Grid | None:
        rows = points.get(operation)
        if not rows:
            return None
        ordered = sorted(rows)
        return Grid(tuple(map(float, ordered)), tuple(curve(rows[row]) for row in ordered))

    if "dense" not in points:
        raise MissingCost("the operations that every token passes were not measured; profile again")
    return OperationTables(
        dense=curve(points["dense"][0]),
        head=curve(points["head"][0]) if "head" in points else None,
        prefill=grid("prefill"),
        decode=grid("decode"),
        most_context_tokens=most_context_tokens,
    )


def apply_factors(
    tables: OperationTables, factors: LiveFactors, *, block_share: float = 1.0
) -> OperationTables:
    """Tables as an engine finds them; `block_share`: their blocks over those of the model."""
    return replace(
        tables,
        dense=tables.dense.times(factors.dense, block_share * factors.per_step_s),
        head=tables.head.times(factors.dense) if tables.head else None,
        prefill=tables.prefill.times(factors.prefill) if tables.prefill else None,
        decode=tables.decode.times(factors.decode) if tables.decode else None,
    )


def predict(tables: OperationTables, sample: OperationSample) -> float:
    """What tables say of a point.

    Raises:
        MissingCost: they have no such operation.
    """
    match sample.operation:
        case "dense":
            return tables.dense.at(sample.place)
        case "head" if tables.head is not None:
            return tables.head.at(sample.place)
        case "prefill" if tables.prefill is not None:
            return sample.row * tables.prefill.at(sample.row, sample.place)
        case "decode" if tables.decode is not None:
            return tables.decode.at(sample.row, sample.place)
        case _:
            raise MissingCost(f"these tables have no {sample.operation!r}; profile again")
