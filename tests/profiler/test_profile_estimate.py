"""What is made of repeats on a machine that is taken away now and then, with the truth known."""

import numpy as np
import pytest

from plait.profiler.estimate import Repeat, calmest, estimate_part, estimate_whole, settled


def interrupted(truth: dict[str, float], repeats: int, seed: int, every_s: float = 0.003) -> list[Repeat]:
    """Passes of consecutive parts, stopped for 10 ms wherever a slice of about `every_s` ends."""
    rng = np.random.default_rng(seed)
    result: list[Repeat] = []
    for _ in range(repeats):
        walls, stops = dict[str, float](), 0
        for part, seconds in truth.items():
            here = int(rng.poisson(seconds / every_s))
            walls[part] = seconds + 0.01 * here
            stops += here
        whole_s = sum(truth.values()) * float(rng.normal(1.0, 0.01))
        result.append(Repeat(whole_s, walls, stops))
    return result


@pytest.mark.parametrize(
    ("truth", "part"),
    [
        ({"dense": 2e-4, "attention": 2e-5, "head": 5e-5}, "attention"),
        ({"dense": 2e-2, "attention": 3e-4, "head": 5e-5}, "attention"),
        ({"dense": 2e-2, "attention": 3e-4, "head": 5e-5}, "dense"),
        ({"dense": 1e-3, "attention": 2e-2, "head": 5e-5}, "attention"),
        ({"dense": 3e-2, "attention": 2e-2, "head": 0.0}, "attention"),
    ],
)
def test_by_processor_time_a_part_is_right_however_often_it_is_interrupted(
    truth: dict[str, float], part: str
) -> None:
    repeats = interrupted(truth, 9, seed=1)
    found = estimate_part(repeats, part, "cpu", dense_s=truth["dense"])
    assert found.seconds == pytest.approx(truth[part], rel=0.05)
    on_the_wall = float(np.median([repeat.parts[part] for repeat in repeats]))
    if truth[part] > 0.005:
        assert on_the_wall > 1.5 * truth[part]  # which the median would have been


def test_a_part_is_settled_once_two_repeats_were_left_alone_or_it_is_large() -> None:
    disturbed = [Repeat(0.03, {"dense": 0.04, "attention": wall}, 1) for wall in (0.001, 0.011, 0.0212)]
    assert not settled(disturbed, "attention", "cpu")
    assert settled([*disturbed, Repeat(0.03, {"dense": 0.04, "attention": 0.00102}, 1)], "attention", "cpu")
    assert settled(disturbed, "attention", "wall")
    large = [Repeat(0.03, {"dense": 0.04, "attention": wall}, 1) for wall in (0.01, 0.03, 0.05)]
    assert settled(large, "attention", "cpu")


def test_on_the_wall_the_calm_repeats_count() -> None:
    repeats = [
        Repeat(1.0 + 5.0 * (n % 2), {"dense": 0.5 + 5.0 * (n % 2), "head": 0.5}, n % 2) for n in range(8)
    ]
    assert {repeat.interruptions for repeat in calmest(repeats)} == {0}
    assert estimate_whole(repeats, "wall").seconds == 1.0
    assert estimate_part(repeats, "dense", "wall").seconds == 0.5


def test_a_decoder_that_tells_no_parts_is_taken_at_its_word() -> None:
    repeats = [Repeat(2.0, {"attention": value}, 0) for value in (0.9, 1.0, 1.1)]
    found = estimate_part(repeats, "attention", "wall", dense_s=1.0)
    assert (found.seconds, found.spread_fraction) == (1.0, pytest.approx(0.05))
