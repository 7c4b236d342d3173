"""Table-shaped embeddings: vectors, gradients, frozen forms, memory, options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.batch import keyed_jagged
from engine.data.statistics import IdStatistics
from engine.errors import SchemaError
from engine.hashing import fingerprints, rows_of
from engine.schema import FeatureSpec
from engine.tables import CHUNK, TableEmbedding, unallocated_tables
from plugins.embedding.full import FullEmbedding
from plugins.embedding.hashing import HashingEmbedding
from plugins.embedding.unified import UnifiedEmbedding

FEATURES = [
    FeatureSpec(name="user", side="user", dim=8),
    FeatureSpec(name="item", dim=8),
    FeatureSpec(name="tags", kind="multi", dim=8),
    FeatureSpec(name="hist", kind="sequence", of="item", dim=8),
]


def statistics(**sizes: int) -> dict[str, IdStatistics]:
    return {
        space: IdStatistics(np.sort(fingerprints(range(n))), np.arange(1, n + 1, dtype=np.int64))
        for space, n in sizes.items()
    }


STATISTICS = statistics(user=20, item=30, tags=4)


def ids(users: int = 6, targets: int = 6, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    tags, hist = rng.integers(0, 3, targets), rng.integers(0, 5, users)
    return keyed_jagged(
        {
            "user": (fingerprints(rng.integers(0, 25, users)), None),
            "item": (fingerprints(rng.integers(0, 35, targets)), None),
            "tags": (fingerprints(rng.integers(0, 5, tags.sum())), tags),
            "hist": (fingerprints(rng.integers(0, 35, hist.sum())), hist),
        }
    )


def make(cls: type[TableEmbedding], features: Any = None, stats: Any = None, **options: Any) -> TableEmbedding:
    torch.manual_seed(3)
    return cls(features or FEATURES, cls.Options(**options), STATISTICS if stats is None else stats)


METHODS: list[tuple[type[TableEmbedding], dict[str, Any]]] = [
    (FullEmbedding, {}),
    (FullEmbedding, {"min_count": 5, "unknown_rows": 3}),
    (HashingEmbedding, {"rows": 50}),
    (HashingEmbedding, {"ratio": 0.5, "collision_free_below": 10}),
    (UnifiedEmbedding, {"rows": 40, "lookups": 1}),
    (UnifiedEmbedding, {"ratio": 0.5, "lookups": 4}),
    (UnifiedEmbedding, {"budget_bytes": 3000, "exclude": ["tags"]}),
]
NAMED = [pytest.param(cls, options, id=f"{cls.name}-{n}") for n, (cls, options) in enumerate(METHODS)]


@pytest.mark.parametrize(("cls", "options"), NAMED)
@pytest.mark.parametrize(("users", "targets"), [(6, 6), (1, 9), (3, 2), (1, 1)])
def test_one_vector_a_value_with_lengths_kept_and_equal_when_frozen(
    cls: type[TableEmbedding], options: dict[str, Any], users: int, targets: int
) -> None:
    method, asked = make(cls, **options), ids(users, targets)
    vectors, frozen = method(asked), method.freeze()(asked)
    given = asked.to_dict()
    assert list(vectors) == ["user", "item", "tags", "hist"]
    for feature, its in vectors.items():
        assert its.values().shape == (len(given[feature].values()), method.widths[feature])
        assert torch.equal(its.lengths(), given[feature].lengths())
        assert torch.equal(its.offsets(), given[feature].offsets())
        torch.testing.assert_close(frozen[feature].values(), its.values(), atol=1e-6, rtol=0)
        assert not frozen[feature].values().requires_grad


@pytest.mark.parametrize(("cls", "options"), NAMED)
def test_a_target_and_a_history_of_one_id_have_one_vector(cls: type[TableEmbedding], options: dict[str, Any]) -> None:
    one = fingerprints([7])
    empty = (np.empty(0, np.int64), np.zeros(1, np.int64))
    vectors = make(cls, **options)(
        keyed_jagged({"user": (one, None), "item": (one, None), "tags": empty, "hist": (one, np.ones(1, np.int64))})
    )
    assert torch.equal(vectors["item"].values(), vectors["hist"].values())
    assert not torch.equal(vectors["item"].values(), vectors["user"].values())


@pytest.mark.parametrize(("cls", "options"), NAMED)
def test_gradients_reach_the_rows_that_were_read_and_no_others(
    cls: type[TableEmbedding], options: dict[str, Any]
) -> None:
    """The sum of all vectors has gradient (how often a row was read) in each of the row's components."""
    method, asked = make(cls, **options), ids()
    sum(v.values().sum() for v in method(asked).values()).backward()
    read = method.placer({k: v.values() for k, v in asked.to_dict().items()})
    counts: dict[str, torch.Tensor] = {}
    for feature, rows in read.items():
        table = method._placements[feature].table
        counts.setdefault(table.name, torch.zeros(table.rows)).index_add_(0, rows, torch.ones(len(rows)))
    touched = method.touched_rows(asked)
    for group in method.groups.values():
        for name, parameter in group.named_parameters():
            table_name = name.split(".")[-2]
            assert parameter.grad is not None
            dim = method.tables[table_name].dim
            torch.testing.assert_close(parameter.grad[:, :dim], counts[table_name][:, None].expand(-1, dim))
            assert (parameter.grad[:, dim:] == 0).all()
            assert torch.equal(touched[table_name], counts[table_name].nonzero()[:, 0])


@pytest.mark.parametrize(("cls", "options"), NAMED)
def test_memory_is_what_the_tensors_hold(cls: type[TableEmbedding], options: dict[str, Any]) -> None:
    method = make(cls, **options)
    trained = sum(p.nbytes for p in method.parameters())
    buffers = sum(b.nbytes for b in method.buffers())
    rows = sum(p.shape[0] for p in method.parameters())
    weights = sum(4 * table.rows * table.dim for table in method.tables.values())
    frozen = method.freeze()
    held = sum(t.nbytes for t in (*frozen.parameters(), *frozen.buffers()))
    assert method.memory_bytes().inference == held == weights + buffers
    assert method.memory_bytes().training == trained + buffers + 4 * rows


@pytest.mark.parametrize(("cls", "options"), NAMED)
def test_a_form_made_without_memory_takes_mapped_weights(cls: type[TableEmbedding], options: dict[str, Any]) -> None:
    method, asked = make(cls, **options), ids()
    with unallocated_tables():
        empty = make(cls, **options).freeze()
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(method.freeze().state_dict(), assign=True)
    for feature, vectors in empty(asked).items():
        assert torch.equal(vectors.values(), method(asked)[feature].values())


def test_the_first_weights_depend_on_the_seed_and_the_table_and_on_nothing_else() -> None:
    first = dict(make(FullEmbedding).freeze().weights.items())
    fewer = dict(make(FullEmbedding, FEATURES[:2]).freeze().weights.items())
    assert torch.equal(first["t_user"], fewer["t_user"])
    assert not torch.equal(first["t_user"], first["t_item"][:21])
    torch.manual_seed(4)
    other = FullEmbedding(FEATURES, FullEmbedding.Options(), STATISTICS).freeze().weights
    assert not torch.equal(first["t_user"], other["t_user"])


def test_a_longer_table_begins_with_the_rows_of_a_shorter_one() -> None:
    """So a shard draws its own rows alone: they do not depend on how many there are."""
    short = make(HashingEmbedding, FEATURES[:1], rows=CHUNK + 10).freeze().weights["t_user"]
    long = make(HashingEmbedding, FEATURES[:1], rows=2 * CHUNK + 5).freeze().weights["t_user"]
    assert torch.equal(short, long[: CHUNK + 10])
    assert float(long.abs().max()) <= 0.01
    assert float(long.std()) == pytest.approx(0.01 / 3**0.5, rel=0.01), "uniform in [-a, a] has deviation a / sqrt 3"


def test_unknown_ids_of_full_start_at_zero_and_rare_ids_count_as_unknown() -> None:
    method = make(FullEmbedding, FEATURES[:1], min_count=11)
    assert method.tables["t_user"].rows == 11, "ids 1..20 times seen: ten of them at least 11 times, and the unknown"
    stats = STATISTICS["user"]
    rare = torch.from_numpy(stats.fingerprints[stats.counts < 11])
    vectors = method(keyed_jagged({"user": (rare, None)}))["user"].values()
    assert torch.equal(vectors, torch.zeros(10, 8))


def test_hashing_of_a_small_vocabulary_can_be_free_of_collisions() -> None:
    """The fair baseline: 4 tags keep a row each, 20 users and 30 items share a half."""
    method = make(HashingEmbedding, ratio=0.5, collision_free_below=10)
    assert {t.name: t.rows for t in method.tables.values()} == {"t_user": 10, "t_item": 15, "t_tags": 5}
    tags = method(keyed_jagged({"tags": (fingerprints(range(4)), np.array([4]))}))["tags"].values()
    assert len(tags.unique(dim=0)) == 4


def test_hashing_takes_rows_by_space_and_needs_statistics_only_for_what_depends_on_them() -> None:
    method = make(HashingEmbedding, stats={}, rows={"user": 7})
    assert {n: t.rows for n, t in method.tables.items()} == {"t_user": 7, "t_item": 65536, "t_tags": 65536}
    wants = HashingEmbedding.wants_statistics
    assert not wants(HashingEmbedding.Options(rows=7))
    assert wants(HashingEmbedding.Options(ratio=0.1))
    assert wants(HashingEmbedding.Options(collision_free_below=3))
    with pytest.raises(ValidationError, match="not both"):
        HashingEmbedding.Options(rows=7, ratio=0.5)


def test_unified_puts_the_chunks_of_an_id_behind_one_another() -> None:
    method = make(UnifiedEmbedding, rows=40, lookups=4)
    prints = torch.from_numpy(fingerprints(["a", "b"]))
    vectors = method(keyed_jagged({"user": (prints, None)}))["user"].values()
    table = method.freeze().weights["unified"]
    assert table.shape == (40, 2)
    expected = torch.cat([table[rows_of(prints, "user", j, 40)] for j in range(4)], dim=1)
    assert torch.equal(vectors, expected)


@pytest.mark.parametrize(("lookups", "chunk"), [(1, 8), (2, 4), (4, 2)])
def test_unified_keeps_to_its_share_of_the_memory(lookups: int, chunk: int) -> None:
    """Full has (21 + 31 + 5) rows of 8 floats: 1,824 bytes; a half is 912 bytes: 114 chunks of 2, 57 of 4, 28 of 8."""
    method = make(UnifiedEmbedding, ratio=0.5, lookups=lookups)
    assert method.tables["unified"].dim == chunk
    assert method.tables["unified"].rows == 912 // (4 * chunk)
    assert set(method.widths.values()) == {8}


def test_unified_counts_excluded_features_within_the_budget() -> None:
    """5 rows of 8 floats for tags are 160 bytes; the other 752 of 912 make 47 chunks of 4 floats."""
    method = make(UnifiedEmbedding, ratio=0.5, exclude=["tags"])
    assert {n: (t.rows, t.dim) for n, t in method.tables.items()} == {"t_tags": (5, 8), "unified": (47, 4)}
    with pytest.raises(SchemaError, match="is spent by the excluded features"):
        make(UnifiedEmbedding, budget_bytes=100, exclude=["tags"])
    with pytest.raises(SchemaError, match="no embedded feature named 'tag'"):
        make(UnifiedEmbedding, exclude=["tag"])


def test_a_feature_names_its_own_number_of_lookups_and_its_space_follows() -> None:
    features = [FEATURES[0], FEATURES[1].model_copy(update={"lookups": 4}), *FEATURES[2:]]
    method = make(UnifiedEmbedding, features, rows=100)
    assert method.widths == {"user": 8, "item": 16, "tags": 8, "hist": 16}
    assert method(ids())["hist"].values().shape[1] == 16


def test_a_width_that_lookups_do_not_divide_is_refused() -> None:
    with pytest.raises(SchemaError, match="width 8 is not a multiple of 3 lookups"):
        make(UnifiedEmbedding, rows=100, lookups=3)
    with pytest.raises(ValidationError, match="give one of"):
        UnifiedEmbedding.Options(rows=3, ratio=0.5)
    assert make(UnifiedEmbedding, rows=100, lookups=3, chunk=5).widths["user"] == 15


def test_names_that_torch_reserves_or_splits_are_fine() -> None:
    features = [FeatureSpec(name=n, dim=4) for n in ("items", "a.b", "weight", "forward")]
    method = make(HashingEmbedding, features, stats={}, rows=10)
    one = fingerprints([1])
    asked = keyed_jagged({f.name: (one, None) for f in features})
    assert {f: v.values().shape for f, v in method(asked).items()} == {f.name: (1, 4) for f in features}
    frozen = method.freeze()
    assert torch.equal(frozen(asked)["a.b"].values(), method(asked)["a.b"].values())


def test_some_features_alone_can_be_looked_up() -> None:
    """An item tower asks for items only, and for more of them than there are users."""
    method, asked = make(UnifiedEmbedding, rows=100), ids(3, 7)
    items = keyed_jagged({"item": (asked.to_dict()["item"].values(), None)})
    assert torch.equal(method(items)["item"].values(), method(asked)["item"].values())


def test_a_batch_without_rows_gives_no_vectors() -> None:
    none = np.empty(0, np.int64)
    asked = keyed_jagged({"user": (none, None), "item": (none, None), "tags": (none, none), "hist": (none, none)})
    for method in (make(FullEmbedding), make(UnifiedEmbedding, rows=9)):
        assert {f: tuple(v.values().shape) for f, v in method(asked).items()} == dict.fromkeys(method.widths, (0, 8))
        assert {f: tuple(v.values().shape) for f, v in method.freeze()(asked).items()} == dict.fromkeys(
            method.widths, (0, 8)
        )


@pytest.mark.parametrize("dim", [1, 2, 3, 6])
def test_a_width_that_the_kernels_do_not_take_is_padded_with_zeros_that_nothing_reads(dim: int) -> None:
    narrow = [f.model_copy(update={"dim": dim}) for f in FEATURES]
    method = make(FullEmbedding, narrow, init=0.5)
    for weight in (t for _, t, _ in method.local_weights()):
        assert weight.shape[1] == 4 * -(-dim // 4)
        assert (weight[:, dim:] == 0).all()
    batch = ids()
    trained, frozen = method(batch), method.freeze()
    for feature, found in frozen(batch).items():
        assert found.values().shape[1] == dim == method.widths[feature]
        torch.testing.assert_close(found.values(), trained[feature].values())
    rows = 21 + 31 + 5  # users, items and tags, each with one for the unknown
    vocabularies = sum(b.nbytes for b in method.placer.buffers())
    assert method.memory_bytes().inference == rows * dim * 4 + vocabularies == frozen.memory_bytes().inference
