"""Random numbers by name: a component that is added draws from its own stream and shifts nobody else's."""

from zlib import crc32

import numpy as np


def stream(seed: int, path: str) -> np.random.Generator:
    """The generator of one component, named by its path, such as "faults/crash"."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(path.encode()),)))
