"""Streams of random numbers, each found by its key, and seeds that are drawn from one.

What a stream gives depends on its key alone: not on the member that draws, nor on what others drew.
numpy fills short keys up with zeros: (seed, 5) and (seed, 5, 0) are one stream.
"""

import numpy as np


def stream(*key: int) -> np.random.Generator:
    """The stream of a key, e.g. (seed, slot, episode), from its beginning."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def seed_from(random: np.random.Generator) -> int:
    """A seed for a stream of its own; takes one number from this one."""
    return int(random.integers(2**62))
