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

from dataclasses import dataclass, field

from plait.costs.blend import Curve, Grid
from plait.costs.energy import PowerDraw
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanFacts:
    """What is known of a span without measuring: its memory, and what its device draws."""

    weight_bytes: int
    kv_bytes_per_token: int
    hidden_bytes_per_token: int
    power: PowerDraw = field(default_factory=PowerDraw)


class TableCosts:
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
        self._tables = tables
        self._facts = facts
        self._host = host
        self._block_share = block_share
        self._decides = decides
        self._extrapolates = extrapolates
        self._extrapolated = 0

    @property
    def weight_bytes(self) -> int:
        return self._facts.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self._facts.kv_bytes_per_token

    @property
    def hidden_bytes_per_token(self) -> int:
        return self._facts.hidden_bytes_per_token

    @property
    def idle_watts(self) -> float:
        return self._facts.power.idle_watts

    @property
    def extrapolated_steps(self) -> int:
        return self._extrapolated

    def step_s(self, work: StepWork) -> float:
        self._check_domain(work)
        return self._seconds(work)

    def host_s(self, work: StepWork) -> float:
        return self._host.of(work)

    def energy_j(self, work: StepWork) -> float:
        return self._facts.power.step_j(self._seconds(work))

    def attention_s(self, work: StepWork) -> float:
        """The attention of a step.

        Raises:
            MissingCost: its kind of attention was not measured.
        """
        return self._block_share * (self._decode_s(work.features) + self._prefill_s(work))

    def _seconds(self, work: StepWork) -> float:
        tables = self._tables
        seconds = self._block_share * tables.dense.at(work.features.tokens) + self.attention_s(work)
        if self._decides and work.sampled:
            if tables.head is None:
                raise MissingCost(
                    "the head was not measured: this table is of a span that does not end its model"
                )
            seconds += tables.head.at(work.sampled)
        return seconds

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
        beyond = self._beyond(work)
        if beyond is None:
            return
        if not self._extrapolates:
            raise OutsideDomain(
                f"a step has {beyond}; profile a larger grid, or allow extrapolation, which is counted"
            )
        self._extrapolated += 1

    def _beyond(self, work: StepWork) -> str | None:
        """What of this work is larger than everything measured."""
        tables, features = self._tables, work.features
        bounds = [("tokens", features.tokens, tables.dense.last)]
        bounds.append(("tokens of context", features.context_tokens, tables.most_context_tokens))
        if self._decides and tables.head is not None:
            bounds.append(("sampled rows", work.sampled, tables.head.last))
        if tables.decode is not None:
            bounds.append(("decoding sequences", features.decodes, tables.decode.last_row))
        for name, value, most in bounds:
            if value > most:
                return f"{value} {name} and the table ends at {most:.0f}"
        longest = max(work.context_tokens, default=0)
        reach = max((grid.last_place for grid in (tables.prefill, tables.decode) if grid), default=0)
        return f"a context of {longest} tokens and the table ends at {reach:.0f}" if longest > reach else None
