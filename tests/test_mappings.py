"""Layer mappings against the table of the paper, worked by hand."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from study.distillation.mappings import STRATEGIES, layer_mapping
from study.methods import Mapping

pytestmark = pytest.mark.fast
TABLE = {  # (teacher layers, student layers): strategy -> phi, by hand
    (12, 6): {
        "last": {6: (12,)},
        "top": {1: (7,), 2: (8,), 3: (9,), 4: (10,), 5: (11,), 6: (12,)},
        "uniform": {1: (2,), 2: (4,), 3: (6,), 4: (8,), 5: (10,), 6: (12,)},
        "uniform-consecutive": {1: (1, 2), 2: (3, 4), 3: (5, 6), 4: (7, 8), 5: (9, 10), 6: (11, 12)},
        "uniform+last": {1: (2, 7), 2: (4, 8), 3: (6, 9), 4: (8, 10), 5: (10, 11), 6: (12,)},
        "reverse": {1: (12,), 2: (10,), 3: (8,), 4: (6,), 5: (4,), 6: (2,)},
        "all-to-one": {1: (12,), 2: (12,), 3: (12,), 4: (12,), 5: (12,), 6: (12,)},
    },
    (12, 4): {
        "last": {4: (12,)},
        "top": {1: (9,), 2: (10,), 3: (11,), 4: (12,)},
        "uniform": {1: (3,), 2: (6,), 3: (9,), 4: (12,)},
        "uniform-consecutive": {1: (1, 2, 3), 2: (4, 5, 6), 3: (7, 8, 9), 4: (10, 11, 12)},
        "uniform+last": {1: (3, 9), 2: (6, 10), 3: (9, 11), 4: (12,)},
        "reverse": {1: (12,), 2: (9,), 3: (6,), 4: (3,)},
    },
    (6, 3): {
        "last": {3: (6,)},
        "top": {1: (4,), 2: (5,), 3: (6,)},
        "uniform": {1: (2,), 2: (4,), 3: (6,)},
        "uniform-consecutive": {1: (1, 2), 2: (3, 4), 3: (5, 6)},
        "uniform+last": {1: (2, 4), 2: (4, 5), 3: (6,)},
    },
    (6, 4): {  # 6/4 = 1.5: floor 1.5, 3, 4.5, 6; blocks of 2, 2, 1, 1
        "last": {4: (6,)},
        "top": {1: (3,), 2: (4,), 3: (5,), 4: (6,)},
        "uniform": {1: (1,), 2: (3,), 3: (4,), 4: (6,)},
        "uniform-consecutive": {1: (1, 2), 2: (3, 4), 3: (5,), 4: (6,)},
        "uniform+last": {1: (1, 3), 2: (3, 4), 3: (4, 5), 4: (6,)},
    },
    (12, 5): {  # 12/5 = 2.4: floor 2.4, 4.8, 7.2, 9.6, 12; blocks of 3, 3, 2, 2, 2
        "last": {5: (12,)},
        "top": {1: (8,), 2: (9,), 3: (10,), 4: (11,), 5: (12,)},
        "uniform": {1: (2,), 2: (4,), 3: (7,), 4: (9,), 5: (12,)},
        "uniform-consecutive": {1: (1, 2, 3), 2: (4, 5, 6), 3: (7, 8), 4: (9, 10), 5: (11, 12)},
        "uniform+last": {1: (2, 8), 2: (4, 9), 3: (7, 10), 4: (9, 11), 5: (12,)},
    },
    (24, 12): {
        "last": {12: (24,)},
        "top": {i: (12 + i,) for i in range(1, 13)},
        "uniform": {i: (2 * i,) for i in range(1, 13)},
        "uniform-consecutive": {i: (2 * i - 1, 2 * i) for i in range(1, 13)},
        "uniform+last": {**{i: (2 * i, 12 + i) for i in range(1, 12)}, 12: (24,)},
    },
    (6, 6): {
        "last": {6: (6,)},
        **{name: {i: (i,) for i in range(1, 7)} for name in ("top", "uniform", "uniform-consecutive", "uniform+last")},
        "random": {i: (i,) for i in range(1, 7)},
        "reverse": {1: (6,), 2: (5,), 3: (4,), 4: (3,), 5: (2,), 6: (1,)},
    },
    (5, 1): {
        "last": {1: (5,)},
        "top": {1: (5,)},
        "uniform": {1: (5,)},
        "uniform-consecutive": {1: (1, 2, 3, 4, 5)},
        "uniform+last": {1: (5,)},
        "reverse": {1: (5,)},
    },
}
DEPTHS = [(t, s) for t in range(1, 26) for s in range(1, t + 1)]


@pytest.mark.parametrize(
    ("depths", "strategy"), [(depths, strategy) for depths, rows in TABLE.items() for strategy in rows], ids=str
)
def test_the_table(depths, strategy):
    assert layer_mapping(strategy, *depths) == TABLE[depths][strategy]


def test_params_allow_every_strategy():
    assert get_args(Mapping) == STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_depth_ties_existing_layers_and_never_the_embeddings(strategy):
    for teacher, student in DEPTHS:
        mapping = layer_mapping(strategy, teacher, student)
        assert set(mapping) == ({student} if strategy == "last" else set(range(1, student + 1)))
        for targets in mapping.values():
            assert targets and isinstance(targets, tuple)
            assert all(1 <= j <= teacher for j in targets) and sorted(set(targets)) == list(targets)


def test_consecutive_blocks_are_near_equal_and_cover_the_teacher_in_order():
    for teacher, student in DEPTHS:
        blocks = list(layer_mapping("uniform-consecutive", teacher, student).values())
        assert list(itertools.chain(*blocks)) == list(range(1, teacher + 1))
        sizes = [len(block) for block in blocks]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_uniform_ends_at_the_last_layer_and_increases():
    for teacher, student in DEPTHS:
        layers = [j for (j,) in layer_mapping("uniform", teacher, student).values()]
        assert layers[-1] == teacher and all(a < b for a, b in itertools.pairwise(layers))


def test_random_is_drawn_once_and_increases():
    drawn = layer_mapping("random", 12, 6)
    assert drawn == layer_mapping("random", 12, 6)
    layers = [j for (j,) in drawn.values()]
    assert all(a < b for a, b in itertools.pairwise(layers))
    assert len({str(layer_mapping("random", t, 6)) for t in range(12, 20)}) > 4  # not always the same six


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("teacher", "student"), [(6, 0), (6, 7), (0, 0), (6, -1)])
def test_impossible_depths(strategy, teacher, student):
    with pytest.raises(ValueError, match=rf"{student}.*{teacher}"):
        layer_mapping(strategy, teacher, student)


def test_unknown_strategy_is_told_what_is_allowed():
    with pytest.raises(ValueError) as error:
        layer_mapping("bottom", 12, 6)
    assert "'bottom'" in str(error.value) and all(name in str(error.value) for name in STRATEGIES)
