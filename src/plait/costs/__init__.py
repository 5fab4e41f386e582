"""Estimated seconds, bytes and joules: what the simulator and the planners ask instead of a machine.

work.py       the work of one forward pass
model.py      `CostModel`, the interface that every model has, and the host's part of a step
shape.py      operations, weights and cache of a span, counted from the model; formats.py: the bytes of its numbers
roofline.py   a `CostModel` of peaks and efficiencies: published ones (devices.py), measured ones (calibration.py)
collectives.py what several devices in one machine pay to compute together: interconnects with published figures
tables.py     a `CostModel` of tables of measured operations; blend.py: curves and grids
regression.py a `CostModel` of six coefficients; measured.py: what it shares with tables
live_factors.py factors between a grid and an engine
noise.py      any of them, with the scatter that was measured; accuracy.py: how far predictions are off
profile.py    a machine's measurements; profile_file.py: as a file
energy.py     watts to joules
links.py      links that flows share
"""

from plait.costs.accuracy import PredictionErrors, prediction_errors
from plait.costs.blend import Curve, Grid
from plait.costs.calibration import calibrated_roofline
from plait.costs.collectives import INTERCONNECTS, Interconnect, collectives_s, interconnect_named
from plait.costs.devices import DEVICES, Device, device_named
from plait.costs.energy import PowerDraw
from plait.costs.formats import Formats, formats_of
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
from plait.costs.live_factors import LiveFactors, fit_live_factors
from plait.costs.measured import Domain, SpanFacts
from plait.costs.model import NO_OVERHEAD, CostModel, HostOverhead, IdealSeconds
from plait.costs.noise import NoisyCosts
from plait.costs.profile import (
    PROFILE_FORMAT,
    PROFILE_VERSION,
    Operation,
    OperationSample,
    Profile,
    ProfiledModel,
    apply_factors,
    check_fingerprint,
    predict,
    tables_of,
)
from plait.costs.profile_file import MAX_PROFILE_BYTES, format_profile, parse_profile
from plait.costs.regression import (
    RegressionCosts,
    fit_host,
    fit_steps,
    non_negative_least_squares,
)
from plait.costs.roofline import ASSUMED, PERFECT, Efficiency, RooflineCosts
from plait.costs.shape import OperationWork, SpanShape
from plait.costs.tables import OperationTables, StepParts, TableCosts
from plait.costs.work import StepFeatures, StepWork

__all__ = [
    "ASSUMED",
    "DEVICES",
    "INTERCONNECTS",
    "MAX_PROFILE_BYTES",
    "NO_OVERHEAD",
    "PERFECT",
    "PROFILE_FORMAT",
    "PROFILE_VERSION",
    "CostModel",
    "Curve",
    "Device",
    "Domain",
    "Efficiency",
    "Flow",
    "FluidState",
    "Formats",
    "Grid",
    "HostOverhead",
    "IdealSeconds",
    "Interconnect",
    "Links",
    "LiveFactors",
    "NoisyCosts",
    "Operation",
    "OperationSample",
    "OperationTables",
    "OperationWork",
    "PowerDraw",
    "PredictionErrors",
    "Profile",
    "ProfiledModel",
    "RegressionCosts",
    "RooflineCosts",
    "SharedLink",
    "SpanFacts",
    "SpanShape",
    "StepFeatures",
    "StepParts",
    "StepWork",
    "TableCosts",
    "advance",
    "apply_factors",
    "calibrated_roofline",
    "change_links",
    "check_fingerprint",
    "collectives_s",
    "device_named",
    "fair_rates",
    "fit_host",
    "fit_live_factors",
    "fit_steps",
    "format_profile",
    "formats_of",
    "interconnect_named",
    "next_end_s",
    "non_negative_least_squares",
    "parse_profile",
    "path_delay_s",
    "predict",
    "prediction_errors",
    "ramp_s",
    "retransmit_s",
    "start_flow",
    "stop_flow",
    "tables_of",
]
