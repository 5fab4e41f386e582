"""`plait bench serve`: measure a running server, plait's or anybody's."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from plait.cli.terminal import JsonFlag, note, print_json, say
from plait.errors import BadSetup

bench = typer.Typer(no_args_is_help=True, help="Measure servers.")


@bench.callback()
def options() -> None:
    """Measure servers."""


@bench.command("serve")
def bench_serve(
    base_url: Annotated[
        str, typer.Option(envvar="OPENAI_BASE_URL", help="The server; may end in /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its model; without it the first it lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Its key.")] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "completions",
    dataset: Annotated[
        str, typer.Option("--dataset-name", "--dataset", help="A mix of lengths, random, or trace.")
    ] = "sharegpt-like",
    dataset_path: Annotated[Path | None, typer.Option(help="The file of --dataset-name trace.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests to send.")] = 100,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1 is Poisson; below 1 burstier, above 1 steadier.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests at a time.")] = None,
    random_input_len: Annotated[int, typer.Option(help="Prompt tokens of --dataset-name random.")] = 512,
    random_output_len: Annotated[int, typer.Option(help="Answer tokens of --dataset-name random.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(help="How far those lengths spread, as a fraction.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Let answers reach their full length.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws arrivals, lengths and prompts.")] = 0,
    request_timeout: Annotated[float, typer.Option(help="Seconds until a request counts as failed.")] = 600.0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Objective of a good request, such as ttft:500; may repeat.")
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Metrics to print.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to print, with commas.")] = "99",
    save_result: Annotated[Path | None, typer.Option(help="Write the JSON record to this file.")] = None,
    json: JsonFlag = False,
) -> None:
    """Send requests to a server and print what it did, in the words of `vllm bench serve`.

    Exits with 1 if a request failed.
    """
    from plait.bench import (
        ServeBenchmarkOptions,
        format_result,
        parse_goodput,
        parse_metrics,
        run_serve_benchmark,
    )
    from plait.bench import save_result as save

    try:
        percentiles = tuple(float(part) for part in metric_percentiles.split(","))
    except ValueError:
        raise BadSetup(
            f"--metric-percentiles takes numbers with commas, not {metric_percentiles!r}"
        ) from None
    result = run_serve_benchmark(
        ServeBenchmarkOptions(
            base_url=base_url,
            model=model,
            endpoint=cast(Any, endpoint),
            api_key=api_key,
            num_prompts=num_prompts,
            request_rate=request_rate,
            burstiness=burstiness,
            max_concurrency=max_concurrency,
            dataset=dataset,
            dataset_path=dataset_path,
            random_input_len=random_input_len,
            random_output_len=random_output_len,
            random_range_ratio=random_range_ratio,
            temperature=temperature,
            ignore_eos=ignore_eos,
            seed=seed,
            request_timeout_s=request_timeout,
            goodput=parse_goodput(goodput or ()),
            percentile_metrics=parse_metrics(percentile_metrics),
            metric_percentiles=percentiles,
        ),
        _progress(),
    )
    if save_result is not None:
        save(result, save_result)
        note(f"written to {save_result}")
    if json:
        print_json(result.to_json())
    else:
        say(format_result(result))
    if result.failed:
        raise typer.Exit(1)


def _progress() -> Callable[[int, int], None]:
    """A line for every tenth of the requests."""
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (tenth := 10 * done // total) != shown:
            shown = tenth
            note(f"{done} of {total} requests have ended")

    return show
