"""The figures of docs/fidelity.md, written from the results: nothing is copied by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fidelity.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- figures: written by `python bench/fidelity.py --page` -->"
END = "<!-- end of figures -->"
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
    """One result as a heading, a paragraph, and tables."""
    settings, summary, hardware = result["settings"], result["summary"], result["hardware"]
    before, judged = summary["before"], summary["L2 and L3"]
    host = before["calibration"]["host"]
    yield f"### `{settings['name']}`, {result['date']}"
    yield ""
    yield (
        f"One thread of {hardware['cpu']} ({hardware['cores']} cores); {settings['seeds']} traces of "
        f"{settings['requests']} requests at each load, {settings['repeats']} live runs of each."
    )
    yield (
        f"Capacity {before['capacity_requests_per_s']:.1f} requests/s, simulated "
        f"{before['simulated_capacity_requests_per_s']:.1f}. The whole took {summary['duration_s'] / 60:.0f} minutes."
    )
    yield (
        f"The host's part: {host['per_step_s'] * 1e6:.0f} µs a step, {host['per_sequence_s'] * 1e6:.0f} a sequence, "
        f"{host['per_token_s'] * 1e6:.1f} a token, {host['per_sample_s'] * 1e6:.0f} a sampled row; kernels are "
        f"{judged['steps']['kernels_share_of_steps']:.0%} of a step."
    )
    yield (
        f"Live runs that were disturbed though repeated: {judged['disturbed']['not_calm']} of "
        f"{judged['disturbed']['runs']}; the worst lost {judged['disturbed']['worst_fraction']:.1%} of its time."
    )
    yield ""
    yield "| level | what | simulated against live | goal | live against live | |"
    yield "|---|---|---|---|---|---|"
    for figure in summary["figures"]:
        yield row(figure)
    yield ""
    yield "| single requests | TTFT off by | live against live | E2E off by | live against live |"
    yield "|---|---|---|---|---|"
    for load, details in judged["loads"].items():
        cells = [f"at {float(load):.0%} of capacity".replace("%", " %")]
        for name in ("TTFT", "E2E"):
            each = details[f"{name} of each request"]
            cells.append(f"{each['mae_s'] * 1e3:.2f} ms, {each['mape']:.1%}".replace("%", " %"))
            cells.append(f"{each['floor_mae_s'] * 1e3:.2f} ms, {each['floor_mape']:.1%}".replace("%", " %"))
        yield "| " + " | ".join(cells) + " |"
    yield ""


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
    return f"{value:+.1%}".replace("%", " %") if signed else f"{value:.1%}".replace("%", " %")
