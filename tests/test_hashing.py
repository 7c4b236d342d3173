"""Ids to rows: the same on every platform, from plain Python arithmetic."""

from __future__ import annotations

import mmh3
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.hashing import canonical, fingerprint, fingerprint_column, fingerprints, mix, rows_of, seed_of

ANY_SPEED = settings(deadline=None)  # a loaded machine is no failure

# mmh3.hash64(text, seed=0, x64arch=True, signed=True)[0], computed once and written down
GOLDEN = {
    "": 0,
    "42": -5291771196513038484,
    "item_1": 8396722713195201928,
    "用户-1": 7869504444041720275,
    "Crème brûlée 🍮": -8852952555866288045,
}
ROWS_0 = [769, 140, 578, 117, 725]
ROWS_1 = [972, 861, 460, 817, 627]


def fmix64(value: int) -> int:
    """murmur3's finaliser in Python integers."""
    mask = (1 << 64) - 1
    value &= mask
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD & mask
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 & mask
    return value ^ value >> 33


@pytest.mark.parametrize(("text", "expected"), GOLDEN.items())
def test_a_fingerprint_is_the_low_half_of_mmh3(text: str, expected: int) -> None:
    assert fingerprint(text) == expected


def test_rows_of_known_ids_never_change() -> None:
    prints = torch.tensor([fingerprint(text) for text in GOLDEN])
    assert rows_of(prints, "item_id", 0, 1000).tolist() == ROWS_0
    assert rows_of(prints, "item_id", 1, 1000).tolist() == ROWS_1


def test_the_number_the_text_and_the_whole_float_are_one_id() -> None:
    assert fingerprint(42) == fingerprint("42") == fingerprint(42.0) == fingerprint(np.int16(42)) == GOLDEN["42"]
    assert fingerprint(True) == fingerprint("true") != fingerprint(1)
    assert fingerprint("042") != fingerprint(42)


@ANY_SPEED
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(-(2**63), 2**63 - 1))
def test_mix_is_the_finaliser_of_the_seeded_fingerprint(values: list[int], seed: int) -> None:
    expected = [fmix64(value ^ seed) & 0x7FFFFFFFFFFFFFFF for value in values]
    assert mix(torch.tensor(values), seed).tolist() == expected


@ANY_SPEED
@given(st.text(max_size=30), st.integers(0, 5), st.integers(1, 10**9))
def test_rows_lie_in_the_table_and_come_from_names_alone(text: str, lookup: int, rows: int) -> None:
    seed = mmh3.hash64(f"genre#{lookup}".encode(), 0, True, True)[0]
    assert seed_of("genre", lookup) == seed
    print_ = mmh3.hash64(text.encode(), 0, True, True)[0]
    assert int(rows_of(torch.tensor([print_]), "genre", lookup, rows)) == (fmix64(print_ ^ seed) & (2**63 - 1)) % rows


@ANY_SPEED
@given(st.lists(st.one_of(st.none(), st.text(max_size=12)), max_size=30), st.booleans())
def test_a_column_hashes_as_its_values_do_one_by_one(values: list[str | None], chunked: bool) -> None:
    column = pa.array(values, pa.string())
    if chunked:
        column = pa.chunked_array([column[:7], column[7:]], pa.string())
    expected = [fingerprint("" if v is None else v) for v in values]
    assert fingerprint_column(column).tolist() == expected
    assert fingerprint_column(pa.array(values, pa.string()).dictionary_encode()).tolist() == expected


@ANY_SPEED
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_integers_in_arrow_hash_as_their_text(values: list[int]) -> None:
    assert fingerprint_column(pa.array(values, pa.int64())).tolist() == fingerprints(str(v) for v in values).tolist()


def test_canonical_text() -> None:
    assert [canonical(v) for v in ("a", 7, 7.0, 7.5, False, np.float32(3))] == ["a", "7", "7", "7.5", "false", "3"]


def test_a_thousand_rows_of_a_table_fill_evenly() -> None:
    """100,000 ids in 1,000 rows: chi-squared of 999 degrees stays under 1,144 (p = .001)."""
    prints = torch.from_numpy(fingerprints(range(100_000)))
    counts = np.bincount(rows_of(prints, "item_id", 0, 1000).numpy(), minlength=1000)
    assert ((counts - 100) ** 2 / 100).sum() < 1144
