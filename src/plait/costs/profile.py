"""A machine's measurements of one model, as a file: what was measured, where, with what error, and the fits to it.

The file is JSON. It holds only numbers and words that this module names, and reading it executes nothing. Times depend
on the machine they were measured on, so a profile of another machine is refused unless somebody insists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from plait.costs.accuracy import PredictionErrors
from plait.costs.blend import Curve, Grid
from plait.costs.links import SharedLink
from plait.costs.model import HostOverhead
from plait.costs.regression import RegressionCosts
from plait.costs.tables import OperationTables, SpanFacts, TableCosts
from plait.errors import BadSetup, MissingCost

PROFILE_FORMAT = "plait-profile"
PROFILE_VERSION = 1
MAX_PROFILE_BYTES = 4 << 20

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
    """Which model, blocks and formats were measured. `shape` is a digest of what the model computes."""

    name: str
    shape: str
    first_block: int
    end_block: int
    model_blocks: int
    weight_format: str
    kv_format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One machine, one model. `clock`: `wall`, or `cpu` for the time that the one computing thread was running.

    `errors`: of held-out points by operation, and of whole steps by model (`steps`, `steps by regression`).
    """

    format: str
    version: int
    date: str
    fingerprint: Mapping[str, str]
    versions: Mapping[str, str]
    model: ProfiledModel
    clock: Literal["wall", "cpu"]
    facts: SpanFacts
    host: HostOverhead
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
        """Costs of these blocks (all that were measured) by tables.

        Without `facts`, a part of the blocks has as large a part of the memory, which ignores embedding and head.

        Raises:
            MissingCost: blocks that were not measured.
        """
        share, decides, shared = self._span(blocks)
        return TableCosts(
            self.tables,
            facts or shared,
            self.host,
            block_share=share,
            decides=decides,
            extrapolates=extrapolates,
        )

    def regression_costs(
        self, blocks: range | None = None, *, facts: SpanFacts | None = None
    ) -> RegressionCosts:
        """The same by regression.

        Raises:
            MissingCost: blocks that were not measured.
        """
        share, decides, shared = self._span(blocks)
        head = self.tables.head if decides else None
        return RegressionCosts(self.regression, facts or shared, self.host, block_share=share, head=head)

    def _span(self, blocks: range | None) -> tuple[float, bool, SpanFacts]:
        here = self.blocks
        span = here if blocks is None else blocks
        if not span or span.start < here.start or span.stop > here.stop:
            raise MissingCost(
                f"blocks {span.start}:{span.stop} of {self.model.name!r} were not measured, only "
                f"{here.start}:{here.stop}; profile them"
            )
        share = len(span) / len(here)
        facts = SpanFacts(
            weight_bytes=round(self.facts.weight_bytes * share),
            kv_bytes_per_token=round(self.facts.kv_bytes_per_token * share),
            hidden_bytes_per_token=self.facts.hidden_bytes_per_token,
            power=self.facts.power,
        )
        return share, span.stop == self.model.model_blocks, facts


def format_profile(profile: Profile) -> str:
    """The text of a profile's file; reading it gives an equal profile."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1).decode()


def parse_profile(text: str | bytes, *, where: str) -> Profile:
    """Read a profile; `where` (a file name) is for the messages.

    Raises:
        BadSetup: it is none, or of another version of plait.
    """
    if len(text) > MAX_PROFILE_BYTES:
        raise BadSetup(f"{where} is larger than any profile; make one with plait profile")
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadSetup(f"{where} is no profile ({error}); make one with plait profile") from None
    if profile.format != PROFILE_FORMAT or profile.version != PROFILE_VERSION:
        raise BadSetup(
            f"{where} is a {profile.format!r} of version {profile.version}, and this plait reads "
            f"{PROFILE_FORMAT!r} of version {PROFILE_VERSION}; measure again with plait profile"
        )
    return profile


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
            "measure here with plait profile, or say that the difference does not matter"
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
            points.setdefault(sample.operation, {}).setdefault(sample.row, {})[sample.place] = sample.seconds

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


def predict(tables: OperationTables, sample: OperationSample) -> float:
    """What tables say of a point."""
    match sample.operation:
        case "dense":
            return tables.dense.at(sample.place)
        case "head":
            table = tables.head
            assert table is not None
            return table.at(sample.place)
        case "prefill":
            grid = tables.prefill
        case "decode":
            grid = tables.decode
    assert grid is not None
    return grid.at(sample.row, sample.place)
