import pytest

from plait.costs import DEVICES, Formats, PowerDraw, RooflineCosts, SpanShape, StepWork
from plait.costs.energy import MEMORY_J_PER_BYTE
from plait.model import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, NormSpec

NORM = NormSpec(kind="rms", eps=1e-5)
BLOCK = BlockSpec(
    placement="pre",
    norm=NORM,
    attention=AttentionSpec(heads=4, kv_heads=4, head_dim=64, value_dim=64, scale=0.125),
    feed_forward=MlpSpec(inner=1024, activation="silu"),
)
MODEL = ModelSpec(
    family="llama",
    vocab_tokens=1000,
    hidden=256,
    embedding_width=256,
    blocks=(BLOCK,) * 4,
    max_model_tokens=1024,
    tied_head=False,
    final_norm=NORM,
)


def test_a_timeline_of_three_states_by_hand() -> None:
    power = PowerDraw(idle_watts=35.0, busy_watts=600.0, standby_watts=300.0, standby_s=18.0)
    # Idle 10 s, busy 5, standby 18, idle 7, busy 2, standby 3 (interrupted), busy 1, standby 4 until the end.
    joules = power.run_j([(10.0, 15.0), (40.0, 42.0), (45.0, 46.0)], end_s=50.0)
    assert joules == pytest.approx(35 * 17 + 600 * 8 + 300 * (18 + 3 + 4))


def test_without_standby_a_device_is_busy_or_idle() -> None:
    power = PowerDraw(idle_watts=10.0, busy_watts=100.0)
    assert power.run_j([(0.0, 1.0), (5.0, 6.0)], end_s=10.0) == pytest.approx(10 * 8 + 100 * 2)
    assert power.run_j([], end_s=10.0) == 100.0


def test_steps_add_up_to_the_timeline() -> None:
    power = PowerDraw(idle_watts=10.0, busy_watts=100.0)
    steps = power.step_j(1.0) + power.step_j(2.0)
    assert power.run_j([(0.0, 1.0), (4.0, 6.0)], end_s=10.0) == pytest.approx(10 * 10 + steps)


def test_half_the_bytes_halve_the_energy_of_moving_them_only() -> None:
    power = PowerDraw(idle_watts=10.0, busy_watts=100.0)
    moved = power.step_j(1.0, 1e12) - power.step_j(1.0)
    assert moved == pytest.approx(1e12 * MEMORY_J_PER_BYTE)
    assert power.step_j(1.0, 5e11) - power.step_j(1.0) == pytest.approx(moved / 2)


def test_a_roofline_pays_for_its_seconds_and_for_its_bytes() -> None:
    costs = RooflineCosts(shape=SpanShape(MODEL, MODEL.all_blocks, Formats()), device=DEVICES["l4"])
    work = StepWork.of([(1, 100)], sampled=1)
    moved = sum(operation.bytes for operation in costs.shape.operations(work))
    above_idle = (72 - 15) * costs.step_s(work)
    assert costs.energy_j(work) == pytest.approx(above_idle + moved * MEMORY_J_PER_BYTE)
    assert costs.idle_watts == 15
