"""ServeGen's clients (Xiang et al., NSDI 2026): for each client and window how often it asks, how unevenly, how much.

A client is two files, `chunk-7-trace.csv` and `chunk-7-dataset.json`. The first has a line for each window, without a
heading: its begin in seconds, requests per second, the coefficient of variation of the gaps, the family of their
distribution (Gamma or Weibull) with the two parameters that were fitted; a window in which nothing was asked has no
family. The second has histograms of lengths for some of the windows, which hold until the next one; fields that count
no tokens are left out:

    600,1.25,1.8,Gamma,0.31,2.58
    {"0": {"input_tokens": "{120: 0.5, 340: 0.5}", "output_tokens": "{64: 1.0}"}}

Most of a service's burstiness comes from a few such clients, so a workload is drawn client by client.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from plait.errors import BadSetup
from plait.workload.fields import json_object, whole_number
from plait.workload.traces import TraceRequest

FAMILIES = ("Gamma", "Weibull")
_COLUMNS: tuple[str, ...] = ("timestamp", "rate", "cv", "family", "first", "second")
_MOST_LINE_CHARACTERS = 400
_MOST_RATE_PER_S = 1e6
_MOST_VARIATION = 100.0
_MOST_REQUESTS = 10_000_000


@dataclass(frozen=True, slots=True)
class LengthHistogram:
    """Lengths in tokens, ascending, and the fraction of requests that have each."""

    tokens: tuple[int, ...]
    fractions: tuple[float, ...]

    def draw(self, count: int, rng: Generator) -> Sequence[int]:
        fractions = np.asarray(self.fractions)
        return np.maximum(1, rng.choice(self.tokens, size=count, p=fractions / fractions.sum())).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalWindow:
    """How a client asks from `begin_s` on until its next window. `family` None: not at all.

    `parameters` are those of the published fit; gaps are drawn from the rate and the variation, which say the same.
    """

    begin_s: int
    rate_per_s: float = 0.0
    variation: float = 0.0
    family: str | None = None
    parameters: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeGenClient:
    """One client: its windows in order, and the histograms by field name of those windows that have some."""

    name: str
    windows: tuple[ArrivalWindow, ...]
    histograms: Mapping[int, Mapping[str, LengthHistogram]] = field(
        default_factory=dict[int, Mapping[str, LengthHistogram]]
    )

    def lengths_at(self, begin_s: int) -> Mapping[str, LengthHistogram] | None:
        """The histograms that hold in a window; None before the first."""
        known = [at_s for at_s in self.histograms if at_s <= begin_s]
        return self.histograms[max(known)] if known else None


def parse_servegen(lines: Iterable[str], dataset: str, *, name: str, where: str) -> ServeGenClient:
    """Read a client: the lines of its trace, the text of its data set.

    Raises:
        BadSetup: something is malformed; the message names the place.
    """
    windows: list[ArrivalWindow] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        window = _window(line, f"{where}, line {number}")
        if windows and window.begin_s <= windows[-1].begin_s:
            raise BadSetup(
                f"{where}, line {number}: window {window.begin_s} does not come after the one above"
            )
        windows.append(window)
    if not windows:
        raise BadSetup(f"{where} holds no window; a line has {', '.join(_COLUMNS)}")
    return ServeGenClient(name=name, windows=tuple(windows), histograms=_histograms(dataset, where))


def format_servegen(client: ServeGenClient) -> tuple[Iterator[str], str]:
    """The lines of a client's trace and the text of its data set; reading them gives an equal client."""
    lines = (
        f"{window.begin_s},{window.rate_per_s!r},{window.variation!r},{window.family or ''},"
        f"{window.parameters[0]!r},{window.parameters[1]!r}"
        for window in client.windows
    )
    dataset = {
        str(at_s): {
            name: "{" + ", ".join(f"{tokens}: {part!r}" for tokens, part in _bins(histogram)) + "}"
            for name, histogram in fields.items()
        }
        for at_s, fields in client.histograms.items()
    }
    return lines, json.dumps(dataset)


def synthesize_clients(
    clients: Sequence[ServeGenClient],
    until_s: float,
    rng: Generator,
    *,
    rate_scale: float = 1.0,
) -> tuple[TraceRequest, ...]:
    """The requests of clients until `until_s`, in order; each client is a tenant. A last window lasts until then.

    Within a window gaps are drawn from its family with its mean and variation, the first as somebody finds it who
    looks at any time, so that short windows have their rate too.

    Raises:
        BadSetup: a client asks in a window without lengths, or more often than anybody could.
    """
    found: list[TraceRequest] = []
    for client in clients:
        ends_s = [*(float(window.begin_s) for window in client.windows[1:]), math.inf]
        for window, end_s in zip(client.windows, ends_s, strict=True):
            end_s = min(end_s, until_s)
            if window.family is None or window.rate_per_s <= 0 or end_s <= window.begin_s:
                continue
            lengths = client.lengths_at(window.begin_s)
            if lengths is None or not {"input_tokens", "output_tokens"} <= lengths.keys():
                raise BadSetup(
                    f"client {client.name!r} has no histograms of input_tokens and output_tokens at {window.begin_s} s"
                )
            at_s = _arrivals_s(window, end_s - window.begin_s, rate_scale, rng)
            prompts, outputs = (
                lengths[name].draw(len(at_s), rng) for name in ("input_tokens", "output_tokens")
            )
            found.extend(
                TraceRequest(
                    arrival_s=window.begin_s + after_s,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    tenant=client.name,
                )
                for after_s, prompt, output in zip(at_s, prompts, outputs, strict=True)
            )
    return tuple(sorted(found, key=lambda request: request.arrival_s))


def _arrivals_s(window: ArrivalWindow, length_s: float, rate_scale: float, rng: Generator) -> list[float]:
    rate = window.rate_per_s * rate_scale
    expected = rate * length_s
    if expected > _MOST_REQUESTS:
        raise BadSetup(
            f"a window of {length_s:g} s with {rate:g} requests/s has more requests than fit any trace"
        )
    draw = _gaps_s(window, rate)
    # Renewal from far before the window's begin: whoever looks then is in the middle of a gap.
    before_s = 20 * max(1.0, window.variation**2) / rate
    times_s: list[NDArray[np.float64]] = []
    at_s = -before_s
    while at_s < length_s:
        batch_s = at_s + np.cumsum(draw(max(64, int(1.2 * expected)), rng))
        times_s.append(batch_s)
        at_s = float(batch_s[-1])
    every_s = np.concatenate(times_s)
    return every_s[(every_s >= 0) & (every_s < length_s)].tolist()


def _gaps_s(window: ArrivalWindow, rate: float) -> Callable[[int, Generator], NDArray[np.float64]]:
    """Draws gaps with mean `1 / rate` and the window's variation."""
    variation = max(window.variation, 1e-3)
    if window.family == "Gamma":
        shape = variation**-2
        return lambda count, rng: rng.gamma(shape, 1 / (shape * rate), size=count)
    weibull = _weibull_shape(variation)
    scale_s = 1 / (rate * math.gamma(1 + 1 / weibull))
    return lambda count, rng: scale_s * rng.weibull(weibull, size=count)


def _weibull_shape(variation: float) -> float:
    """The shape of a Weibull distribution with this coefficient of variation, which falls with the shape."""
    low, high = math.log(0.1), math.log(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        mean_log = math.lgamma(1 + math.exp(-middle))
        squared = math.expm1(math.lgamma(1 + 2 * math.exp(-middle)) - 2 * mean_log)
        low, high = (middle, high) if squared > variation**2 else (low, middle)
    return math.exp(high)


def _window(line: str, place: str) -> ArrivalWindow:
    if len(line) > _MOST_LINE_CHARACTERS:
        raise BadSetup(f"{place} is longer than any window: {len(line)} characters")
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_COLUMNS):
        raise BadSetup(f"{place} has {len(cells)} columns, and a window has {', '.join(_COLUMNS)}")
    fields: Mapping[str, str] = dict(zip(_COLUMNS, cells, strict=True))
    begin_s = whole_number(fields, "timestamp", place)
    if not fields["family"]:
        return ArrivalWindow(begin_s=begin_s)
    if fields["family"] not in FAMILIES:
        raise BadSetup(f"{place}: family is {fields['family']!r:.40}; known are {', '.join(FAMILIES)}")
    window = ArrivalWindow(
        begin_s=begin_s,
        rate_per_s=_number(fields, "rate", place),
        variation=_number(fields, "cv", place),
        family=fields["family"],
        parameters=(_number(fields, "first", place), _number(fields, "second", place)),
    )
    if window.rate_per_s > _MOST_RATE_PER_S or window.variation > _MOST_VARIATION:
        raise BadSetup(
            f"{place}: no client asks {window.rate_per_s:g} times a second with gaps that vary by {window.variation:g}"
        )
    return window


def _number(fields: Mapping[str, str], name: str, place: str) -> float:
    try:
        value = float(fields[name]) if len(fields[name]) <= 40 else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise BadSetup(f"{place}: {name} must be a finite number from 0 on, not {fields[name]!r:.60}")
    return value


def _histograms(dataset: str, where: str) -> Mapping[int, Mapping[str, LengthHistogram]]:
    found: dict[int, Mapping[str, LengthHistogram]] = {}
    for at, fields in json_object(dataset, f"{where}, data set", ()).items():
        place = f"{where}, window {at!r:.20}"
        if not isinstance(fields, dict):
            raise BadSetup(f"{place} holds no histograms")
        named = {
            name: _histogram(text, f"{place}, {name!r:.40}")
            for name, text in cast("dict[str, object]", fields).items()
            if name.endswith("_tokens")
        }
        at_s = whole_number({"window": at}, "window", place)
        if at_s in found:
            raise BadSetup(f"{place} comes twice")
        whole = {name: histogram for name, histogram in named.items() if histogram is not None}
        if len(whole) == len(named):  # an empty one: nothing was asked
            found[at_s] = whole
    return dict(sorted(found.items()))


def _histogram(text: object, place: str) -> LengthHistogram | None:
    """A histogram written as Python writes a dictionary; None: an empty one."""
    if not isinstance(text, str) or text[:1] != "{" or text[-1:] != "}":
        raise BadSetup(f"{place} is no histogram such as '{{120: 0.5, 340: 0.5}}'")
    bins: dict[int, float] = {}
    for pair in text[1:-1].split(","):
        if not pair.strip():
            continue
        tokens, _, fraction = pair.partition(":")
        fields = {"tokens": tokens.strip(), "fraction": fraction.strip()}
        length = whole_number(fields, "tokens", place)
        if length in bins:
            raise BadSetup(f"{place}: length {length} comes twice")
        bins[length] = _number(fields, "fraction", place)
    if not bins:
        return None
    if not 0.99 <= sum(bins.values()) <= 1.01:
        raise BadSetup(f"{place}: its fractions add up to {sum(bins.values()):g}, not to 1")
    ordered = sorted(bins)
    return LengthHistogram(tuple(ordered), tuple(bins[tokens] for tokens in ordered))


def _bins(histogram: LengthHistogram) -> Iterator[tuple[int, float]]:
    return zip(histogram.tokens, histogram.fractions, strict=True)
