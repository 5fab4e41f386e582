"""The file of a profile: JSON that holds only numbers and words that `Profile` names. Reading it executes nothing.

What a file says is used as it is for years of simulated time, so that whatever no measurement can give is refused.
"""

from collections.abc import Iterator
from typing import cast

import msgspec

from plait.costs.profile import PROFILE_FORMAT, PROFILE_VERSION, Profile
from plait.costs.regression import FEATURES
from plait.errors import BadSetup

MAX_PROFILE_BYTES = 4 << 20
_MOST = 1e18
"""No byte, second or rate that was ever measured is more."""


class _Heading(msgspec.Struct):
    format: str
    version: int


def format_profile(profile: Profile) -> str:
    """The text of a profile's file; reading it gives an equal profile."""
    return msgspec.json.encode(profile).decode() + "\n"


def parse_profile(text: str | bytes, *, where: str) -> Profile:
    """Read a profile; `where` (a file name) is for the messages.

    Raises:
        BadSetup: it is none, or of another version of plait, or holds what cannot be measured.
    """
    if len(text) > MAX_PROFILE_BYTES:
        raise BadSetup(f"{where} is larger than any profile; make one with plait profile")
    try:
        heading = msgspec.json.decode(text, type=_Heading)
        if heading.format != PROFILE_FORMAT or heading.version != PROFILE_VERSION:
            raise BadSetup(
                f"it is a {heading.format[:40]!r} of version {heading.version}, and this plait reads "
                f"{PROFILE_FORMAT!r} of version {PROFILE_VERSION}"
            )
        profile = msgspec.json.decode(text, type=Profile)
        _check(profile)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadSetup(f"{where} is no profile ({error}); make one with plait profile") from None
    except BadSetup as error:
        raise BadSetup(
            f"{where} is no usable profile: {error.message}; measure again with plait profile"
        ) from None
    return profile


def _check(profile: Profile) -> None:
    model = profile.model
    if not 0 <= model.first_block < model.end_block <= model.model_blocks:
        raise BadSetup(
            f"its blocks {model.first_block}:{model.end_block} of {model.model_blocks} are no span"
        )
    if len(profile.regression) != len(FEATURES):
        raise BadSetup(f"its regression has {len(FEATURES)} coefficients, not {len(profile.regression)}")
    for name, part in cast("dict[str, object]", msgspec.to_builtins(profile)).items():
        for path, number in _numbers(part, name):
            signed = name == "errors"  # a bias has a sign
            if not (-_MOST if signed else 0) <= number <= _MOST:
                raise BadSetup(f"its {path} is {number!r:.40}, which cannot have been measured")
    for name, link in profile.links.items():
        if not link.bandwidth_bytes_per_s or link.loss_fraction >= 1:
            raise BadSetup(f"its links.{name[:40]} is no link: nothing gets through")
    tables = profile.tables
    for grid in (tables.prefill, tables.decode):
        for curve in grid.curves if grid else ():
            _check_places((*grid.rows, *curve.places) if grid else ())
    for curve in (tables.dense, tables.head):
        _check_places(curve.places if curve else ())


def _check_places(places: tuple[float, ...]) -> None:
    if any(place != int(place) for place in places):
        raise BadSetup("the places of its tables count tokens and sequences, and some are no whole numbers")


def _numbers(tree: object, path: str) -> Iterator[tuple[str, float]]:
    """All numbers of a tree of lists and mappings, each with its path."""
    if isinstance(tree, dict):
        for key, value in cast("dict[str, object]", tree).items():
            yield from _numbers(value, f"{path}.{key:.40}")
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(cast("list[object]", tree)):
            yield from _numbers(value, f"{path}.{place}")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path, tree
