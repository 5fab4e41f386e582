import json
from dataclasses import replace

import pytest

from plait.costs import (
    PROFILE_FORMAT,
    PROFILE_VERSION,
    HostOverhead,
    LiveFactors,
    OperationSample,
    PredictionErrors,
    Profile,
    ProfiledModel,
    SharedLink,
    SpanFacts,
    StepWork,
    check_fingerprint,
    format_profile,
    parse_profile,
    predict,
    tables_of,
)
from plait.errors import BadSetup, MissingCost

SAMPLES = (
    *(
        OperationSample(operation="dense", row=0, place=place, seconds=place * 0.1, spread_fraction=0.0)
        for place in (1, 2, 4, 8)
    ),
    OperationSample(operation="dense", row=0, place=3, seconds=0.5, spread_fraction=0.1, held_out=True),
    OperationSample(operation="head", row=0, place=1, seconds=0.25, spread_fraction=0.0),
    *(
        OperationSample(
            operation=operation, row=row, place=place, seconds=row * place * 1e-3, spread_fraction=0.0
        )
        for operation in ("prefill", "decode")
        for row in (1, 8)
        for place in (0, 100)
    ),
)
PROFILE = Profile(
    format=PROFILE_FORMAT,
    version=PROFILE_VERSION,
    date="2026-01-01",
    fingerprint={"processor": "A", "threads": "2"},
    versions={"plait": "0"},
    model=ProfiledModel(
        name="small",
        shape="abc",
        first_block=0,
        end_block=8,
        model_blocks=8,
        equal_blocks=True,
        weight_format="bf16",
        kv_format="bf16",
    ),
    clock="wall",
    facts=SpanFacts(weight_bytes=800, kv_bytes_per_token=80, hidden_bytes_per_token=4),
    temperature=1.0,
    host=HostOverhead(per_step_s=1e-3),
    factors=LiveFactors(),
    tables=tables_of(SAMPLES, 500),
    regression=(1e-3, 1e-4, 0.0, 1e-6, 0.0, 0.0),
    links={"loopback": SharedLink(bandwidth_bytes_per_s=1e9, one_way_s=1e-5)},
    samples=SAMPLES,
    errors={
        "dense": PredictionErrors(count=1, median=0.1, p95=0.1, mean=0.1, bias=-0.1, log_spread=0.0),
    },
)


def test_reading_what_was_written_gives_an_equal_profile() -> None:
    assert parse_profile(format_profile(PROFILE), where="memory") == PROFILE


def test_what_was_held_out_is_left_out_when_asked() -> None:
    held_out = next(sample for sample in SAMPLES if sample.held_out)
    assert predict(tables_of(SAMPLES, 500), held_out) == 0.5
    assert predict(tables_of(SAMPLES, 500, use_held_out=False), held_out) == pytest.approx(0.3)


def test_a_span_has_its_share_and_the_parts_add_up() -> None:
    work = StepWork.of([(1, 50), (4, 0)], sampled=1)
    for costs_of in (PROFILE.table_costs, PROFILE.regression_costs):
        parts = [costs_of(range(3)), costs_of(range(3, 8))]
        assert sum(part.step_s(work) for part in parts) == pytest.approx(costs_of().step_s(work))
        assert [part.weight_bytes for part in parts] == [300, 500]
        assert parts[0].host_s(work) == 1e-3
    with pytest.raises(MissingCost, match="blocks 4:9 of 'small' were not measured"):
        PROFILE.table_costs(range(4, 9))


def test_a_few_blocks_stand_for_all_where_all_are_equal() -> None:
    work = StepWork.of([(1, 50), (4, 0)], sampled=0)
    last_two = replace(PROFILE, model=replace(PROFILE.model, first_block=6))
    assert last_two.table_costs().step_s(work) == pytest.approx(4 * PROFILE.table_costs().step_s(work))
    assert last_two.table_costs().weight_bytes == 800
    unequal = replace(last_two, model=replace(last_two.model, equal_blocks=False))
    assert unequal.table_costs(range(7, 8)).step_s(work) == pytest.approx(
        PROFILE.table_costs().step_s(work) / 2
    )
    with pytest.raises(MissingCost, match="only 6:8"):
        unequal.table_costs()


def test_a_profile_of_another_machine_is_refused_unless_forced() -> None:
    check_fingerprint(PROFILE, {"processor": "A", "threads": "2"})
    other = {"processor": "B", "threads": "2"}
    with pytest.raises(BadSetup, match="processor 'A' there and 'B' here"):
        check_fingerprint(PROFILE, other)
    with pytest.raises(BadSetup, match="threads '2' there and 'unknown' here"):
        check_fingerprint(PROFILE, {"processor": "A"})
    check_fingerprint(PROFILE, other, force=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "my.json is no profile"),
        ("[]", "my.json is no profile"),
        (json.dumps({**json.loads(format_profile(PROFILE)), "version": 99}), "of version 99"),
        (json.dumps({**json.loads(format_profile(PROFILE)), "clock": "sun"}), "is no profile"),
        ("x" * (5 << 20), "larger than any profile"),
    ],
)
def test_what_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        parse_profile(text, where="my.json")


def test_a_table_that_does_not_ascend_is_refused() -> None:
    broken = json.loads(format_profile(PROFILE))
    broken["tables"]["dense"]["places"] = [4, 3, 2, 1, 0]
    with pytest.raises(BadSetup, match="ascend"):
        parse_profile(json.dumps(broken), where="my.json")


def test_tables_need_what_every_token_passes() -> None:
    with pytest.raises(MissingCost, match="every token passes"):
        tables_of([replace(SAMPLES[0], operation="head")], 1)


def test_a_regression_answers_beyond_what_was_measured_and_counts_it() -> None:
    costs = PROFILE.regression_costs()
    within, beyond = StepWork.of([(1, 50), (4, 0)], sampled=1), StepWork.of([(1, 200), (4, 0)], sampled=1)
    assert costs.step_s(within) < costs.step_s(beyond)
    assert costs.extrapolated_steps == 1
    costs.energy_j(beyond)
    assert costs.extrapolated_steps == 1
    first = PROFILE.regression_costs(range(3))
    first.step_s(StepWork.of([(2, 0)] * 2, sampled=9))  # the head is another span's
    assert first.extrapolated_steps == 0
