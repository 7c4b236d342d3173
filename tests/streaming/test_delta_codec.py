"""Deltas as bytes: exact or within a stated bound, in any order of parts, and never wrong without a word."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.errors import BundleError, DeltaGap
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import Delta, ItemVectors, TableRows, merge, parsed, standing, version_of
from engine.streaming.deltas.delta_codec import decode, encode, quantise, read_header, read_part

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def a_delta(sequence: int = 1, *, rows: int = 3, seed: int = 0, **changes) -> Delta:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, 4)).astype(np.float32)
    fields = {
        "model": "films",
        "base": "0123456789ab",
        "epoch": 2,
        "sequence": sequence,
        "created": 1_700_000_000.25,
        "newest": 1_700_000_000.0,
        "tables": {"item": TableRows(np.arange(rows, dtype=np.int64) * 7, values)},
        "positions": {0: 10, 1: 20},
    }
    return Delta(**(fields | changes))


@st.composite
def tables(draw, dim: int | None = None) -> TableRows:
    rows = np.array(sorted(draw(st.sets(st.integers(0, 2**62), max_size=12))), dtype=np.int64)
    shape = (len(rows), dim or draw(st.integers(1, 5)))
    return TableRows(rows, draw(hnp.arrays(np.float32, shape, elements=FLOATS)))


@st.composite
def vectors(draw) -> ItemVectors:
    ids = sorted(draw(st.sets(st.text(max_size=6), max_size=5)))
    return ItemVectors(ids, draw(hnp.arrays(np.float32, (len(ids), 3), elements=FLOATS)))


@st.composite
def deltas(draw) -> Delta:
    sequence = draw(st.integers(1, 2**40))
    dense = draw(st.dictionaries(st.text(min_size=1, max_size=8), hnp.arrays(np.float32, (2, 2), elements=FLOATS)))
    return Delta(
        model=draw(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,10}", fullmatch=True)),
        base="0123456789ab",
        epoch=draw(st.integers(0, 2**40)),
        sequence=sequence,
        created=draw(st.floats(0, 2e9)),
        newest=draw(st.floats(0, 2e9) | st.just(math.nan)),
        tables=draw(st.dictionaries(st.text(min_size=1, max_size=8), tables(), max_size=3)),
        dense={name: torch.from_numpy(values) for name, values in dense.items()},
        vectors=draw(st.none() | vectors()),
        positions=draw(st.dictionaries(st.integers(0, 1000), st.integers(0, 2**50), max_size=5)),
        follows=draw(st.none() | st.integers(0, sequence - 1).filter(lambda n: n != sequence - 1)),
    )


def same(a: Delta, b: Delta) -> None:
    for name in ("model", "base", "epoch", "sequence", "created", "positions", "parent", "version", "follows"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.newest == b.newest or (math.isnan(a.newest) and math.isnan(b.newest))
    assert a.tables.keys() == b.tables.keys()
    for name, table in a.tables.items():
        np.testing.assert_array_equal(table.rows, b.tables[name].rows)
        assert table.values.tobytes() == b.tables[name].values.tobytes()  # bit by bit: -0.0 stays -0.0
    assert a.dense.keys() == b.dense.keys()
    assert all(torch.equal(tensor, b.dense[name]) for name, tensor in a.dense.items())
    assert (a.vectors is None) == (b.vectors is None)
    if a.vectors is not None and b.vectors is not None:
        assert a.vectors.ids == b.vectors.ids
        assert a.vectors.values.tobytes() == b.vectors.values.tobytes()


def assembled(parts: list[bytes]) -> Delta | None:
    assembler = Assembler()
    found = [delta for part in parts if (delta := assembler.add(part)) is not None]
    assert len(found) <= 1
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------ round trips
@settings(max_examples=150, deadline=None)
@given(deltas(), st.integers(2200, 6000), st.randoms(use_true_random=False))
def test_float32_comes_back_bit_by_bit_from_parts_in_any_order_and_twice(delta, most, chance):
    parts = encode(delta, "float32", most)
    assert all(len(part) <= most for part in parts)
    sent = parts * 2
    chance.shuffle(sent)
    back = assembled(sent)
    assert back is not None
    same(delta, back)


@settings(max_examples=150, deadline=None)
@given(tables())
def test_int8_errs_by_at_most_a_254th_of_the_rows_largest_magnitude(table):
    back = assembled(encode(a_delta(tables={"t": table}), "int8"))
    assert back is not None
    want, got = table.values.astype(np.float64), back.tables["t"].values.astype(np.float64)
    largest = np.abs(want).max(axis=1, initial=0.0, keepdims=True)
    # float32 rounds the scale and the product once each; below 127 * 2**-126 the scale is the smallest normal number.
    bound = largest / 254 * (1 + 1e-5) + 2.0**-127
    assert (np.abs(got - want) <= bound).all()


def test_int8_is_what_numpy_computes_by_hand():
    quantised, scales = quantise(np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], np.float32))
    # 2 is 127 steps of 2/127: 1 is 63.5 steps, rounded to even 64; 0.5 is 31.75 steps, rounded to 32.
    np.testing.assert_array_equal(quantised, [[64, -127, 32], [0, 0, 0]])
    assert scales[0] == np.float32(2) / np.float32(127)


def test_dense_parameters_of_any_type_are_exact_in_int8_too():
    dense = {"bias": torch.tensor([0.1]), "steps": torch.tensor(7), "half": torch.tensor([1.5]).bfloat16()}
    back = assembled(encode(a_delta(dense=dense), "int8"))
    assert back is not None
    assert all(torch.equal(back.dense[k], v) and back.dense[k].dtype == v.dtype for k, v in dense.items())


def test_equal_deltas_have_equal_bytes_whatever_order_their_tables_are_in():
    one, two = TableRows(np.array([1]), np.ones((1, 2), np.float32)), TableRows(np.array([2]), np.ones((1, 2), "f4"))
    a = a_delta(tables={"a": one, "b": two}, positions={0: 1, 1: 2})
    b = a_delta(tables={"b": two, "a": one}, positions={1: 2, 0: 1})
    assert encode(a, "int8") == encode(b, "int8")


def test_a_part_says_what_it_is_without_the_others():
    parts = encode(a_delta(sequence=5, rows=500, follows=2), "float32", 3000)
    header = read_header(parts[1])
    assert (header.model, header.base, header.epoch, header.sequence) == ("films", "0123456789ab", 2, 5)
    assert (header.parent, header.version) == ("0123456789ab+2.2", "0123456789ab+2.5")
    assert (header.part, header.parts) == (1, len(parts))
    assert header.positions == {0: 10, 1: 20}


# ------------------------------------------------------------------------------------------------ refusals
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_byte_never_passes(data):
    parts = encode(a_delta(rows=200), "float32", 3000)
    which = data.draw(st.integers(0, len(parts) - 1))
    place = data.draw(st.integers(0, len(parts[which]) - 1))
    flip = data.draw(st.integers(1, 255))
    broken = bytearray(parts[which])
    broken[place] ^= flip
    with pytest.raises(BundleError):
        read_part(bytes(broken))
    with pytest.raises(BundleError):
        assembled([*parts[:which], bytes(broken), *parts[which + 1 :]])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.integers(0, 3000).map(lambda n: encode(a_delta(rows=200), "int8", 3000)[0][:n]))
def test_bytes_that_are_no_part_are_refused(raw):
    whole = encode(a_delta(rows=200), "int8", 3000)[0]
    if raw != whole:
        with pytest.raises(BundleError):
            read_part(raw)


def test_a_payload_of_another_delta_is_refused_though_each_part_is_right():
    header, _ = read_part(encode(a_delta(seed=1), "float32")[0])
    _, payload = read_part(encode(a_delta(seed=2), "float32")[0])
    with pytest.raises(BundleError, match="do not make the payload of its checksum"):
        decode(header, payload)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_neither_written_nor_taken(bad):
    table = TableRows(np.array([1]), np.array([[1.0, bad]], np.float32))
    for dtype in ("float32", "int8"):
        with pytest.raises(BundleError, match="table t: values are not finite"):
            encode(a_delta(tables={"t": table}), dtype)
    with pytest.raises(BundleError, match="bias: not finite"):
        encode(a_delta(dense={"bias": torch.tensor([bad])}), "float32")


@pytest.mark.parametrize("rows", [[2, 1], [1, 1], [-1, 3]])
def test_rows_that_do_not_ascend_are_refused(rows):
    table = TableRows(np.array(rows), np.ones((2, 2), np.float32))
    with pytest.raises(BundleError, match="ascending"):
        encode(a_delta(tables={"t": table}), "float32")


def forged(tensors: dict[str, torch.Tensor]) -> None:
    """Takes a payload whose checksums are right, as a hostile writer would make it."""
    import hashlib

    import msgspec
    from safetensors.torch import save

    payload = save(tensors)
    header = read_header(encode(a_delta(), "float32")[0])
    digest = hashlib.sha256(payload).hexdigest()
    decode(msgspec.structs.replace(header, bytes=len(payload), sha256=digest), payload)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"rows/t": torch.tensor([3, 2]), "values/t": torch.ones(2, 2)}, "ascending"),
        ({"rows/t": torch.tensor([1]), "values/t": torch.ones(2, 2)}, "for 1 rows"),
        ({"rows/t": torch.tensor([1]), "values/t": torch.full((1, 2), math.nan)}, "not finite"),
        ({"rows/t": torch.tensor([1]), "values/t": torch.ones(1, 2).double()}, "float64"),
        ({"rows/t": torch.tensor([1]), "values/t": torch.ones(1, 2).char()}, "int8"),
        (
            {
                "rows/t": torch.tensor([1]),
                "values/t": torch.ones(1, 2).char(),
                "scales/t": torch.tensor([math.inf]),
            },
            "not finite",
        ),
        (
            {"rows/t": torch.tensor([1]), "values/t": torch.ones(1, 2).char(), "scales/t": torch.ones(2)},
            "one scale a row",
        ),
        ({"rows/t": torch.tensor([1])}, "different tables"),
        ({"scales/t": torch.ones(1)}, "without rows"),
        ({"dense/x": torch.tensor([math.nan])}, "x: not finite"),
        ({"pickle/x": torch.ones(1)}, "unknown entry"),
        ({"vectors/values": torch.ones(1, 2)}, "in place of values, ids and ends"),
        (
            {
                "vectors/values": torch.ones(1, 2),
                "vectors/ids": torch.tensor([255], dtype=torch.uint8),
                "vectors/ends": torch.tensor([1]),
            },
            "not UTF-8",
        ),
        (
            {
                "vectors/values": torch.ones(2, 2),
                "vectors/ids": torch.tensor([97], dtype=torch.uint8),
                "vectors/ends": torch.tensor([2, 1]),
            },
            "do not end",
        ),
    ],
)
def test_contents_that_lie_are_refused_by_name_though_every_checksum_is_right(tensors, says):
    with pytest.raises(BundleError, match=says):
        forged(tensors)


def test_names_that_could_lead_elsewhere_are_refused():
    for changes in ({"model": "../films"}, {"base": "a/b"}, {"model": "films\n"}):
        with pytest.raises(BundleError, match="header cannot be read"):
            encode(a_delta(**changes), "float32")


# ------------------------------------------------------------------------------------------------ assembling
def test_parts_of_several_deltas_may_be_mixed():
    a, b = (encode(a_delta(sequence=n, rows=300, seed=n), "float32", 3000) for n in (1, 2))
    assembler = Assembler()
    mixed = [part for pair in zip(a, b, strict=True) for part in pair]
    given_ = [delta.sequence for part in mixed if (delta := assembler.add(part)) is not None]
    assert given_ == [1, 2]
    assert assembler.held == 0


def test_an_incomplete_older_delta_is_dropped_when_a_newer_is_complete():
    assembler = Assembler()
    older = encode(a_delta(sequence=1, rows=300), "float32", 3000)
    assembler.add(older[0])
    assert assembler.held > 0
    assert assembler.add(encode(a_delta(sequence=2), "float32")[0]) is not None
    assert (assembler.held, assembler.dropped) == (0, 1)


def test_memory_is_bounded_whatever_comes():
    assembler = Assembler(most=3)
    for sequence in range(50):
        assembler.add(encode(a_delta(sequence=50 - sequence, rows=300, seed=sequence), "float32", 3000)[0])
    assert assembler.held <= 3 * 3000
    assert assembler.dropped == 47


def test_a_part_that_came_broken_may_come_again():
    parts = encode(a_delta(rows=300), "float32", 3000)
    assembler = Assembler()
    assembler.add(parts[0])
    with pytest.raises(BundleError, match="part 2 of"):
        assembler.add(parts[1][:-1] + b"!")
    rest = parts[1:]
    random.Random(3).shuffle(rest)
    assert [assembler.add(part) is not None for part in rest].count(True) == 1


# ------------------------------------------------------------------------------------------------ chains
def test_versions_are_read_back():
    assert parsed(version_of("abc", 4, 0)) == ("abc", 0, 0)
    assert parsed(version_of("abc", 4, 17)) == ("abc", 4, 17)
    for odd in ("abc+", "abc+1", "abc+1.x", "abc+-1.2"):
        with pytest.raises(DeltaGap):
            parsed(odd)


@pytest.mark.parametrize(
    ("version", "is_"),
    [
        ("0123456789ab+2.4", "next"),
        ("0123456789ab+2.5", "known"),
        ("0123456789ab+2.9", "known"),
        ("0123456789ab+2.3", "gap"),
        ("0123456789ab+1.4", "gap"),
        ("0123456789ab", "gap"),
        ("ffffffffffff+2.4", "gap"),
    ],
)
def test_the_fifth_delta_follows_the_fourth_of_its_own_base_and_epoch_only(version, is_):
    assert standing(a_delta(sequence=5), version) == is_


def test_a_merged_delta_follows_what_its_first_followed_and_any_part_of_itself():
    merged = merge(merge(a_delta(sequence=2), a_delta(sequence=3)), a_delta(sequence=4))
    assert (merged.parent, merged.version) == ("0123456789ab+2.1", "0123456789ab+2.4")
    at = {n: standing(merged, version_of("0123456789ab", 2, n)) for n in range(1, 5)}
    assert at == {1: "next", 2: "next", 3: "next", 4: "known"}


def test_of_a_row_in_two_merged_deltas_the_later_value_stays():
    one = TableRows(np.array([1, 5]), np.array([[1.0], [5.0]], np.float32))
    two = TableRows(np.array([2, 5]), np.array([[2.0], [55.0]], np.float32))
    first = a_delta(
        1,
        tables={"a": one, "only": one},
        vectors=ItemVectors(["x", "y"], np.array([[1.0], [2.0]], np.float32)),
        dense={"bias": torch.tensor([1.0]), "other": torch.tensor([3.0])},
        positions={0: 5, 1: 5},
        newest=math.nan,
    )
    second = a_delta(
        2,
        tables={"a": two},
        vectors=ItemVectors(["y", "b"], np.array([[22.0], [3.0]], np.float32)),
        dense={"bias": torch.tensor([2.0])},
        positions={0: 9},
    )
    merged = merge(first, second)
    assert merged.tables["a"].rows.tolist() == [1, 2, 5]
    assert merged.tables["a"].values.tolist() == [[1.0], [2.0], [55.0]]
    assert merged.tables["only"] is one
    assert merged.vectors is not None
    assert dict(zip(merged.vectors.ids, merged.vectors.values[:, 0].tolist(), strict=True)) == {"x": 1, "y": 22, "b": 3}
    assert {k: float(v) for k, v in merged.dense.items()} == {"bias": 2.0, "other": 3.0}
    assert merged.positions == {0: 9, 1: 5}
    assert merged.newest == second.newest
    with pytest.raises(DeltaGap):
        merge(second, first)


@settings(max_examples=100, deadline=None)
@given(st.lists(tables(dim=2), min_size=1, max_size=4))
def test_a_merged_delta_does_what_its_deltas_do_one_after_the_other(steps):
    merged, by_hand = None, {}
    for number, table in enumerate(steps, 1):
        delta = a_delta(number, tables={"t": table})
        merged = delta if merged is None else merge(merged, delta)
        by_hand |= dict(zip(table.rows.tolist(), table.values.tolist(), strict=True))
    got = merged.tables["t"]
    assert got.rows.tolist() == sorted(by_hand)
    assert got.values.tolist() == [by_hand[row] for row in sorted(by_hand)]
