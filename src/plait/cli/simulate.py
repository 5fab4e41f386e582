"""`plait simulate`: what would happen on machines that one does not have."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.terminal import JsonFlag, note, print_fields, print_json, print_table, say
from plait.errors import BadSetup
from plait.units import format_s

_PROGRESS_S = 5.0


def simulate(
    scenario: Annotated[
        str,
        typer.Argument(help="A scenario (YAML), or an embedded one: replicas, swarm.", metavar="SCENARIO"),
    ],
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Another seed than the scenario's.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a timeline for chrome://tracing or Perfetto.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the latencies (needs plait[bench] for matplotlib).")
    ] = None,
    until_event: Annotated[
        int | None, typer.Option("--until-event", help="Stop after so many events and print the latest.")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option("--check", help="Walk all books after every event, some of them, or at the end."),
    ] = None,
    force_profile: Annotated[
        bool,
        typer.Option("--force-profile", help="Take profiles of other machines than this one at their word."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Run a scenario: cluster, model, workload, policies and faults in, the words of serving out.

    The schedulers and the router are those that serve; only steps and links are estimated.
    """
    from plait import simulator

    file = _file(scenario)
    read = simulator.load_scenario(file)
    if seed is not None:
        read = read.model_copy(update={"seed": seed})
    if check is not None:
        if check not in ("event", "some", "end"):
            raise BadSetup(f"--check takes event, some or end, not {check!r}")
        read = read.model_copy(update={"run": read.run.model_copy(update={"check": check})})
    if force_profile:
        forced = tuple(part.model_copy(update={"force_profile": True}) for part in read.machines)
        read = read.model_copy(update={"machines": forced})
    timeline = simulator.Timeline() if trace is not None else None
    run = simulator.run_of_scenario(read, file.parent, timeline=timeline)
    stopped, requests = False, read.workload.requests or 0
    try:
        run.run(until_event=until_event, on_progress=_progress(run, requests))
    except KeyboardInterrupt:
        stopped = True
        run.settle()
        note(f"stopped: what follows is of the {len(run.outcomes)} requests that were over by then")
    if until_event is not None:
        _print_stopped(run, json)
        return
    report = {"scenario": read.name or scenario, **simulator.report_of(run, simulator.objectives_of(read))}
    if timeline is not None and trace is not None:
        timeline.write(trace)
        note(f"written to {trace}")
    if plot is not None:
        _draw(simulator.latency_samples(run.outcomes), str(report["scenario"]), plot)
        note(f"written to {plot}")
    if json:
        print_json(report)
    else:
        _print_report(report)
    if stopped:
        raise typer.Exit(130)


def _progress(run: Any, requests: int) -> Callable[[], None]:
    """Says now and then, on a terminal, how far a run is."""
    began_s = said_s = time.monotonic()

    def say_how_far() -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s >= _PROGRESS_S and sys.stderr.isatty():
            said_s = now_s
            over = len(run.outcomes)
            left_s = (requests - over) * (now_s - began_s) / over if over else 0.0
            about = f", about {format_s(left_s)} left" if left_s > 0 else ""
            note(f"{over} requests are over, {format_s(run.heap.now_s)} simulated{about}")

    return say_how_far


def _file(scenario: str) -> Path:
    from plait import simulator

    file = Path(scenario)
    if file.exists():
        return file
    embedded = Path(simulator.__file__).parent / "scenarios"
    known = sorted(path.stem for path in embedded.glob("*.yaml"))
    if scenario in known:
        return embedded / f"{scenario}.yaml"
    raise BadSetup(
        f"there is no scenario {scenario!r}: no file, and the embedded ones are {', '.join(known)}"
    )


def _print_stopped(run: Any, json: bool) -> None:
    stopped = {"events": run.heap.events, "virtual_s": run.heap.now_s, "digest": run.heap.digest()}
    standing = [flight.standing() for flight in run.path.flights.values()]
    if json:
        print_json({**stopped, "latest": run.heap.recent().splitlines(), "requests": standing})
        return
    print_fields(stopped)
    say(run.heap.recent())
    for line in standing:
        say(line)


def _print_report(report: dict[str, Any]) -> None:
    requests, steady = report["requests"], report["steady"]
    say(f"{report['scenario']}, seed {report['seed']}")
    print_fields(
        {
            "requests": f"{requests['offered']} offered, {requests['finished']} finished, {requests['refused']} "
            f"refused, {requests['failed']} failed, {requests['moved']} moved to other machines",
            "time": f"{format_s(report['virtual_s'])} in {report['events']} events",
            "throughput": f"{steady.get('requests_per_s', 0):.3g} requests/s, "
            f"{steady.get('output_tokens_per_s', 0):.4g} output tokens/s, "
            f"{steady.get('input_tokens_per_s', 0):.4g} input tokens/s",
            "attainment": f"{report['attainment_fraction']:.1%} within {_objectives(report['objectives'])}",
            "goodput": f"{steady.get('goodput_requests_per_s', 0):.3g} requests/s",
            "energy": f"{report['cluster']['joules_per_output_token']:.3g} J per output token",
            **_lending(report["lending"]),
            "digest": report["digest"],
        }
    )
    for reason, count in requests["reasons"].items():
        say(f"{count} requests: {reason}")
    say()
    columns = ("mean", "p50", "p90", "p95", "p99")
    rows = [
        [name, *(format_s(values[column]["value"]) for column in columns), format_s(values["max"])]
        for name, values in report["latency_s"].items()
    ]
    print_table(["latency", *columns, "max"], rows)
    say()
    print_table(
        ["machine", "busy", "batch", "MFU", "MBU", "preempted", "KV held", "KV useful", "cache hits"],
        [
            [
                name,
                f"{machine['busy_fraction']:.0%}",
                f"{machine['mean_batch']:.1f}",
                *(_share(machine[each]) for each in ("mfu_fraction", "mbu_fraction")),
                str(machine["preemptions"]),
                f"{machine['held_kv_fraction']:.0%}",
                f"{machine['useful_kv_fraction']:.0%}",
                f"{machine['cache_hit_fraction']:.0%}",
            ]
            for name, machine in report["machines"].items()
        ],
    )


def _lending(lending: dict[str, Any] | None) -> dict[str, str]:
    """One line of what machines lent each other, if they do."""
    if lending is None:
        return {}
    return {
        "lending": f"{lending['blocks_moved_out']} blocks moved out, {lending['blocks_moved_home']} home, "
        f"{lending['blocks_lost']} lost; {lending['waited_fraction']:.1%} of steps' time waiting for other machines"
    }


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"


def _objectives(limits: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "no limit"


def _draw(samples: dict[str, Any], title: str, file: Path) -> None:
    """The share of requests (of gaps) that took at most so long."""
    from importlib import import_module

    import numpy as np

    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError:
        raise BadSetup("--plot needs matplotlib; install plait[bench]") from None
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")  # its types are partial
    canvas, axes = pyplot.subplots(figsize=(6, 4))
    for name, values in samples.items():
        if len(values):
            ordered = np.sort(values)[:: max(1, len(values) // 5000)]
            axes.plot(ordered, np.linspace(0, 1, len(ordered)), label=name)
    axes.set(title=title, xlabel="seconds", ylabel="share of requests (itl: of gaps)", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.tight_layout()
    try:
        canvas.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise BadSetup(f"the plot cannot be written to {str(file)!r}: {error}") from error
    pyplot.close(canvas)
