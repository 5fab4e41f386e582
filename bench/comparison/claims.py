"""What the papers state, beside what was found: ratios with their spread over seeds, and whether the sign agrees."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from comparison.cases import COMMON_LOAD
from comparison.curves import Sample, names, of, times_as_much

ORCA_LATENCY_S = 0.19


def batching_claims(
    samples: Sequence[Sample], sharing: Mapping[str, Any], block_sizes: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Claims of ORCA and vLLM."""
    return [*_of_orca(samples), *_of_vllm(samples), *_of_memory(samples), *_of_sharing(sharing, block_sizes)]


def claim(paper: str, what: str, published: str, ours: object, *, sign: bool) -> dict[str, Any]:
    """One row of the table."""
    return {"paper": paper, "claim": what, "published": published, "ours": ours, "sign": bool(sign)}


def _case(samples: Sequence[Sample], *words: str) -> list[Sample]:
    case = next(name for name in names(samples, "case") if all(word in name for word in words))
    return of(samples, case=case)


def _of_orca(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    ratios: dict[str, list[Any] | None] = {}
    for lengths in ("uniform", "equal"):
        mine = _case(samples, "opt-175b", lengths)
        for baseline in ("static", "static, eight at a time", "static, one at a time"):
            ratios[f"{lengths}, {baseline}"] = times_as_much(
                mine,
                "orca, oracle",
                baseline,
                limit_s=ORCA_LATENCY_S,
                latency="normalised_p50_s",
                other_latency="per_batch_p50_s",
            )
    unequal = ratios["uniform, static"] or [99.0]
    equal = ratios["equal, static"] or [99.0]
    return [
        claim(
            "ORCA",
            "requests/s at a median of 190 ms a token, 175 B, against batches of requests",
            "36.9",
            ratios,
            sign=unequal[0] > 1.0,
        ),
        claim(
            "ORCA",
            "with equal lengths the gap shrinks",
            "strongly",
            [unequal[0], equal[0]],
            sign=equal[0] < unequal[0],
        ),
    ]


def _of_vllm(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for other, published in (("orca, oracle", "1.7-2.7"), ("orca, max", "2.7-8"), ("static", "up to 22")):
        latency = "per_batch_mean_s" if other == "static" else "normalised_mean_s"
        ratios = {
            f"{model}, {times:g} x idle": times_as_much(
                _case(samples, model, "mixed"), "paged", other, times_idle=times, other_latency=latency
            )
            for model in ("opt-13b", "opt-66b", "opt-175b")
            for times in (2.0, 5.0)
        }
        what = f"requests/s at equal latency, ShareGPT's lengths, paged over {other}"
        sign = all(ratio is None or ratio[0] > 1.0 or "unknown" in ratio for ratio in ratios.values())
        found.append(claim("vLLM", what, published, ratios, sign=sign))
    gains = {
        family: times_as_much(_case(samples, "opt-175b", family), "paged", "orca, oracle", times_idle=2.0)
        for family in ("mixed", "short")
    }
    found.append(
        claim(
            "vLLM",
            "with short requests and much memory (175 B, Alpaca) pages gain less over oracle",
            "smaller",
            gains,
            sign=(gains["short"] or [0.0])[0] < (gains["mixed"] or [0.0])[0],
        )
    )
    by_prefix = {
        examples: times_as_much(_case(samples, examples), "paged", "orca, oracle", times_idle=2.0)
        for examples in ("1 example", "5 examples")
    }
    one, five = ((by_prefix[name] or [0.0])[0] for name in ("1 example", "5 examples"))
    what = "prompts with a common beginning, paged over oracle"
    found.append(claim("vLLM", what, "1.67 and 3.58", by_prefix, sign=1.0 < one < five))
    return found


def _of_memory(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    mixed = _case(samples, "opt-13b", "mixed")
    batch: dict[str, float] = {}
    useful: dict[str, dict[str, float]] = {}
    for policy in ("orca, max", "orca, pow2", "orca, oracle", "paged"):
        mine = of(mixed, policy=policy)
        batch[policy] = max(
            statistics.median(sample["mean_batch"] for sample in of(mine, load=load))
            for load in names(mine, "load")
        )
        at_load = of(mine, load=COMMON_LOAD)
        useful[policy] = {
            key: round(statistics.median(sample[key] for sample in at_load), 3)
            for key in (
                "useful_kv_fraction",
                "reserved_kv_fraction",
                "inside_kv_fraction",
                "useful_in_one_piece_fraction",
            )
        }
    order = [useful[policy]["useful_kv_fraction"] for policy in useful]
    return [
        claim(
            "vLLM",
            "largest mean batch, 13 B with ShareGPT's lengths: paged over oracle, over max",
            "2.2, 4.3",
            [round(batch["paged"] / batch[other], 2) for other in ("orca, oracle", "orca, max")],
            sign=batch["paged"] > batch["orca, oracle"] > batch["orca, max"],
        ),
        claim(
            "vLLM",
            "useful part of the memory held: max, pow2, oracle, paged",
            "0.204, 0.268, 0.382, 0.963",
            useful,
            sign=order == sorted(order) and order[-1] > 0.95,
        ),
    ]


def _of_sharing(
    sharing: Mapping[str, Any], block_sizes: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    saved, found = sharing["saved_fraction"], list[dict[str, Any]]()
    for way, lengths, published in (
        ("samples", "alpaca-like", "0.061-0.098"),
        ("samples", "sharegpt-like", "0.162-0.305"),
        ("beams", "alpaca-like", "0.376-0.552"),
        ("beams", "sharegpt-like", "0.443-0.663"),
    ):
        ours = saved[f"{way}, {lengths}"]
        what = f"memory that {way} share, 2 to 6 of them, {lengths}"
        found.append(claim("vLLM", what, published, ours, sign=0.0 < ours["2"] < ours["6"]))
    small, *_, large = (row for row in sharing["swapping"] if row["block_tokens"] in (1, 16, 64))
    swapped = "swapped_layer_by_layer_ms"
    found.append(
        claim(
            "vLLM",
            "small blocks make swapping slow; near recomputing from 16 to 64 tokens",
            "crossing at 16-64",
            {row["block_tokens"]: [row["recomputed_ms"], row[swapped]] for row in sharing["swapping"]},
            sign=small[swapped] > 5 * small["recomputed_ms"]
            and large[swapped] < 1.3 * large["recomputed_ms"],
        )
    )
    lost = {lengths: rates["128"] / rates["16"] for lengths, rates in block_sizes.items()}
    found.append(
        claim(
            "vLLM",
            "blocks of 128 tokens hurt short requests more than conversations",
            "yes",
            {
                lengths: {size: round(rate, 3) for size, rate in rates.items()}
                for lengths, rates in block_sizes.items()
            },
            sign=lost["alpaca-like"] < min(0.97, lost["sharegpt-like"]),
        )
    )
    return found
