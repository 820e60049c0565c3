"""Random words are those of Philox 4x32-10, and nothing but their number decides them."""

from collections.abc import Sequence

import numpy as np
import pytest

from stockflow.kernels.draws import keep_drawn, philox
from stockflow.methods.dare import keys_of
from stockflow.methods.protocol import UnitContext
from tests import oracle

KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and words: ``philox4x32 10`` of the known answers that Random123 is published with."""
NUM_ELEMS = 10_007


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_the_published_ones(counter: str, key: str, words: str) -> None:
    asked = [np.uint64(word) for word in numbers(counter) + numbers(key)]

    assert [int(word) for word in philox(*asked)] == numbers(words)
    assert oracle.philox(np.array([numbers(counter)]), tuple(numbers(key))).tolist() == [numbers(words)]  # type: ignore[arg-type]


def keys(seed: int = 0, name: str = "w", num_tuned: int = 2) -> np.ndarray:
    return keys_of(UnitContext(name, num_tuned, 1, 32, 32), seed)


def kept(start: int, stop: int, limits: Sequence[int], drawn_by: np.ndarray) -> np.ndarray:
    ones, counts = np.ones((len(limits), stop - start), np.float32), np.zeros(len(limits), np.int64)
    keep_drawn(ones, np.uint64(start), drawn_by, np.array(limits), counts)
    assert counts.tolist() == ones.sum(axis=1).tolist()
    return ones.astype(bool)


@pytest.mark.parametrize("step", [1, 3, 511, 512, 4099])
@pytest.mark.parametrize("start", [0, 5, 2**34 + 3])
def test_how_elements_are_cut_into_blocks_decides_nothing(start: int, step: int) -> None:
    limits, stop = [2**31, 2**29], start + NUM_ELEMS
    whole = kept(start, stop, limits, keys())

    parts = [kept(first, min(first + step, stop), limits, keys()) for first in range(start, stop, step)]

    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    for place, limit in enumerate(limits):
        assert np.array_equal(whole[place], oracle.words(0, "w", place, start, NUM_ELEMS) <= limit)


def test_seed_name_and_place_decide() -> None:
    drawn = [
        kept(0, NUM_ELEMS, [2**31, 2**31], keys(seed, name)) for seed, name in ((0, "w"), (1, "w"), (0, "v"), (0, "w"))
    ]

    assert np.array_equal(drawn[0], drawn[3])
    for left, right in ((drawn[0][0], drawn[0][1]), (drawn[0], drawn[1]), (drawn[0], drawn[2])):
        assert 0.47 < np.mean(left == right) < 0.53
    assert np.array_equal(kept(0, NUM_ELEMS, [2**31], keys(num_tuned=1))[0], drawn[0][0]), "others decide nothing"


def test_nothing_and_everything_are_kept_without_a_draw() -> None:
    found = kept(0, NUM_ELEMS, [-1, 2**32], keys())

    assert not found[0].any()
    assert found[1].all()
