"""Random generators named by what they are for, so that no order of calls can change a pixel."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *names: object) -> np.random.Generator:
    """Generator of one purpose: a function of the seed and the names (converted to text) only."""
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    digest = hashlib.sha256(text.encode()).digest()
    key = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))
