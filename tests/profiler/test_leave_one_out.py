"""Every point of the shipped tables, predicted by its neighbours: blending is linear because that is closer."""

import math

import numpy as np
import pytest

from plait.costs import Curve
from plait.profiler import shipped_profile, shipped_profile_names


def left_out(name: str, operation: str) -> tuple[list[float], list[float]]:
    """Relative errors of linear and of logarithmic blending, where both can be asked."""
    rows: dict[int, dict[int, float]] = {}
    for sample in shipped_profile(name).samples:
        if sample.operation == operation:
            rows.setdefault(sample.row, {})[sample.place] = sample.seconds
    linear: list[float] = []
    logarithmic: list[float] = []
    for points in rows.values():
        places = sorted(points)
        for low, middle, high in zip(places, places[1:], places[2:], strict=False):
            if low == 0:
                continue
            ends = (points[low], points[high])
            linear.append(abs(Curve((low, high), ends).at(middle) / points[middle] - 1))
            logs = (math.log(low), math.log(high)), (math.log(ends[0]), math.log(ends[1]))
            predicted = math.exp(float(np.interp(math.log(middle), *logs)))
            logarithmic.append(abs(predicted / points[middle] - 1))
    return linear, logarithmic


@pytest.mark.parametrize("name", shipped_profile_names())
def test_a_point_is_predicted_by_its_neighbours(name: str) -> None:
    every: list[float] = []
    for operation in ("dense", "head", "prefill", "decode"):
        every.extend(left_out(name, operation)[0])
    assert len(every) > 100
    assert np.median(every) < 0.05


@pytest.mark.parametrize("name", shipped_profile_names())
def test_decode_attention_is_blended_better_linearly_than_in_logarithms(name: str) -> None:
    linear, logarithmic = left_out(name, "decode")
    assert len(linear) > 30
    assert np.mean(linear) < np.mean(logarithmic)
