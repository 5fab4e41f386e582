"""Estimated seconds, bytes and joules: what the simulator and the planners ask instead of a machine.

work.py       the work of one forward pass
model.py      `CostModel`, the interface that every model has, and the host's part of a step
shape.py      operations, weights and cache of a span, counted from the model; formats.py: the bytes of its numbers
roofline.py   a `CostModel` of published peaks and measured efficiency; devices.py: the published figures
energy.py     watts to joules
links.py      links that flows share
"""

from plait.costs.devices import DEVICES, Device, device_named
from plait.costs.energy import PowerDraw
from plait.costs.formats import Formats
from plait.costs.links import (
    Flow,
    FluidState,
    Links,
    SharedLink,
    advance,
    change_links,
    fair_rates,
    next_end_s,
    path_delay_s,
    ramp_s,
    retransmit_s,
    start_flow,
    stop_flow,
)
from plait.costs.model import NO_OVERHEAD, CostModel, HostOverhead
from plait.costs.roofline import ASSUMED, PERFECT, Efficiency, RooflineCosts
from plait.costs.shape import OperationWork, SpanShape
from plait.costs.work import StepFeatures, StepWork

__all__ = [
    "ASSUMED",
    "DEVICES",
    "NO_OVERHEAD",
    "PERFECT",
    "CostModel",
    "Device",
    "Efficiency",
    "Flow",
    "FluidState",
    "Formats",
    "HostOverhead",
    "Links",
    "OperationWork",
    "PowerDraw",
    "RooflineCosts",
    "SharedLink",
    "SpanShape",
    "StepFeatures",
    "StepWork",
    "advance",
    "change_links",
    "device_named",
    "fair_rates",
    "next_end_s",
    "path_delay_s",
    "ramp_s",
    "retransmit_s",
    "start_flow",
    "stop_flow",
]
