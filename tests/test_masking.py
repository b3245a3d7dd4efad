"""What is trained on: a pure function of seed and position, masked as params.yaml says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from tiny_training import stream

from study import StudyError
from study.distillation.masking import MaskedSequences

SPECIAL = np.array([0, 1, 2, 3, 4])


@pytest.fixture
def words(tmp_path):
    return tiny.tokenizer(tmp_path / "words")


def test_the_stream_is_a_pure_function_of_seed_and_position(tmp_path, words):
    params = tiny.parameters(tmp_path)
    first, second = stream(params, words), stream(params, words)
    torch.manual_seed(7)
    np.random.seed(7)
    for i in (50, 3, 3, 23, 24, 0):  # any order, repeated, across passes
        expected, other = first[i], second[i]
        second[63 - i]
        assert expected.keys() == other.keys() and all(np.array_equal(expected[key], other[key]) for key in expected)
    assert any(
        not np.array_equal(stream(params, words, seed=2)[i]["positions"], first[i]["positions"]) for i in range(3)
    )


def test_every_pass_reads_every_sequence_once_in_another_order_under_other_masks(tmp_path, words):
    rows = tiny.sequences(24, 1)
    items = [stream(tiny.parameters(tmp_path), words)[i] for i in range(48)]
    passes = [[tuple(item["input_ids"]) for item in items[:24]], [tuple(item["input_ids"]) for item in items[24:]]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(tuple, rows.astype(int).tolist()))
    assert passes[0] != passes[1] and passes[0] != list(map(tuple, rows.astype(int).tolist()))
    again = {tuple(item["input_ids"]): item["positions"].tolist() for item in items[24:]}
    assert sum(again[tuple(item["input_ids"])] == item["positions"].tolist() for item in items[:24]) < 12


def test_evaluation_is_one_pass_in_the_given_order(tmp_path, words):
    rows = tiny.sequences(24, 1)
    validation = stream(tiny.parameters(tmp_path), words, seed=0, length=None)
    assert len(validation) == 24
    assert np.array_equal([validation[i]["input_ids"] for i in range(24)], rows)


def test_masks(tmp_path, words):
    """A constant count, no special token, 80/10/10 within four standard deviations, originals as labels."""
    params = tiny.parameters(tmp_path, masking={"fraction": 0.25})
    training = stream(params, words, length=1500, rows=100)
    items = [training[i] for i in range(1500)]
    positions, labels, originals, masked = (
        np.array([item[key] for item in items]) for key in ("positions", "labels", "input_ids", "masked_input_ids")
    )
    assert positions.shape == labels.shape == (1500, 4)  # 0.25 x 16
    assert (np.diff(positions, axis=1) > 0).all()
    assert np.array_equal(labels, np.take_along_axis(originals, positions, axis=1))
    assert not np.isin(labels, SPECIAL).any()
    elsewhere = np.ones_like(originals, dtype=bool)
    np.put_along_axis(elsewhere, positions, False, axis=1)
    assert np.array_equal(masked[elsewhere], originals[elsewhere])
    put = np.take_along_axis(masked, positions, axis=1)
    n, vocabulary = put.size, tiny.VOCABULARY
    # A random token is [MASK] or the token itself once in a vocabulary each.
    for share, expected in (
        ((put == 4).mean(), 0.8 + 0.1 / vocabulary),
        ((put == labels).mean(), 0.1 + 0.1 / vocabulary),
        (((put != 4) & (put != labels)).mean(), 0.1 * (vocabulary - 2) / vocabulary),
    ):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    counts = np.bincount(positions.ravel(), minlength=16)
    assert counts[0] == counts[15] == 0 and counts[1:15].min() > 0.8 * n / 14


def test_a_sequence_with_few_words_still_gives_the_fixed_count_of_masks_or_says_why_not(tmp_path, words):
    """Separators between short documents, or unknown words, can leave fewer words than the count asks for."""
    row = np.full((1, 16), 1, dtype=np.uint16)  # [UNK] throughout, two words
    row[0, [0, 5, 9, 15]] = [2, 20, 30, 3]
    params = tiny.parameters(tmp_path, masking={"fraction": 0.25})
    sequences = MaskedSequences(Dataset.from_dict({"input_ids": row}), params.masking, words, seed=1, length=4)
    try:
        item = sequences[0]
    except StudyError as error:
        assert "\n" not in str(error)
        return
    assert item["positions"].shape == item["labels"].shape == (4,)


def test_a_sequence_with_mask_sets_is_masked_the_same_for_every_seed_and_numbered_by_them(tmp_path, words):
    """Passes take the sets in turn, so that a teacher's outputs by number serve every seed and every pass."""
    masking = tiny.parameters(tmp_path).masking
    rows = Dataset.from_dict({"input_ids": tiny.sequences(24, 1)})
    streams = [MaskedSequences(rows, masking, words, seed, 24 * 3, mask_sets=2) for seed in (1, 2)]
    by_number: dict[int, list] = {}
    for training in streams:
        for i in range(72):
            by_number.setdefault(training[i]["item"], []).append(training[i])
        assert training.numbered == 48
        assert [training[i]["input_ids"].tolist() for i in range(24)] != [row for row in rows["input_ids"]]
    assert sorted(by_number) == list(range(48))
    for number, items in by_number.items():
        assert all(np.array_equal(items[0][key], item[key]) for item in items for key in item)
        other = by_number[(number + 24) % 48][0]
        assert np.array_equal(items[0]["input_ids"], other["input_ids"])
    different = [not np.array_equal(by_number[n][0]["positions"], by_number[n + 24][0]["positions"]) for n in range(24)]
    assert sum(different) > 12
    first, second = ([stream[i]["item"] for i in range(24)] for stream in streams)
    assert first != second


def test_sampled_positions_cover_all_words_and_never_special_tokens(tmp_path, words):
    params = tiny.parameters(tmp_path)
    rows = Dataset.from_dict({"input_ids": tiny.sequences(4, 1)})
    training = MaskedSequences(rows, params.masking, words, 1, 400, mask_sets=1, sampled=True)
    counts = np.zeros(tiny.LENGTH)
    for i in range(400):
        item = training[i]
        assert len(item["sampled"]) == len(item["positions"]) == len(set(item["sampled"]))
        counts[item["sampled"]] += 1
    assert counts[0] == counts[-1] == 0
    expected = 400 * len(training[0]["positions"]) / (tiny.LENGTH - 2)
    assert abs(counts[1:-1] - expected).max() < 5 * math.sqrt(expected)
