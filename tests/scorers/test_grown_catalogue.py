"""Items that come or change while it scores: known to the scorer by their features, through deltas and loads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.tensors import load_tensors
from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.item_side import ItemSide
from plugins.scorers.inproc import InprocScorer
from tests.scorers.conftest import Rewrite, delta, drawn, loaded, written

GIVEN = {"genres": ["war", "all"], "year": 1985}


def asked(items: list[str], past: list[str] | None = None, **more: Any) -> ScoreRequest:
    return ScoreRequest(user={"user_id": "u3"}, history={"item_id": past or ["4", "9"]}, items=items, **more)


def grown(bundle: Path, *batches: dict[str, dict[str, Any]]) -> tuple[ArrowCatalogue, list[np.ndarray]]:
    """The bundle's catalogue after these batches, and the rows that each touched."""
    opened = Bundle.open(bundle)
    catalogue, rows = opened.catalogue, []
    for batch in batches:
        catalogue = catalogue.updated(list(batch), list(batch.values()), opened.encoder)
        rows.append(np.unique(catalogue.rows(list(batch))))
    return catalogue, rows


def tell(scorer: InprocScorer, bundle: Path, *batches: dict[str, dict[str, Any]]) -> None:
    version = Bundle.open(bundle, verify=False).version
    for n in range(len(batches)):
        catalogue, rows = grown(bundle, *batches[: n + 1])
        scorer.items_changed(version, catalogue, rows[-1])


def score(scorer: InprocScorer, request: ScoreRequest) -> np.ndarray:
    scores: np.ndarray = scorer.score(request).tasks["liked"]
    return scores


@pytest.mark.parametrize("megabytes", [256, 0], ids=["items' vectors ahead", "all a request"])
def test_a_new_item_scores_by_its_features(tiny_bundle: Path, megabytes: int) -> None:
    """As it does when a request brings the features along; and a changed item likewise."""
    scorer, plain = loaded(tiny_bundle, item_vectors_mb=megabytes), loaded(tiny_bundle)
    tell(scorer, tiny_bundle, {"new": GIVEN}, {"3": {"year": 1901}, "newer": {"genres": "crime"}})
    request = asked(["new", "3", "newer", "7"])
    values = {"genres": [["war", "all"], None, ["crime"], None], "year": [1985, 1901, None, None]}
    wanted = score(plain, asked(["new", "3", "newer", "7"], item_features=values))
    np.testing.assert_allclose(score(scorer, request), wanted, atol=1e-6)
    assert not np.allclose(wanted, score(plain, request), atol=1e-4)
    past = asked(["7", "new"], ["new", "3", "4"])  # an id that training did not see is one more unknown in a history
    whole = loaded(tiny_bundle, item_vectors_mb=0)
    tell(whole, tiny_bundle, {"new": GIVEN}, {"3": {"year": 1901}, "newer": {"genres": "crime"}})
    np.testing.assert_allclose(score(scorer, past), score(whole, past), atol=1e-6)


def test_items_vectors_go_on_where_new_items_need_more_room(unified_bundle: Path) -> None:
    """Three hundred items over thirty, a few at a time; what held the older vectors still answers as it did."""
    opened = Bundle.open(unified_bundle)
    from engine.plugins import installed

    model = opened.model(installed()).eval()
    catalogue = opened.catalogue
    side = ItemSide.make(model, opened.encoder, catalogue, 1 << 30)
    assert side is not None
    first, before = side, side.logits(asked(["3", "7"]))
    for n in range(30):
        batch = {f"n{10 * n + k}": {"genres": [["war"], "crime|all", None][k % 3], "year": 1950 + k} for k in range(10)}
        catalogue = catalogue.updated(list(batch), list(batch.values()), opened.encoder)
        side = side.with_items(catalogue, np.unique(catalogue.rows(list(batch))))
        assert side is not None
    request = asked([f"n{k}" for k in range(300)] + ["3", "7"], ["n5", "4"])
    whole = ItemSide.make(model, opened.encoder, catalogue, 1 << 30)
    assert whole is not None
    a, b = side.logits(request), whole.logits(request)
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a["liked"], b["liked"], atol=1e-6)
    after = first.logits(asked(["3", "7"]))
    assert after is not None
    assert before is not None
    assert np.array_equal(before["liked"], after["liked"])


def test_beyond_its_memory_each_request_makes_the_vectors(tiny_bundle: Path) -> None:
    opened = Bundle.open(tiny_bundle)
    from engine.plugins import installed

    model = opened.model(installed()).eval()
    each = 4 * (8 + 8 + 1) + 160
    side = ItemSide.make(model, opened.encoder, opened.catalogue, 31 * each)
    assert side is not None
    one = opened.catalogue.updated(["new"], [{}], opened.encoder)
    held = side.with_items(one, np.array([30]))
    assert held is not None
    two = one.updated(["newer"], [{}], opened.encoder)
    assert held.with_items(two, np.array([31])) is None


def test_deltas_reach_new_items_too(unified_bundle: Path, rewrite: Rewrite) -> None:
    state = load_tensors(unified_bundle / "model.safetensors")
    scorer = loaded(unified_bundle)
    first = {"unified": drawn(state["embedding.weights.unified"], list(range(0, 50, 3)))}
    second = {"unified": drawn(state["embedding.weights.unified"], list(range(0, 50, 2)), 1)}
    batches: list[dict[str, Any]] = [{"new": GIVEN, "3": {"genres": ["crime"]}}, {"newer": {"year": 1930}}]
    tell(scorer, unified_bundle, batches[0])
    scorer.apply(delta(unified_bundle, tables=first))
    catalogue, rows = grown(unified_bundle, *batches)
    scorer.items_changed(Bundle.open(unified_bundle).version, catalogue, rows[-1])
    scorer.apply(delta(unified_bundle, 2, tables=second))
    changed = rewrite(unified_bundle, written(state | written(state, first), second))
    other = loaded(changed)
    other.items_changed("feedc0ffee00", catalogue, None)
    request = asked(["new", "newer", *map(str, range(30))], ["new", "4"])
    np.testing.assert_allclose(score(scorer, request), score(other, request), atol=1e-6)


def test_the_same_bundle_loaded_again_keeps_what_was_said_of_items(tiny_bundle: Path, rewrite: Rewrite) -> None:
    """A gap in the deltas makes a follower load the bundle; that is no reason to forget a new item."""
    scorer = loaded(tiny_bundle)
    tell(scorer, tiny_bundle, {"new": GIVEN})
    before = score(scorer, asked(["new"]))
    scorer.load(tiny_bundle)
    assert np.array_equal(score(scorer, asked(["new"])), before)
    scorer.apply(delta(tiny_bundle, epoch=1, tables={}))
    scorer.apply(delta(tiny_bundle, epoch=2, tables={}))  # begun anew from the bundle's weights
    assert np.array_equal(score(scorer, asked(["new"])), before)
    scorer.load(rewrite(tiny_bundle, {}))  # another bundle: its own catalogue, until it is told
    assert not np.allclose(score(scorer, asked(["new"])), before, atol=1e-4)


def test_a_catalogue_of_another_bundle_is_left_alone(tiny_bundle: Path) -> None:
    scorer = loaded(tiny_bundle)
    before = score(scorer, asked(["new"]))
    catalogue, rows = grown(tiny_bundle, {"new": GIVEN})
    scorer.items_changed("0123456789ab", catalogue, rows[0])
    assert np.array_equal(score(scorer, asked(["new"])), before)
    with pytest.raises(TypeError, match="ArrowCatalogue"):
        scorer.items_changed(scorer.version, object(), rows[0])  # type: ignore[arg-type]


def test_readers_meet_new_items_whole(unified_bundle: Path) -> None:
    """While items come and deltas are applied, every answer is finite and none fails."""
    scorer, done, errors = loaded(unified_bundle), threading.Event(), []
    table: Tensor = load_tensors(unified_bundle / "model.safetensors")["embedding.weights.unified"]
    names = [f"n{k}" for k in range(200)]

    def read() -> None:
        while not done.is_set():
            try:
                assert np.isfinite(score(scorer, asked([*names, "3", "4"], ["n3", "4"]))).all()
                assert np.isfinite(score(scorer, asked(["3", "4"]))).all()
            except Exception as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    opened = Bundle.open(unified_bundle)
    catalogue = opened.catalogue
    for n, name in enumerate(names):
        catalogue = catalogue.updated([name], [GIVEN], opened.encoder)
        scorer.items_changed(opened.version, catalogue, np.array([len(catalogue) - 1]))
        scorer.apply(delta(unified_bundle, n + 1, tables={"unified": drawn(table, [n % 50], n)}))
    done.set()
    reader.join()
    assert not errors, errors[:3]
