"""A roofline's peaks and efficiencies, from measured tables.

The bandwidth is the best that any step reached, the peak the best rate of arithmetic; efficiencies are what is left to
explain. So what every token passes is right at the measured rows, and the rest follows from counting operations.
"""

from types import MappingProxyType

from plait.costs.devices import Device
from plait.costs.energy import PowerDraw
from plait.costs.model import HostOverhead
from plait.costs.roofline import Efficiency, RooflineCosts
from plait.costs.shape import OperationWork, SpanShape
from plait.costs.tables import OperationTables
from plait.costs.work import StepWork


def calibrated_roofline(
    tables: OperationTables,
    measured: SpanShape,
    host: HostOverhead,
    *,
    span: SpanShape | None = None,
    name: str = "this machine",
    power: PowerDraw | None = None,
) -> RooflineCosts:
    """The roofline of `span` (None: of the measured blocks) on the machine whose tables of `measured` these are."""
    places = [int(place) for place in tables.dense.places]
    passed = [_of(measured, StepWork.of([(1, 0)] * tokens, sampled=0), attention=False) for tokens in places]
    rates = [work.flops / tables.dense.at(tokens) for tokens, work in zip(places, passed, strict=True)]
    bandwidth = max(work.bytes / tables.dense.at(tokens) for tokens, work in zip(places, passed, strict=True))
    attention_rates = [_attention_rate(tables, measured, rows) for rows in places]
    peak = max(*rates, *attention_rates)
    device = Device(
        name=name,
        flops_per_s=MappingProxyType({measured.formats.compute: peak}),
        bandwidth_bytes_per_s=bandwidth,
        memory_bytes=0,
        power=power or PowerDraw(),
        source="measured by plait profile",
    )
    efficiency = Efficiency(
        rows=tuple(places),
        compute_fractions=tuple(rate / peak for rate in rates),
        attention_fractions=tuple(rate / peak for rate in attention_rates),
    )
    return RooflineCosts(shape=span or measured, device=device, efficiency=efficiency, host=host)


def _attention_rate(tables: OperationTables, measured: SpanShape, rows: int) -> float:
    """Operations of attention per second where it is longest, for sequences that bring so many rows."""
    grid = tables.decode if rows == 1 else tables.prefill
    if grid is None:
        return 1.0
    context = int(grid.last_place)
    sequences = 1
    if rows == 1:
        sequences = max(1, min(int(grid.last_row), tables.most_context_tokens // max(context, 1)))
    work = StepWork.of([(rows, context)] * sequences, sampled=0)
    seconds = grid.at(sequences, context) if rows == 1 else rows * grid.at(rows, context)
    return max(1.0, _of(measured, work, attention=True).flops / max(seconds, 1e-12))


def _of(shape: SpanShape, work: StepWork, *, attention: bool) -> OperationWork:
    """All attention of a step together, or everything but attention."""
    chosen = [each for each in shape.operations(work) if each.name.endswith("attention") == attention]
    return OperationWork(
        name="attention" if attention else "dense",
        flops=sum(each.flops for each in chosen),
        bytes=sum(each.bytes for each in chosen),
        rows=work.features.tokens,
    )
