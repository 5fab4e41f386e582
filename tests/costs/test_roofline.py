import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import plait.model
from plait.costs import (
    DEVICES,
    PERFECT,
    Curve,
    Efficiency,
    Formats,
    Grid,
    HostOverhead,
    OperationTables,
    RooflineCosts,
    SpanShape,
    StepWork,
    calibrated_roofline,
    device_named,
    formats_of,
)
from plait.errors import BadSetup, MissingCost
from plait.model import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
    names_of,
    plan_tensors,
    read_spec,
)

NORM = NormSpec(kind="rms", eps=1e-5)
ATTENTION = AttentionSpec(heads=32, kv_heads=8, head_dim=128, value_dim=128, scale=128**-0.5)
MLP = MlpSpec(inner=14336, activation="silu")


def llama_8b(**changes: object) -> ModelSpec:
    block = BlockSpec(placement="pre", norm=NORM, attention=ATTENTION, feed_forward=MLP)
    spec = ModelSpec(
        family="llama",
        vocab_tokens=128256,
        hidden=4096,
        embedding_width=4096,
        blocks=(block,) * 32,
        max_model_tokens=131072,
        tied_head=False,
        final_norm=NORM,
    )
    return replace(spec, **changes)


def costs(spec: ModelSpec, blocks: range | None = None, **changes: object) -> RooflineCosts:
    shape = SpanShape(spec, blocks or spec.all_blocks, Formats())
    return replace(RooflineCosts(shape=shape, device=DEVICES["h100"], efficiency=PERFECT), **changes)


DECODE = StepWork.of([(1, 1000)], sampled=1)
PROMPT = StepWork.of([(2048, 0)], sampled=1)


def test_the_weights_of_llama_8b_are_its_eight_billion_numbers() -> None:
    assert costs(llama_8b()).weight_bytes == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert costs(llama_8b()).kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert costs(llama_8b()).hidden_bytes_per_token == 8192


def test_a_decode_is_bound_by_memory_and_a_prompt_by_arithmetic() -> None:
    model = costs(llama_8b())
    embedding_bytes = 128256 * 4096 * 2
    floor_s = (model.weight_bytes - embedding_bytes + 1001 * model.kv_bytes_per_token) / 3.35e12
    assert model.step_s(DECODE) == pytest.approx(floor_s, rel=1e-3)
    body = 8.03e9 - 2 * 128256 * 4096
    flops = 2 * body * 2048 + 4 * (2048 * 2049 / 2) * 32 * 128 * 32
    head_s = embedding_bytes / 3.35e12
    assert model.step_s(PROMPT) == pytest.approx(flops / 989.5e12 + head_s, rel=1e-2)


def test_spans_add_up_to_the_model() -> None:
    spec = llama_8b()
    parts = [costs(spec, blocks) for blocks in (range(10), range(10, 20), range(20, 32))]
    for work in (DECODE, PROMPT):
        assert sum(part.step_s(work) for part in parts) == pytest.approx(costs(spec).step_s(work))
        assert sum(part.energy_j(work) for part in parts) == pytest.approx(costs(spec).energy_j(work))
    assert sum(part.weight_bytes for part in parts) == costs(spec).weight_bytes
    assert sum(part.kv_bytes_per_token for part in parts) == costs(spec).kv_bytes_per_token


def test_the_head_is_paid_once_for_each_sampled_row_and_only_by_the_last_span() -> None:
    spec = llama_8b()
    unsampled = replace(DECODE, sampled=0)
    head_s = 128256 * 4096 * 2 / 3.35e12
    assert costs(spec).step_s(DECODE) - costs(spec).step_s(unsampled) == pytest.approx(head_s, rel=1e-3)
    first = costs(spec, range(16))
    assert first.step_s(DECODE) == first.step_s(unsampled)


def test_a_window_bounds_what_attention_costs() -> None:
    sliding = replace(ATTENTION, window_tokens=512)
    blocks = (BlockSpec(placement="pre", norm=NORM, attention=sliding, feed_forward=MLP),) * 32
    windowed = SpanShape(llama_8b(blocks=blocks), range(32), Formats())
    whole = SpanShape(llama_8b(), range(32), Formats())

    def attention(shape: SpanShape, new: int, context: int) -> float:
        work = StepWork.of([(new, context)], sampled=0)
        return next(each.flops for each in shape.operations(work) if each.name.endswith("attention"))

    each_pair = 4 * 32 * 128 * 32
    assert attention(windowed, 1, 100) == attention(whole, 1, 100) == each_pair * 101
    assert attention(windowed, 1, 9000) == each_pair * 512
    seen = sum(min(position + 1, 512) for position in range(300, 1300))
    assert attention(windowed, 1000, 300) == pytest.approx(each_pair * seen)


def test_a_mixture_reads_the_experts_that_are_hit() -> None:
    router = RouterSpec(score="softmax", renormalises=True)
    mixture = MoeSpec(experts=64, experts_per_token=4, expert=replace(MLP, inner=1024), router=router)
    block = BlockSpec(placement="pre", norm=NORM, attention=ATTENTION, feed_forward=mixture)
    shape = SpanShape(llama_8b(blocks=(block,)), range(1), Formats())
    expert_bytes = 3 * 4096 * 1024 * 2

    def feed_forward_bytes(tokens: int) -> float:
        work = StepWork.of([(1, 0)] * tokens, sampled=0)
        read = next(each.bytes for each in shape.operations(work) if each.name == "feed_forward")
        return (read - 2 * tokens * 4096 * 2 - 4096 * 64 * 2) / expert_bytes

    assert feed_forward_bytes(1) == pytest.approx(4)
    assert 4 < feed_forward_bytes(2) < 8
    assert feed_forward_bytes(1000) == pytest.approx(64)
    assert shape.weight_bytes > 64 * expert_bytes


def test_more_of_anything_never_costs_less_and_a_faster_device_never_more() -> None:
    spec = llama_8b()
    model = costs(spec)
    steps = [StepWork.of([(tokens, 512)], sampled=1) for tokens in (1, 2, 64, 512, 4096)]
    times_s = [model.step_s(step) for step in steps]
    assert times_s == sorted(times_s)
    contexts = [model.step_s(StepWork.of([(64, context)], sampled=1)) for context in (0, 100, 5000, 50000)]
    assert contexts == sorted(contexts)
    faster = costs(spec, device=DEVICES["h200"])
    assert all(faster.step_s(step) <= model.step_s(step) for step in steps)


def test_efficiency_follows_the_rows() -> None:
    efficiency = Efficiency(
        rows=(1, 101), compute_fractions=(0.1, 0.5), bandwidth_fraction=0.5, launch_s=1e-5
    )
    assert [efficiency.compute_fraction(rows) for rows in (1, 51, 101, 9999)] == pytest.approx(
        [0.1, 0.3, 0.5, 0.5]
    )
    slow = costs(llama_8b(), efficiency=efficiency)
    operations = len(slow.shape.operations(DECODE))
    assert slow.step_s(DECODE) >= 2 * costs(llama_8b()).step_s(DECODE) + operations * 1e-5
    with pytest.raises(BadSetup, match="rows ascend"):
        Efficiency(rows=(2, 1), compute_fractions=(0.5, 0.5))
    with pytest.raises(BadSetup, match="fraction"):
        Efficiency(rows=(1,), compute_fractions=(1.5,))


def test_a_roofline_of_measured_tables_has_their_seconds_back() -> None:
    """Tables of a device that is one: efficiencies that rise with the rows, attention at a tenth of the peak."""
    rows = (1, 2, 8, 64, 256)
    truth = Efficiency(
        rows=rows, compute_fractions=(0.05, 0.1, 0.3, 0.9, 1.0), attention_fractions=(0.1,) * 5
    )
    spec = llama_8b()
    exact = costs(spec, efficiency=truth)
    without_head = [StepWork.of([(1, 0)] * count, sampled=0) for count in rows]
    with_context = {
        (row, place): exact.step_s(StepWork.of([(row, place)], sampled=0))
        - exact.step_s(StepWork.of([(row, 0)], sampled=0))
        for row in rows
        for place in (0, 4096)
    }
    dense = Curve(tuple(map(float, rows)), tuple(exact.step_s(work) for work in without_head))

    def curve(row: int, divisor: float) -> Curve:
        return Curve((0.0, 4096.0), tuple(with_context[row, place] / divisor for place in (0, 4096)))

    tables = OperationTables(
        dense=dense,
        head=None,
        prefill=Grid(tuple(map(float, rows[1:])), tuple(curve(row, row) for row in rows[1:])),
        decode=Grid((1.0,), (curve(1, 1),)),
        most_context_tokens=4096,
    )
    shape = SpanShape(spec, spec.all_blocks, Formats())
    found = calibrated_roofline(tables, shape, HostOverhead())
    for work in [*without_head, StepWork.of([(1, 3000)], sampled=0), StepWork.of([(64, 2000)], sampled=0)]:
        assert found.step_s(work) == pytest.approx(exact.step_s(work), rel=0.03)
    half = calibrated_roofline(tables, shape, HostOverhead(), span=SpanShape(spec, range(16), Formats()))
    assert half.step_s(DECODE) == pytest.approx(found.step_s(replace(DECODE, sampled=0)) / 2, rel=0.01)


def test_formats_of_engines_are_understood() -> None:
    assert formats_of("torch-float32", "float32").weights == "fp32"
    assert formats_of("int4-g128", "int8").compute == "int8"
    with pytest.raises(BadSetup, match="no weight format is called 'int3'"):
        formats_of("int3", "bf16")


def test_the_host_is_apart() -> None:
    host = HostOverhead(per_step_s=1.0, per_sequence_s=0.1, per_token_s=0.01, per_sample_s=0.001)
    model = costs(llama_8b(), host=host)
    assert model.host_s(StepWork.of([(5, 0), (1, 3)], sampled=2)) == pytest.approx(1.0 + 0.2 + 0.06 + 0.002)
    assert model.step_s(DECODE) == costs(llama_8b()).step_s(DECODE)


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(BadSetup, match=r"'h300'.*known are h200"):
        device_named("h300")
    shape = SpanShape(llama_8b(), range(32), Formats(compute="fp8"))
    with pytest.raises(MissingCost, match="'a100-80gb' for 'fp8'"):
        RooflineCosts(shape=shape, device=DEVICES["a100-80gb"])
    with pytest.raises(BadSetup, match="no KV format is called 'fp3'"):
        Formats(kv="fp3")


def test_every_device_has_a_source_and_plausible_peaks() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert len(device.source) > 20
        ridge = device.flops_per_s["bf16"] / device.bandwidth_bytes_per_s
        assert 20 < ridge < 500, f"{name} has {ridge:.0f} operations per byte"
        assert 0 < device.power.idle_watts < device.power.busy_watts


def test_a_shape_counts_what_a_checkpoint_of_it_stores() -> None:
    folder = Path(plait.model.__file__).parent / "tiny"
    spec = read_spec(json.loads((folder / "config.json").read_text()), "tiny")
    for blocks in (spec.all_blocks, range(1, 2), range(len(spec.blocks) - 1, len(spec.blocks))):
        slots = plan_tensors(spec, names_of(spec), blocks, ()).slots
        matrices = sum(math.prod(slot.shape) for slot in slots.values() if len(slot.shape) > 1)
        assert SpanShape(spec, blocks, Formats(weights="fp32")).weight_bytes == 4 * matrices
