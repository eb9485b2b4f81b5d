"""Plans of columns: every element of a row is multiplied once, with its own scale."""

import numpy as np
import pytest

from shardwright.compiler.columns import Quantized, plan
from shardwright.compiler.packing import Packing
from shardwright.compiler.placement import PAD, Replicate, Shard, even_table, head_tables

INT4 = Packing(4, 128, offset=7)


def check(quantized, size, order, placement):
    """What the ranks hold, taken together, is the row; returns the plan."""
    columns = plan(quantized, size, order, placement)
    order = np.arange(size) if order is None else order
    seen = []
    for rank, (codes, groups) in enumerate(zip(columns.codes, columns.groups, strict=True)):
        assert len(codes) == columns.size == len(groups) * columns.packing.group
        assert columns.size % columns.packing.per_word == 0
        local = placement.index(rank) if isinstance(placement, Shard) else np.arange(size)
        moved = np.arange(columns.size) if columns.moved is None else columns.moved[rank]
        of = np.repeat(groups, columns.packing.group)
        for column, element, group in zip(codes, moved, of, strict=True):
            if column == PAD:
                continue
            seen.append(column)
            assert order[local[element]] == column  # x is in the order of the cut
            assert quantized.groups(size)[column] == group
    assert sorted(seen) == list(range(size))
    return columns


def heads(size, count, kv, ranks):
    return Shard(1, size, size // count, head_tables(count, kv, ranks)[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 16])
def test_a_group_that_no_cut_parts_stays_whole(ranks):
    placement = Shard(1, 29568, 128, even_table(231, ranks))
    columns = check(Quantized(INT4), 29568, None, placement)
    assert columns.packing.group == 128 and columns.moved is None
    assert columns.size == -(-231 // ranks) * 128


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_group_that_heads_cut_is_made_smaller(ranks):
    columns = check(Quantized(INT4), 24 * 64, None, heads(24 * 64, 24, 8, ranks))
    assert columns.packing.group in (32, 64, 128) and columns.moved is None
    assert columns.size == -(-8 // ranks) * 3 * 64


def test_groups_of_three_bit_codes_are_padded_and_moved():
    quantized = Quantized(Packing(3, 40, offset=3))
    columns = check(quantized, 4 * 96, None, heads(4 * 96, 4, 4, 2))
    assert columns.moved is not None and columns.size % 10 == 0


@pytest.mark.parametrize("size", [352, 84])
def test_whole_rows(size):
    quantized = Quantized(Packing(8, size, code="e4m3"))
    for placement in (Replicate(), Shard(1, size, 32, even_table(-(-size // 32), 3))):
        columns = check(quantized, size, None, placement)
        assert columns.packing.group == columns.size and columns.moved is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("irregular", [False, True])
def test_act_order_is_sorted_on_each_rank(ranks, group, irregular):
    rng = np.random.default_rng(ranks)
    groups = rng.permutation(np.arange(1024) // group)
    if irregular:
        groups = rng.integers(0, 1024 // group, 1024)
    columns = check(
        Quantized(Packing(4, group, zeros=True), groups), 1024, None, heads(1024, 16, 8, ranks)
    )
    assert columns.moved is not None
    if ranks == 1 and not irregular:
        assert columns.packing.group == group and columns.size == 1024


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_act_order_whose_producer_is_permuted_moves_nothing(ranks):
    groups = np.random.default_rng(0).permutation(np.arange(29568) // 128)
    placement = Shard(1, 29568, 128, even_table(231, ranks))
    columns = plan(Quantized(INT4, groups), 29568, np.argsort(groups, kind="stable"), placement)
    assert columns.moved is None and columns.packing.group == 128
