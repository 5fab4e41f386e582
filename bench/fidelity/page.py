"""The figures of docs/fidelity.md, written from the results: nothing is copied by hand."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fidelity.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- figures: written by `python bench/fidelity.py --page` -->"
END = "<!-- end of figures -->"
LINE = 138
NAMES = ("fidelity", "fidelity_medium")


def write_page() -> None:
    """Replace what stands between the two marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    found = [RESULTS / f"{name}.json" for name in NAMES if (RESULTS / f"{name}.json").is_file()]
    lines = [line for file in found for line in section(json.loads(file.read_text(encoding="utf-8")))]
    body = "\n".join(lines) if lines else "Not measured yet.\n"
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", encoding="utf-8")


def section(result: dict[str, Any]) -> Iterator[str]:
    """One result as a heading, paragraphs and tables."""
    summary = result["summary"]
    yield f"### `{result['settings']['name']}`, {result['date']}"
    yield ""
    yield from textwrap.wrap(setting(result), LINE)
    yield ""
    yield "| level | what | simulated against live | goal | live against live | |"
    yield "|---|---|---|---|---|---|"
    for figure in summary["figures"]:
        yield row(figure)
    yield ""
    yield from textwrap.wrap(one_number(summary), LINE)
    yield ""
    yield "| single requests | TTFT off by | live against live | E2E off by | live against live |"
    yield "|---|---|---|---|---|"
    for load, details in summary["L2 and L3"]["loads"].items():
        cells = [f"at {_percent(float(load))} of capacity"]
        for name in ("TTFT", "E2E"):
            each = details[f"{name} of each request"]
            cells.append(f"{each['mae_s'] * 1e3:.2f} ms, {_percent(each['mape'])}")
            cells.append(f"{each['floor_mae_s'] * 1e3:.2f} ms, {_percent(each['floor_mape'])}")
        yield "| " + " | ".join(cells) + " |"
    yield ""


def setting(result: dict[str, Any]) -> str:
    """What ran where, and what calibration said."""
    settings, summary, hardware = result["settings"], result["summary"], result["hardware"]
    before, disturbed = summary["before"], summary["L2 and L3"]["disturbed"]
    host = {name: value * 1e6 for name, value in before["calibration"]["host"].items()}
    share = summary["L2 and L3"]["steps"]["kernels_share_of_steps"]
    return (
        f"One thread of {hardware['cpu']} ({hardware['cores']} cores); {settings['seeds']} traces of "
        f"{settings['requests']} requests at each load, {settings['repeats']} live runs of each. Capacity "
        f"{before['capacity_requests_per_s']:.1f} requests/s, simulated "
        f"{before['simulated_capacity_requests_per_s']:.1f}. The host's part: {host['per_step_s']:.0f} µs a step, "
        f"{host['per_sequence_s']:.0f} a sequence, {host['per_token_s']:.1f} a token, {host['per_sample_s']:.0f} a "
        f"sampled row; kernels are {_percent(share)} of the steps. Live runs that stayed disturbed though they were "
        f"repeated: {disturbed['not_calm']} of {disturbed['runs']}; the worst lost "
        f"{_percent(disturbed['worst_fraction'])}. The whole took {summary['duration_s'] / 60:.0f} minutes."
    )


def one_number(summary: dict[str, Any]) -> str:
    """Means over all loads, and the kernels apart from the host."""
    means = {name: _percent(value) for name, value in summary["compared"]["plait"].items()}
    steps = summary["L2 and L3"]["steps"]
    return (
        "In one number, as others state it: throughput and medians of all loads are off by "
        f"{means['throughput and medians, simulated']} on average (live again: "
        f"{means['throughput and medians, live again']}), with the P99s by {means['with P99, simulated']} (live again: "
        f"{means['with P99, live again']}). The kernels alone are off by {_percent(steps['kernels_mape'])} a step, "
        f"with a bias of {_percent(steps['kernels_bias'], '+')}, their sum over all steps by "
        f"{_percent(steps['kernels_total_error'], '+')}; {steps['judged']} of {steps['steps']} steps were judged."
    )


def _percent(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}".replace("%", " %")


def row(figure: dict[str, Any]) -> str:
    """One figure as a line of the table."""
    shown = [_shown(figure["value"], figure, signed=True), _goal(figure)]
    shown.append("" if figure["floor"] is None else _shown(figure["floor"], figure))
    return f"| {figure['level']} | {figure['what']} | {' | '.join(shown)} | {'' if figure['holds'] else 'missed'} |"


def _goal(figure: dict[str, Any]) -> str:
    words = "at least " if figure["at_least"] else ""
    return words + _shown(figure["goal"], figure)


def _shown(value: float, figure: dict[str, Any], *, signed: bool = False) -> str:
    if figure["unit"] == "steps":
        return f"{value:.0f}"
    if figure["unit"] == "":
        return f"{value:.2f}"
    return _percent(value, "+" if signed else "")
