"""Partitions as values: regions that tile the array, validation, and the form for checkpoints."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedopt.partitions import (
    Contiguous,
    Each,
    Heads,
    Region,
    Repeat,
    Transposed,
    block_count,
    block_ids,
    from_data,
    parse,
    per_tensor,
    resolve,
    to_data,
)

# A fused weight of 12 rows: 2 heads of queries, 1 of keys, values; and its parts.
FUSED = [(slice(0, 4), Heads(n=2)), (slice(4, 8), Heads(head_dim=4)), (slice(8, None), "row")]


@pytest.mark.parametrize(
    ("partition", "shape", "regions"),
    [
        ("coordinate", (4, 3), [(0, 1, 12, 12, 1)]),
        ("tensor", (4, 3), [(0, 1, 12, 12, 12)]),
        ("global", (4, 3), [(0, 1, 12, 12, 12)]),
        ("row", (4, 3), [(0, 1, 12, 12, 3)]),
        ("row", (4, 3, 2, 5), [(0, 1, 120, 120, 30)]),
        ("row", (4,), [(0, 1, 4, 4, 1)]),
        ("row", (), [(0, 1, 1, 1, 1)]),
        ("column", (4, 3), [(0, 4, 3, 3, 1)]),
        ("column", (4, 3, 2), [(0, 4, 6, 6, 1)]),
        (Heads(n=2), (4, 3), [(0, 1, 12, 12, 6)]),
        (Heads(head_dim=1), (4, 3), [(0, 1, 12, 12, 3)]),
        (Heads(n=2), (4,), [(0, 1, 4, 4, 2)]),
        (Contiguous(5), (4, 3), [(0, 1, 12, 12, 5)]),
        (Contiguous(99), (4, 3), [(0, 1, 12, 12, 12)]),
        (FUSED, (12, 5), [(0, 1, 20, 20, 10), (20, 1, 20, 20, 20), (40, 1, 20, 20, 5)]),
        (Transposed("row"), (5, 12), [(0, 5, 12, 12, 1)]),
        (Transposed("column"), (5, 12), [(0, 1, 60, 60, 12)]),
        (Transposed("tensor"), (5, 12), [(0, 5, 12, 12, 12)]),
        (Transposed(FUSED), (5, 12), [(0, 5, 4, 12, 2), (4, 5, 4, 12, 4), (8, 5, 4, 12, 1)]),
        (Each("row"), (2, 4, 3), [(0, 1, 24, 24, 3)]),
        (Each(Transposed("row")), (2, 4, 3), [(0, 4, 3, 3, 1), (12, 4, 3, 3, 1)]),
        (Repeat(2, "tensor"), (4, 3), [(0, 1, 12, 12, 6)]),
        (
            Repeat(2, [(slice(0, 2), "tensor"), (slice(2, 3), "row")]),
            (6, 5),
            [(0, 1, 10, 10, 10), (10, 1, 5, 5, 5), (15, 1, 10, 10, 10), (25, 1, 5, 5, 5)],
        ),
        ("row", (0, 3), []),
        (Heads(n=3), (3, 0), []),
        ("column", (3, 0), []),
        (Each("row"), (0, 4, 3), []),
    ],
    ids=str,
)
def test_regions(partition, shape, regions):
    assert resolve(partition, shape) == tuple(Region(*region) for region in regions)


def test_slices_of_one_kind_join():
    """Kernels should see few regions: neighbours whose blocks are alike become one."""
    halves = [(slice(0, 2), "row"), (slice(2, 4), "row")]
    assert resolve(halves, (4, 3)) == resolve("row", (4, 3))
    assert resolve(Transposed(halves), (3, 4)) == resolve(Transposed("row"), (3, 4))
    ragged = [(slice(0, 2), Contiguous(4)), (slice(2, 4), Contiguous(4))]  # 6 = 4 + 2, twice
    assert [region.blocks for region in resolve(ragged, (4, 3))] == [2, 2]


def test_fused_weight_stored_transposed_has_the_transposes_blocks():
    straight = block_ids(FUSED, (12, 5))
    assert (block_ids(Transposed(FUSED), (5, 12)) == straight.T).all()


def test_empty_and_global_counts():
    assert block_count("row", (0, 3)) == 0
    assert block_count("global", (0, 3)) == block_count("global", (5, 3)) == 1
    assert block_count(Contiguous(5), (4, 3)) == 3


sizes = st.integers(1, 4)
leaves = st.one_of(
    st.sampled_from(["coordinate", "tensor", "row", "column"]),
    st.builds(Heads, n=sizes),
    st.builds(Heads, head_dim=sizes),
    st.builds(Contiguous, st.integers(1, 9)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Transposed, inner),
        st.builds(Each, inner),
        st.builds(Repeat, sizes, inner),
        st.tuples(st.integers(0, 4), inner, inner).map(
            lambda x: [(slice(0, x[0]), x[1]), (slice(x[0], None), x[2])]
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(partition=trees, shape=st.lists(st.integers(0, 6), max_size=3).map(tuple))
def test_regions_tile_the_array(partition, shape):
    """Whatever fits covers every element once, in blocks numbered without gaps."""
    try:
        regions = resolve(partition, shape)
    except ValueError:
        return
    covered = np.zeros(int(np.prod(shape)), int)
    for region in regions:
        rows = region.offset + region.stride * np.arange(region.rows)
        np.add.at(covered, rows[:, None] + np.arange(region.columns), 1)
        assert 1 <= region.group <= region.columns
    assert (covered == 1).all()
    used = np.unique(block_ids(partition, shape))
    assert (used == np.arange(block_count(partition, shape))).all()
    assert resolve(from_data(to_data(partition)), shape) == regions


@settings(max_examples=100, deadline=None)
@given(partition=trees)
def test_values(partition):
    """Equal, hashable, plain as data, and a repr that evaluates to the same partition."""
    parsed = parse(partition)
    assert parse(parsed) is parsed
    assert hash(parsed) == hash(parse(partition))
    assert from_data(json.loads(json.dumps(to_data(partition)))) == parsed
    assert parse(eval(repr(parsed))) == parsed


@pytest.mark.parametrize(
    ("partition", "shape", "message"),
    [
        ("rows", (4, 3), "partition is 'rows', expected one of 'coordinate'"),
        (3, (4, 3), "partition is 3, expected one of"),
        ([], (4, 3), "empty list"),
        (["row"], (4, 3), r"partition\[0\] is 'row', expected \(slice, partition\)"),
        ([(slice(0, 4, 2), "row")], (4, 3), "has a step"),
        ([(slice(0, 2), "row"), (slice(3, 4), "row")], (4, 3), "starts at 3, expected start 2"),
        ([(slice(0, 3), "row"), (slice(2, 4), "row")], (4, 3), "starts at 2, expected start 3"),
        ([(slice(0, None), "row"), (slice(2, 4), "row")], (4, 3), "after one without an end"),
        ([(slice(0, -1), "row")], (4, 3), "ends before it starts"),
        ([(slice(0, 3), "row")], (4, 3), "slices end at 3, expected 4"),
        ([(slice(0, 5), "row")], (4, 3), "slices end at 5, expected 4"),
        ([(slice(0, 5), "row"), (slice(5, None), "row")], (4, 3), "slices end at 5, expected 4"),
        ([(slice(0, 4), "global")], (4, 3), "joins whole tensors"),
        (Each("global"), (4, 3), "joins whole tensors"),
        (Heads(n=3), (4, 3), r"Heads\(n=3\) of shape \(4, 3\).*does not divide an axis of 4"),
        (Heads(head_dim=3), (4, 3), "does not divide an axis of 4"),
        (Repeat(3, "row"), (4, 3), "does not divide an axis of 4"),
        (Each("row"), (4,), "needs two axes"),
        (Transposed(Contiguous(2)), (4, 3), "cannot stand inside Transposed"),
        (Transposed(Transposed("row")), (4, 3), "cannot stand inside Transposed"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(partition, shape, message):
    with pytest.raises((TypeError, ValueError), match=message):
        resolve(partition, shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heads(), "expected exactly one"),
        (lambda: Heads(n=2, head_dim=3), "expected exactly one"),
        (lambda: Heads(n=0), "n is 0, expected a whole number >= 1"),
        (lambda: Heads(head_dim=2.5), "head_dim is 2.5"),
        (lambda: Heads(n=True), "n is True"),
        (lambda: Contiguous(-1), "n is -1"),
        (lambda: Contiguous("4"), "n is '4'"),
        (lambda: Repeat(0, "row"), "n is 0"),
        (lambda: Transposed("rows"), "partition is 'rows'"),
        (lambda: from_data({"kind": "Rows"}), "describes no partition"),
        (lambda: from_data([{"stop": 3}]), "partition is None"),
        (lambda: per_tensor(["row"], 2), "1 entries, expected one partition, or 2"),
        (lambda: per_tensor(["row", "rows"], 2), r"partitions\[1\]: partition is 'rows'"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_one_partition_for_all_or_one_each():
    assert per_tensor("row", 3) == ["row"] * 3
    assert per_tensor(FUSED, 2) == [parse(FUSED)] * 2
    assert per_tensor(["row", FUSED], 2) == ["row", parse(FUSED)]
    assert per_tensor([FUSED], 1) == [parse(FUSED)]
    assert Heads(n=np.int64(4)) == Heads(4)
    assert Heads(n=4) != Heads(head_dim=4)
