"""ServeGen's clients: their files, and the requests that are drawn from them."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import (
    ArrivalWindow,
    LengthHistogram,
    ServeGenClient,
    format_servegen,
    format_trace,
    parse_servegen,
    parse_trace,
    synthesize_clients,
)

LINES = ["0,1.25,1.8,Gamma,0.31,2.58", "600,0.0,0.0,,0.0,0.0", "", "1200,4,0.5,Weibull,2.1,0.28"]
DATASET = '{"0": {"input_tokens": "{120: 0.25, 340: 0.75}", "output_tokens": "{64: 1.0}"}}'

fractions = st.lists(st.floats(0.01, 1), min_size=1, max_size=5)
histograms = fractions.map(
    lambda parts: LengthHistogram(
        tuple(range(3, 3 + 7 * len(parts), 7)), tuple(part / sum(parts) for part in parts)
    )
)
windows = st.builds(
    lambda rate, variation, family, first: ArrivalWindow(
        begin_s=0, rate_per_s=rate, variation=variation, family=family, parameters=(first, rate)
    ),
    st.floats(0, 1e5),
    st.floats(0, 50),
    st.sampled_from(["Gamma", "Weibull"]),
    st.floats(0, 1e9),
) | st.just(ArrivalWindow(begin_s=0))


def test_a_client_is_read() -> None:
    client = parse_servegen(LINES, DATASET, name="7", where="chunk-7")
    assert client.windows[0] == ArrivalWindow(
        begin_s=0, rate_per_s=1.25, variation=1.8, family="Gamma", parameters=(0.31, 2.58)
    )
    assert client.windows[1].family is None
    assert client.lengths_at(1200) == client.histograms[0]
    assert client.histograms[0]["input_tokens"] == LengthHistogram((120, 340), (0.25, 0.75))


@given(
    st.lists(windows, min_size=1, max_size=5),
    st.lists(st.tuples(histograms, histograms), max_size=3),
)
def test_servegen_round_trip(
    made: list[ArrivalWindow], lengths: list[tuple[LengthHistogram, LengthHistogram]]
) -> None:
    client = ServeGenClient(
        name="7",
        windows=tuple(
            ArrivalWindow(
                begin_s=600 * number,
                rate_per_s=window.rate_per_s,
                variation=window.variation,
                family=window.family,
                parameters=window.parameters,
            )
            for number, window in enumerate(made)
        ),
        histograms={
            600 * number: {"input_tokens": one, "output_tokens": other}
            for number, (one, other) in enumerate(lengths)
        },
    )
    lines, dataset = format_servegen(client)
    assert parse_servegen(lines, dataset, name="7", where="memory") == client


@pytest.mark.parametrize("family", ["Gamma", "Weibull"])
@pytest.mark.parametrize("variation", [0.5, 1.0, 2.5])
def test_arrivals_have_the_rate_and_the_variation_of_their_window(family: str, variation: float) -> None:
    lengths = {name: LengthHistogram((100,), (1.0,)) for name in ("input_tokens", "output_tokens")}
    client = ServeGenClient(
        name="7",
        windows=(
            ArrivalWindow(begin_s=0, rate_per_s=5.0, variation=variation, family=family),
            ArrivalWindow(begin_s=16_000),
            ArrivalWindow(begin_s=20_000, rate_per_s=50.0, variation=1.0, family=family),
        ),
        histograms={0: lengths},
    )
    trace = synthesize_clients([client], 20_800, np.random.default_rng(3))
    times_s = np.array([request.arrival_s for request in trace])
    first_s, second_s = times_s[times_s < 16_000], times_s[times_s >= 16_000]
    assert len(first_s) / 16_000 == pytest.approx(5.0, rel=0.03)
    gaps_s = np.diff(first_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(variation, rel=0.05)
    assert len(second_s) / 800 == pytest.approx(50.0, rel=0.03)
    assert second_s.min() >= 20_000
    twice = synthesize_clients([client], 8_000, np.random.default_rng(3), rate_scale=2.0)
    assert len(twice) / 8_000 == pytest.approx(10.0, rel=0.04)


def test_short_windows_of_bursty_clients_have_their_rate_too() -> None:
    lengths = {name: LengthHistogram((100,), (1.0,)) for name in ("input_tokens", "output_tokens")}
    short = tuple(
        ArrivalWindow(begin_s=30 * number, rate_per_s=0.2, variation=3.0, family="Gamma")
        for number in range(3000)
    )
    client = ServeGenClient(name="7", windows=short, histograms={0: lengths})
    trace = synthesize_clients([client], 90_000, np.random.default_rng(4))
    assert len(trace) / 90_000 == pytest.approx(0.2, rel=0.05)


def test_lengths_come_from_the_histogram_that_holds_and_clients_are_tenants() -> None:
    late = {"600": json.loads(DATASET)["0"], "0": {"input_tokens": "{9: 1.0}", "output_tokens": "{5: 1.0}"}}
    client = parse_servegen(
        ["0,3,1,Gamma,1,1", "600,3,1,Gamma,1,1"], json.dumps(late), name="a", where="memory"
    )
    other = parse_servegen(["0,3,1,Weibull,1,1"], DATASET, name="b", where="memory")
    trace = synthesize_clients([client, other], 6600, np.random.default_rng(5))
    assert [request.arrival_s for request in trace] == sorted(request.arrival_s for request in trace)
    assert {request.tenant for request in trace} == {"a", "b"}
    early = [request for request in trace if request.tenant == "a" and request.arrival_s < 600]
    assert {(request.prompt_tokens, request.output_tokens) for request in early} == {(9, 5)}
    rest = [request.prompt_tokens for request in trace if request.tenant == "b"]
    assert np.mean(np.array(rest) == 340) == pytest.approx(0.75, abs=0.02)
    assert parse_trace(format_trace(trace), where="memory") == trace
    assert trace == synthesize_clients([client, other], 6600, np.random.default_rng(5))


@pytest.mark.parametrize(
    ("lines", "dataset", "message"),
    [
        ([], "{}", "t holds no window"),
        (["0,1,1,Gamma,1"], "{}", "line 1 has 5 columns"),
        (["0,1,1,Poisson,1,1"], "{}", "line 1: family is 'Poisson'; known are Gamma, Weibull"),
        (["x,1,1,Gamma,1,1"], "{}", "line 1: timestamp must be a whole number"),
        (["0,nan,1,Gamma,1,1"], "{}", "line 1: rate must be a finite number"),
        (["0,-1,1,Gamma,1,1"], "{}", "line 1: rate must be"),
        (["0,1e999,1,Gamma,1,1"], "{}", "line 1: rate must be"),
        (["0,1e9,1,Gamma,1,1"], "{}", "line 1: no client asks 1e[+]09 times"),
        (["0,1,1,Gamma,1,1", "0,1,1,Gamma,1,1"], "{}", "line 2: window 0 does not come after"),
        (["0" * 500], "{}", "line 1 is longer than any window"),
        (LINES, "[]", "data set is not a JSON object"),
        (LINES, '{"0": 1}', "window '0' holds no histograms"),
        (LINES, '{"soon": {}}', "window must be a whole number"),
        (LINES, '{"0": {"input_tokens": [1]}}', "'input_tokens' is no histogram"),
        (LINES, '{"0": {"input_tokens": "{1: 0.5}"}}', "add up to 0.5"),
        (LINES, '{"0": {"input_tokens": "{-1: 1.0}"}}', "tokens must be a whole number"),
        (LINES, '{"0": {"input_tokens": "{1: 0.5, 1: 0.5}"}}', "length 1 comes twice"),
        (LINES, '{"0": {"input_tokens": "{__import__: 1}"}}', "tokens must be a whole number"),
    ],
)
def test_a_malformed_client_is_refused_with_its_place(lines: list[str], dataset: str, message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        parse_servegen(lines, dataset, name="7", where="t")


def test_a_client_without_lengths_cannot_be_drawn_from() -> None:
    client = parse_servegen(
        LINES, '{"0": {"input_tokens": "{}", "output_tokens": "{}"}}', name="7", where="t"
    )
    with pytest.raises(BadSetup, match="client '7' has no histograms"):
        synthesize_clients([client], 100, np.random.default_rng(0))
    often = parse_servegen(["0,1000000,1,Gamma,1,1"], DATASET, name="7", where="t")
    with pytest.raises(BadSetup, match="more requests than fit any trace"):
        synthesize_clients([often], 1e9, np.random.default_rng(0))


cells = st.sampled_from(["", "0", "600", "1.5", "-1", "nan", "1e999", "Gamma", "Weibull", "²", "9" * 50])
texts = st.sampled_from(["{}", "{1: 1.0}", "{1: nan}", "{1}", "[", "{1: 1.0, 2: 0}", "{" * 50, "{1: 1e999}"])


@given(
    st.lists(st.lists(cells, min_size=5, max_size=7).map(",".join) | st.text(max_size=30), max_size=4),
    st.dictionaries(
        st.sampled_from(["0", "600", "-1", "²"]),
        st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "x"]), texts | st.integers())
        | st.none(),
        max_size=3,
    ),
)
def test_no_client_does_more_than_be_refused(lines: list[str], dataset: object) -> None:
    with contextlib.suppress(BadSetup):
        client = parse_servegen(lines, json.dumps(dataset), name="fuzz", where="fuzz")
        synthesize_clients([client], 5.0, np.random.default_rng(0), rate_scale=0.1)
