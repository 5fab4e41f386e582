"""Profiles in files, and those that plait ships."""

from importlib.resources import files
from pathlib import Path

from plait.costs import MAX_PROFILE_BYTES, Profile, check_fingerprint, parse_profile
from plait.errors import BadSetup
from plait.profiler.fingerprint import hardware_fingerprint

_SHIPPED = files("plait.profiler") / "shipped"


def read_profile(file: Path, *, for_this_machine: bool = True) -> Profile:
    """The profile in a file.

    Raises:
        BadSetup: there is none, or `for_this_machine` it was measured on another.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise BadSetup(f"cannot read the profile {str(file)!r}: {error.strerror}") from error
    profile = parse_profile(text, where=str(file))
    if for_this_machine:
        there = profile.fingerprint
        device, threads = there.get("device", "cpu"), there.get("threads", "0")
        here = hardware_fingerprint(
            device=device, threads=int(threads) if threads.isdecimal() and len(threads) < 5 else 0
        )
        check_fingerprint(profile, here)
    return profile


def profile_file(folder: Path, name: Path) -> Path:
    """Where the profile of this name is: in the folder, or, if there is no such file, among those that are shipped."""
    file = folder / name
    if not file.exists() and str(name) in shipped_profile_names():
        return Path(str(_SHIPPED / f"{name}.json"))
    return file


def shipped_profile_names() -> tuple[str, ...]:
    """The profiles that come with plait."""
    return tuple(
        sorted(file.name.removesuffix(".json") for file in _SHIPPED.iterdir() if file.name.endswith(".json"))
    )


def shipped_profile(name: str) -> Profile:
    """A profile that comes with plait: of the machine that its fingerprint names, for simulations anywhere.

    Raises:
        BadSetup: unknown name; the message lists the known ones.
    """
    if name not in shipped_profile_names():
        raise BadSetup(
            f"no profile called {name!r} is shipped; there are {', '.join(shipped_profile_names())}, and plait profile "
            "makes others"
        )
    return parse_profile((_SHIPPED / f"{name}.json").read_bytes(), where=name)
