"""The second of the cost models: tables of operations measured on the machine.

| table | key | what |
|---|---|---|
| dense | tokens of the step | everything that every token passes alone: projections, feed forward, norms |
| head | sampled rows | the last norm and the head |
| prefill | chunk, its context | attention of one sequence that brings several tokens, in seconds a token |
| decode | sequences, their mean context | attention of all sequences that bring one token |

Attention of different sequences adds up, which held-out mixed batches have to confirm. A prefill's seconds a token are
linear in chunk and context, so they are what is blended; its seconds would be quadratic. Blocks count alike: a span
costs its share of the blocks that were measured (the "block copy" of LLMServingSim 2.0, section 2.2).
"""

from dataclasses import dataclass

from plait.costs.blend import Curve, Grid
from plait.costs.measured import Domain, MeasuredCosts, SpanFacts
from plait.costs.model import HostOverhead
from plait.costs.work import StepFeatures, StepWork
from plait.errors import MissingCost, OutsideDomain


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationTables:
    """Seconds of a measured span's operations; a table that is None was not measured.

    `most_context_tokens`: of all sequences of a step together.
    """

    dense: Curve
    head: Curve | None
    prefill: Grid | None
    decode: Grid | None
    most_context_tokens: int

    def domain(self, *, decides: bool) -> Domain:
        """The largest work that was measured; of the head only for a span that `decides`."""
        return Domain(
            tokens=self.dense.last,
            context_tokens=self.most_context_tokens,
            sampled=self.head.last if self.head and decides else None,
            decodes=self.decode.last_row if self.decode else None,
            longest_context_tokens=max(
                (grid.last_place for grid in (self.prefill, self.decode) if grid), default=0.0
            ),
        )


@dataclass(frozen=True, slots=True)
class StepParts:
    """Seconds of a step by kind of table: everything but attention, attention of prompts, of decoding sequences."""

    dense_s: float
    prefill_s: float
    decode_s: float


class TableCosts(MeasuredCosts):
    """The `CostModel` of a span, from tables; the answers add up over the spans of a model.

    `block_share`: the span's blocks over those of the tables. `decides`: whether the head is the span's. With
    `extrapolates`, work beyond the tables continues their last slopes, and is counted.
    """

    def __init__(
        self,
        tables: OperationTables,
        facts: SpanFacts,
        host: HostOverhead,
        *,
        block_share: float = 1.0,
        decides: bool = True,
        extrapolates: bool = False,
    ) -> None:
        super().__init__(facts, host, block_share=block_share)
        self._tables = tables
        self._domain = tables.domain(decides=decides)
        self._decides = decides
        self._extrapolates = extrapolates

    def step_s(self, work: StepWork) -> float:
        self._check_domain(work)
        return self._seconds(work)

    def energy_j(self, work: StepWork) -> float:
        return self._facts.power.step_j(self._seconds(work))

    def attention_s(self, work: StepWork) -> float:
        return self._block_share * (self._decode_s(work.features) + self._prefill_s(work))

    def parts_s(self, work: StepWork) -> StepParts:
        """What adds up to a step; the same errors as `step_s`, but for the domain.

        Raises:
            MissingCost: an operation was not measured.
        """
        dense_s = self._block_share * self._tables.dense.at(work.features.tokens)
        if self._decides and work.sampled:
            if self._tables.head is None:
                raise MissingCost(
                    "the head was not measured: this table is of a span that does not end its model"
                )
            dense_s += self._tables.head.at(work.sampled)
        return StepParts(
            dense_s,
            self._block_share * self._prefill_s(work),
            self._block_share * self._decode_s(work.features),
        )

    def _seconds(self, work: StepWork) -> float:
        parts = self.parts_s(work)
        return parts.dense_s + parts.prefill_s + parts.decode_s

    def _decode_s(self, features: StepFeatures) -> float:
        if not features.decodes:
            return 0.0
        table = self._tables.decode
        if table is None:
            raise MissingCost("attention of decoding sequences was not measured; profile again")
        return table.at(features.decodes, features.decode_context_tokens / features.decodes)

    def _prefill_s(self, work: StepWork) -> float:
        if not work.features.prefill_tokens:
            return 0.0
        table = self._tables.prefill
        if table is None:
            raise MissingCost("attention of prompts was not measured; profile again")
        return sum(
            new * table.at(new, context)
            for new, context in zip(work.new_tokens, work.context_tokens, strict=True)
            if new > 1
        )

    def _check_domain(self, work: StepWork) -> None:
        beyond = self._domain.beyond(work)
        if beyond is None:
            return
        if not self._extrapolates:
            raise OutsideDomain(
                f"a step has {beyond}; profile a larger grid, or allow extrapolation, which is counted"
            )
        self._extrapolated += 1
