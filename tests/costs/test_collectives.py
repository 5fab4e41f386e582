"""What devices that share a span pay for being several."""

from dataclasses import replace

import pytest

from plait.costs import (
    DEVICES,
    INTERCONNECTS,
    PERFECT,
    Formats,
    RooflineCosts,
    SpanShape,
    StepWork,
    device_named,
    interconnect_named,
)
from plait.errors import BadSetup, MissingCost
from plait.model import published_spec

DECODE = StepWork.of([(1, 1000)] * 32, sampled=32)
PROMPT = StepWork.of([(2048, 0)], sampled=1)


def costs(name: str, devices: int, device: str = "a100-40gb", **changes: object) -> RooflineCosts:
    spec = published_spec(name)
    shape = SpanShape(spec, spec.all_blocks, Formats())
    one = RooflineCosts(shape=shape, device=device_named(device), efficiency=PERFECT, devices=devices)
    return replace(one, **changes)


def test_a_sum_goes_round_the_ring_as_often_as_there_are_others_twice() -> None:
    pcie = interconnect_named("pcie4")
    large = 1e9
    assert pcie.sum_s(large, 4) == pytest.approx(2 * 3 / 4 * large / (31.5e9 * 235 / 300), rel=1e-3)
    assert pcie.gather_s(large, 4) == pytest.approx(pcie.sum_s(large, 4) / 2, rel=1e-3)
    assert pcie.sum_s(large, 1) == pcie.gather_s(0.0, 8) == 0.0


def test_small_sums_cost_latency_by_hand() -> None:
    """Eight A100: 3.6 us to start, 14 hops of 0.47 us; bytes at a quarter of 235 GB/s."""
    nvlink = interconnect_named("nvlink3")
    assert nvlink.sum_s(8, 8) == pytest.approx(3.6e-6 + 14 * 0.47e-6, rel=1e-3)
    assert nvlink.sum_s(64 << 10, 8) == pytest.approx(
        3.6e-6 + 14 * (0.47e-6 + (64 << 10) / 8 / (235e9 / 4)), rel=1e-3
    )
    assert interconnect_named("pcie4").sum_s(8, 8) > nvlink.sum_s(8, 8)


def test_more_bytes_never_take_less_time_whatever_the_protocol() -> None:
    for each in INTERCONNECTS.values():
        times_s = [each.sum_s(2.0**power, 8) for power in range(34)]
        assert times_s == sorted(times_s)


def test_devices_divide_the_work_and_add_collectives_by_hand() -> None:
    one, four = costs("opt-66b", 1), costs("opt-66b", 4)
    nvlink = interconnect_named("nvlink3")
    sums = 2 * 64 + 1
    hidden_bytes = 32 * 9216 * 2
    expected = sums * nvlink.sum_s(hidden_bytes, 4) + nvlink.gather_s(32 * 50272 * 4, 4)
    assert four.collectives_s(DECODE) == pytest.approx(expected)
    assert four.step_s(DECODE) == pytest.approx(one.step_s(DECODE) / 4 + expected)
    assert one.collectives_s(DECODE) == 0.0
    assert four.idle_watts == 4 * one.idle_watts
    assert four.memory_bytes == 4 * 40 * 10**9
    joules = four.energy_j(DECODE) - one.energy_j(DECODE)
    assert joules == pytest.approx(4 * expected * (400 - 50))


def test_eight_never_are_eight_times_as_fast_and_slower_wires_cost_more() -> None:
    for work in (DECODE, PROMPT):
        one, eight = costs("opt-175b", 1).step_s(work), costs("opt-175b", 8).step_s(work)
        over_pcie = costs("opt-175b", 8, interconnect=interconnect_named("pcie4")).step_s(work)
        assert one / 8 < eight < one / 4
        assert eight < over_pcie


def test_a_block_whose_branches_run_side_by_side_sums_once() -> None:
    usual = costs("opt-13b", 4)
    spec = usual.shape.model
    blocks = tuple(replace(block, placement="parallel_shared") for block in spec.blocks)
    side_by_side = replace(usual, shape=replace(usual.shape, model=replace(spec, blocks=blocks)))
    nvlink = interconnect_named("nvlink3")
    less_s = usual.collectives_s(DECODE) - side_by_side.collectives_s(DECODE)
    assert less_s == pytest.approx(len(blocks) * nvlink.sum_s(32 * 5120 * 2, 4))


def test_spans_share_the_collectives() -> None:
    whole = costs("opt-13b", 4)
    parts = [
        replace(whole, shape=SpanShape(whole.shape.model, blocks, Formats()))
        for blocks in (range(10), range(10, 40))
    ]
    assert sum(part.collectives_s(DECODE) for part in parts) == pytest.approx(whole.collectives_s(DECODE))


def test_devices_beyond_the_kv_heads_hold_copies() -> None:
    four, sixteen = costs("llama-3-8b", 4), costs("llama-3-8b", 16)
    assert sixteen.kv_bytes_per_token == 2 * four.kv_bytes_per_token
    long = StepWork.of([(1, 8000)] * 64, sampled=64)
    assert sixteen.attention_s(long) == pytest.approx(four.attention_s(long) / 4 * 2, rel=1e-6)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(BadSetup, match="7 devices cannot divide 40 heads"):
        costs("opt-13b", 7)
    with pytest.raises(BadSetup, match="0 devices"):
        costs("opt-13b", 0)
    with pytest.raises(MissingCost, match="joins several 'm2-ultra'; name an interconnect"):
        costs("opt-13b", 2, "m2-ultra")
    named = costs("opt-13b", 1, "m2-ultra", interconnect=interconnect_named("pcie3"))
    assert named.collectives_s(DECODE) == 0.0
    assert replace(named, devices=2).collectives_s(DECODE) > 0
    with pytest.raises(BadSetup, match=r"no interconnect is called 'string'; known are nvlink2"):
        interconnect_named("string")


def test_interconnects_have_sources_and_devices_name_known_ones() -> None:
    for name, each in INTERCONNECTS.items():
        assert each.name == name
        assert len(each.source) > 20
    for device in DEVICES.values():
        assert device.interconnect is None or device.interconnect in INTERCONNECTS


def test_ideal_seconds_are_those_of_the_peaks_and_never_more_than_the_step() -> None:
    one, four = costs("opt-13b", 1), costs("opt-13b", 4)
    for work in (DECODE, PROMPT):
        operations = one.shape.operations(work)
        ideal = one.ideal(work)
        assert ideal.compute_s == pytest.approx(sum(each.flops for each in operations) / 312e12)
        assert ideal.memory_s == pytest.approx(sum(each.bytes for each in operations) / 1555e9)
        assert max(ideal.compute_s, ideal.memory_s) <= one.step_s(work)
        assert four.ideal(work).compute_s == pytest.approx(ideal.compute_s / 4)
