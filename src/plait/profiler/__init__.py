"""Measurements of this machine that a cost model is made of: `plait profile`, and the tables that plait ships.

grid.py          which passes to measure, and which of them to hold out
stopwatch.py     seconds of one forward pass, by operation
operations.py    the passes of a grid, timed: tables and a regression; estimate.py: seconds of several repeats
live.py          the real engine under load, step by step: the check of both, and the host's part of a step
loopback.py      a link of this machine to itself
fingerprint.py   what times depend on: the hardware, and the versions of what computes
profile.py       all of these together
shelf.py         profiles that are shipped, and those in files; shipped/ has the tables
"""

from plait.profiler.fingerprint import hardware_fingerprint
from plait.profiler.grid import ProfileGrid
from plait.profiler.profile import ProfileWish, profile_model
from plait.profiler.shelf import profile_file, read_profile, shipped_profile, shipped_profile_names

__all__ = [
    "ProfileGrid",
    "ProfileWish",
    "hardware_fingerprint",
    "profile_file",
    "profile_model",
    "read_profile",
    "shipped_profile",
    "shipped_profile_names",
]
