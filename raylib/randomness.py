"""Randomness without state: every draw is a hash of its keys.

`uniform(seed, step, index, "flip")` gives the same number on any worker, in any order and after any resume.
Keys are integers, strings (a purpose, a source's name) or integer arrays, which broadcast together: one call
draws for a whole batch. The hash chains the finaliser of splitmix64 (Steele, Lea, Flood 2014) over the keys.
"""

import hashlib

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FACTOR_1, FACTOR_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Key = int | str | np.ndarray


def hash64(*keys: Key) -> np.ndarray:
    """Hash the keys to uint64, of their broadcast shape. Hashes of different key tuples are independent."""
    # scalar keys come first as a rule, (seed, step, ...): they stay Python integers, which are faster than
    # arrays of one element, until the first array comes
    state: int | np.ndarray = GOLDEN
    for key in keys:
        if isinstance(key, np.ndarray):
            if isinstance(state, int):
                state = np.full((), state, np.uint64)
            state = _mix_array(state ^ _mix_array(key.astype(np.uint64)))
        else:
            number = _mix(string_key(key) if isinstance(key, str) else int(key) & MASK)
            state = _mix(state ^ number) if isinstance(state, int) else _mix_array(state ^ np.uint64(number))
    return np.asarray(state, np.uint64)


def uniform(*keys: Key) -> np.ndarray:
    """float64 in [0, 1), of the keys' broadcast shape."""
    # float64 has 53 bits: of more, some would round up to 1
    return (hash64(*keys) >> np.uint64(11)) * 2.0**-53


def uniform_float32(*keys: Key) -> np.ndarray:
    """float32 in [0, 1), of the keys' broadcast shape: a float64 just below 1 would round to 1."""
    return (np.floor(uniform(*keys) * 2**24) * 2**-24).astype(np.float32)


def integers(high: int | np.ndarray, *keys: Key) -> np.ndarray:
    """int64 in [0, high), of the broadcast shape; `high` below 2^32, where the bias is under 2^-20."""
    return np.minimum((uniform(*keys) * high).astype(np.int64), np.asarray(high) - 1)


def permutation(count: int, *keys: Key) -> np.ndarray:
    """int64 permutation of range(count); unlike NumPy's own, it never changes with NumPy's version."""
    return np.argsort(hash64(*keys, np.arange(count)), kind="stable")


def generator(*keys: Key) -> np.random.Generator:
    """Return a NumPy generator seeded by scalar keys, where a sequential algorithm needs one."""
    return np.random.default_rng(int(hash64(*keys)))


def string_key(text: str | bytes) -> int:
    """Return a stable 63-bit hash of a string (Python's own differs between processes)."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _mix(z: int) -> int:
    z = (z + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * FACTOR_1) & MASK
    z = ((z ^ (z >> 27)) * FACTOR_2) & MASK
    return z ^ (z >> 31)


def _mix_array(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 0-d arrays warn where others wrap
        z = z + np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(FACTOR_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(FACTOR_2)
        return z ^ (z >> np.uint64(31))
