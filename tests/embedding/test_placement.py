"""Ids to rows: golden vectors, exact search, seeds by name."""

from __future__ import annotations

import mmh3
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.hashing import fingerprint, fingerprints
from engine.placement import Hashed, Own, Placer, Table

MASK = (1 << 64) - 1


def murmur_row(text: str, space: str, lookup: int, rows: int) -> int:
    """The row by Python's whole numbers and mmh3 alone: seed from the name, murmur3's finaliser, 63 bits, remainder."""
    seed = mmh3.hash64(f"{space}#{lookup}".encode(), signed=False)[0]
    h = mmh3.hash64(text.encode(), signed=False)[0] ^ seed
    h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCD & MASK
    h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
    return ((h ^ (h >> 33)) & (MASK >> 1)) % rows


def own(space: str, known: list[int], unknown_rows: int = 1) -> Own:
    return Own(Table(space, len(known) + unknown_rows, 4), space, np.array(sorted(known), dtype=np.int64), unknown_rows)


def test_hashed_rows_are_those_of_an_independent_computation() -> None:
    placer = Placer(
        {
            "a": Hashed(Table("a", 97, 4), "a", 2),
            "b": Hashed(Table("b", 1000, 4), "b", 2),
            "c": Hashed(Table("c", 7, 4), "c"),
        }
    )
    texts = ["1", "2", "user-1", "用户-1", ""]
    rows = placer({f: torch.from_numpy(fingerprints(texts)) for f in "abc"})
    for feature, size, lookups in (("a", 97, 2), ("b", 1000, 2), ("c", 7, 1)):
        expected = [murmur_row(t, feature, j, size) for t in texts for j in range(lookups)]
        assert rows[feature].tolist() == expected


def test_golden_rows_hold_on_every_platform() -> None:
    """Written down once; a change would scramble every stored table."""
    placer = Placer({"item": Hashed(Table("t", 1_000_003, 4), "item", 4)})
    rows = placer({"item": torch.from_numpy(fingerprints(["50", "plexrank"]))})
    assert rows["item"].tolist() == GOLDEN
    assert [murmur_row(text, "item", j, 1_000_003) for text in ("50", "plexrank") for j in range(4)] == GOLDEN


GOLDEN = [976427, 370302, 839592, 301765, 966403, 220878, 440447, 732955]


def test_features_of_one_space_share_rows_and_features_of_another_do_not() -> None:
    table = Table("unified", 1 << 20, 4)
    placer = Placer({"item": Hashed(table, "item"), "history": Hashed(table, "item"), "user": Hashed(table, "user")})
    ids = torch.from_numpy(fingerprints(range(100)))
    rows = placer({"item": ids, "history": ids, "user": ids})
    assert torch.equal(rows["item"], rows["history"])
    assert int((rows["item"] == rows["user"]).sum()) <= 1


def test_a_feature_added_before_another_moves_none_of_its_rows() -> None:
    table = Table("unified", 1000, 4)
    ids = torch.arange(50)
    alone = Placer({"b": Hashed(table, "b")})({"b": ids})["b"]
    beside = Placer({"a": Hashed(table, "a"), "b": Hashed(table, "b")})({"a": ids, "b": ids})["b"]
    assert torch.equal(alone, beside)


def test_each_known_id_has_the_row_after_those_of_unknown_ids() -> None:
    placer = Placer({"x": own("x", [-5, 0, 9], unknown_rows=2)})
    assert placer({"x": torch.tensor([9, -5, 0])})["x"].tolist() == [4, 2, 3]
    unknown = placer({"x": torch.arange(100, 200)})["x"]
    assert set(unknown.tolist()) == {0, 1}, "a hundred unknown ids spread over both rows"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=60), min_size=1, max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
)
def test_the_search_finds_what_numpy_finds(vocabularies: list[list[int]], others: list[int]) -> None:
    """Any integers, also crowded ones and the largest, in several vocabularies at once."""
    placer = Placer({f"s{n}": own(f"s{n}", known) for n, known in enumerate(vocabularies)})
    asked = {f"s{n}": torch.tensor(known + others, dtype=torch.int64) for n, known in enumerate(vocabularies)}
    rows = placer(asked)
    for n, known in enumerate(vocabularies):
        place = {value: row + 1 for row, value in enumerate(sorted(known))}
        assert rows[f"s{n}"].tolist() == [place.get(int(v), 0) for v in asked[f"s{n}"]]


def test_an_empty_vocabulary_and_an_empty_batch_are_fine() -> None:
    placer = Placer({"x": own("x", []), "y": own("y", [4])})
    empty = torch.empty(0, dtype=torch.int64)
    assert {f: len(r) for f, r in placer({"x": empty, "y": empty}).items()} == {"x": 0, "y": 0}
    assert placer({"x": torch.tensor([4])})["x"].tolist() == [0]


def test_collisions_are_as_rare_as_chance_has_them() -> None:
    """n ids in m rows leave m (1 - (1 - 1/m)^n) rows used; 3,000 in 3,000: 63.2 %."""
    placer = Placer({"x": Hashed(Table("x", 3000, 4), "x", 2)})
    rows = placer({"x": torch.from_numpy(fingerprints(range(3000)))})["x"].reshape(-1, 2)
    for lookup in (0, 1):
        assert len(rows[:, lookup].unique()) == pytest.approx(3000 * 0.632, rel=0.03)
    pairs = rows[:, 0] * 3000 + rows[:, 1]
    assert len(pairs.unique()) >= 2998, "two ids that meet in both lookups: 0.5 expected"


def test_the_fingerprint_of_a_number_is_that_of_its_text() -> None:
    assert fingerprint(50) == fingerprint("50")
