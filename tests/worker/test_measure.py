"""Measuring takes the time it is given, counts per block, and is remembered for the same machine and model."""

from dataclasses import replace
from pathlib import Path

import pytest

from plait.cluster import PeerRates
from plait.engine import EngineOptions, SpanEngine, load_span_engine, resolve_model
from plait.worker.measure import KeptRates, MeasuredOn, measure_rates

MEASURED_ON = MeasuredOn(model="0123", weight_format="bf16", kv_format="bf16", device="cpu", threads=2)
RATES = PeerRates(decode_tokens_per_s=300.0, saturated_decode_tokens_per_s=900.0, prefill_tokens_per_s=5000.0)


class StepClock:
    """Every reading is later by what a step would take."""

    def __init__(self, reading_s: float) -> None:
        self.now_s = 0.0
        self._reading_s = reading_s

    def __call__(self) -> float:
        self.now_s += self._reading_s
        return self.now_s


def engine(blocks: range, kv_cache_bytes: int = 2**24) -> SpanEngine:
    options = EngineOptions(folder=resolve_model("tiny"), kv_cache_bytes=kv_cache_bytes, threads=1)
    return load_span_engine(options, blocks)


@pytest.mark.parametrize("blocks", [range(2), range(2, 4), range(4, 6)], ids=["first", "middle", "last"])
def test_every_rate_of_any_span_is_measured_and_nothing_is_left_behind(blocks: range) -> None:
    span = engine(blocks)
    rates = measure_rates(span.decoder, span.store, budget_s=0.2)
    assert rates.saturated_decode_tokens_per_s >= rates.decode_tokens_per_s > 0
    assert rates.prefill_tokens_per_s > 0
    assert rates.network_tokens_per_s == 0
    span.check()
    assert span.load().kv_free_tokens == span.load().kv_total_tokens


def test_rates_count_blocks_not_spans() -> None:
    span = engine(range(1, 5))
    rates = measure_rates(span.decoder, span.store, clock=StepClock(0.1))
    # One step takes one reading of the clock: 4 blocks in 0.1 s.
    assert rates.decode_tokens_per_s == pytest.approx(40.0)


@pytest.mark.parametrize("reading_s", [0.001, 0.05, 1.0, 100.0])
def test_a_slow_machine_measures_no_longer_than_a_fast_one(reading_s: float) -> None:
    span = engine(range(1, 2))
    clock = StepClock(reading_s)
    measure_rates(span.decoder, span.store, budget_s=3.0, clock=clock)
    # Beyond the budget only what has been begun: a handful of steps.
    assert clock.now_s <= 3.0 + 20 * reading_s


def test_little_kv_memory_is_enough() -> None:
    options = EngineOptions(folder=resolve_model("tiny"), kv_cache_bytes=2**18, threads=1)
    span = load_span_engine(options, range(2))
    assert measure_rates(span.decoder, span.store, budget_s=0.1).decode_tokens_per_s > 0


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    kept = KeptRates(tmp_path)
    assert kept.find(MEASURED_ON) is None
    kept.keep(MEASURED_ON, RATES)
    assert KeptRates(tmp_path).find(MEASURED_ON) == RATES
    for other in (replace(MEASURED_ON, model="4567"), replace(MEASURED_ON, threads=1)):
        assert kept.find(other) is None
    kept.keep(replace(MEASURED_ON, threads=1), replace(RATES, decode_tokens_per_s=1.0))
    assert kept.find(MEASURED_ON) == RATES


@pytest.mark.parametrize("text", ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"decode_tokens_per_s": -1}}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    kept = KeptRates(tmp_path)
    kept.path.write_text(text.replace("KEY", MEASURED_ON.key))
    assert kept.find(MEASURED_ON) is None
    kept.keep(MEASURED_ON, RATES)
    assert kept.find(MEASURED_ON) == RATES


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    KeptRates(blocked / "below").keep(MEASURED_ON, RATES)
