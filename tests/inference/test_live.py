"""Live memory scores, bit for bit, as the scorer in process does with the same deltas."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.bundle import Bundle
from engine.bundle.tensors import load_tensors
from engine.errors import BundleError, DeltaGap, PlexrankError
from engine.inference.live import LiveModel
from engine.inference.live_writer import LiveWriter
from engine.plugins import Plugins
from engine.streaming.deltas.delta import Delta, merge
from engine.streaming.deltas.delta_codec import decode, encode, read_part
from engine.tables import FrozenTables, TableEmbedding
from tests.conftest import FilmWorld
from tests.inference.live_world import chain, check_equal, dense_of, ended, fork, platt, rows_of, scored, scores
from tests.scorers.conftest import REQUESTS, delta, loaded

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def weights(tiny_bundle: Path) -> State:
    return load_tensors(tiny_bundle / "model.safetensors")


@pytest.fixture
def writer(bundle: Bundle, tmp_path: Path) -> Iterator[LiveWriter]:
    with LiveWriter(tmp_path / "live", bundle) as writer:
        yield writer


# ------------------------------------------------------------------------------------------------ equality
@pytest.mark.parametrize("megabytes", [256, 0], ids=["items' vectors ahead", "all a request"])
def test_scores_are_those_in_process_after_each_delta(
    bundle: Bundle, weights: State, tmp_path: Path, megabytes: int
) -> None:
    """Rows, dense parts, calibrations; a reader from the beginning, and one that comes later."""
    scorer, folder = loaded(bundle.path, item_vectors_mb=megabytes), tmp_path / "live"
    live = LiveModel.open(folder, bundle, item_vectors_mb=megabytes)
    assert (live.items is None) == (megabytes == 0)
    check_equal(live, scorer)
    with LiveWriter(folder, bundle, item_vectors_mb=megabytes) as writer:
        for one in chain(bundle.path, weights, 7):
            writer.apply(one)
            scorer.apply(one)
            assert live.refresh()
            assert not live.refresh()
            check_equal(live, scorer)
            assert writer.version == scorer.version == one.version
    check_equal(LiveModel.open(folder, bundle), scorer)


def test_a_reader_that_slept_takes_up_all_deltas_at_once(bundle: Bundle, weights: State, writer: LiveWriter) -> None:
    live = LiveModel.open(writer.folder, bundle)
    deltas = chain(bundle.path, weights, 9)
    for one in deltas:
        writer.apply(one)
    assert live.refresh()
    check_equal(live, scored(loaded(bundle.path), deltas))


def test_values_that_travelled_as_int8_and_merged_deltas_score_as_in_process(
    bundle: Bundle, weights: State, writer: LiveWriter
) -> None:
    first, *rest = [_travelled(one) for one in chain(bundle.path, weights, 4)]
    live, scorer = LiveModel.open(writer.folder, bundle), loaded(bundle.path)
    for one in (first, merge(*rest)):
        writer.apply(one)
        scorer.apply(one)
        live.refresh()
        check_equal(live, scorer)
    assert live.version.endswith("+0.4")


def _travelled(one: Delta) -> Delta:
    read = [read_part(part) for part in encode(one, "int8")]
    return decode(read[0][0], b"".join(payload for _, payload in read))


def test_rows_that_many_features_share_are_renewed_wherever_they_are_read(
    films: FilmWorld, plugins: Plugins, tmp_path: Path
) -> None:
    bundle = _trained(films, plugins, tmp_path, {"name": "unified", "dim": 8, "options": {"rows": 50}})
    state = load_tensors(bundle.path / "model.safetensors")
    live, scorer = LiveModel.open(tmp_path / "live", bundle), loaded(bundle.path)
    with LiveWriter(tmp_path / "live", bundle) as writer:
        for one in chain(bundle.path, state, 3):
            writer.apply(one)
            scorer.apply(one)
            live.refresh()
            check_equal(live, scorer)


def _trained(films: FilmWorld, plugins: Plugins, folder: Path, embedding: dict[str, Any]) -> Bundle:
    from engine.train_command import run_training

    training = {"epochs": 1, "batch_size": 256, "threads": 1}
    config = films.config(name="other", embedding=embedding, interest={"name": "din"}, training=training)
    run_training(config, folder / "trained", plugins=plugins)
    return Bundle.open(folder / "trained" / "bundle")


class Scaled(nn.Module):
    """A frozen embedding that is no `FrozenTables`: dense numbers are in the way of the tables."""

    def __init__(self, inner: FrozenTables) -> None:
        super().__init__()
        self.weights, self.widths, self.inner = inner.weights, inner.widths, [inner]  # not a part of the state twice
        self.scale = nn.Parameter(torch.tensor(1.0, device="cpu"), requires_grad=False)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        self.inner[0].weights = self.weights
        found = self.inner[0](ids)
        return {n: JaggedTensor(values=j.values() * self.scale, lengths=j.lengths()) for n, j in found.items()}


def test_an_embedding_with_a_dense_part_goes_to_a_generation_of_its_own(
    films: FilmWorld, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its items' vectors belong to the dense part: a reader that has not swapped keeps those it began with."""
    frozen = TableEmbedding.freeze
    monkeypatch.setattr(TableEmbedding, "freeze", lambda self: Scaled(frozen(self)))
    bundle = _trained(films, plugins, tmp_path, {"name": "full", "dim": 8})
    state = load_tensors(bundle.path / "model.safetensors")
    live, scorer = LiveModel.open(tmp_path / "live", bundle), loaded(bundle.path)
    assert live.items is not None
    with LiveWriter(tmp_path / "live", bundle) as writer:
        for n in range(1, 6):
            dense: State = {} if n % 2 else {"embedding.scale": torch.tensor(1.0 + n)} | dense_of(state, 1.1)
            one = delta(bundle.path, n, tables=rows_of(state, n) if n != 4 else {}, dense=dense)
            before = [scores(live.now, r) for r in REQUESTS]
            writer.apply(one)
            if n == 4:
                assert all(np.array_equal(a, scores(live.now, r)) for a, r in zip(before, REQUESTS, strict=True))
            scorer.apply(one)
            live.refresh()
            check_equal(live, scorer)
        assert [p.name for p in sorted(writer.folder.glob("gen-*"))] == ["gen-3"]
        writer.apply(delta(bundle.path, 1, epoch=1, tables=rows_of(state, 9)))
    live.refresh()
    scorer.apply(delta(bundle.path, 1, epoch=1, tables=rows_of(state, 9)))
    check_equal(live, scorer)


# ------------------------------------------------------------------------------------------------ the chain
def test_the_first_of_a_newer_chain_begins_from_the_bundles_own_weights(
    bundle: Bundle, weights: State, writer: LiveWriter
) -> None:
    """What a reader took before stays as it was, apart from the tables of the chain that was left."""
    live, scorer = LiveModel.open(writer.folder, bundle), loaded(bundle.path)
    scored(scorer, chain(bundle.path, weights, 3))
    for one in chain(bundle.path, weights, 3):
        writer.apply(one)
    live.refresh()
    old, wanted = live.now, [scorer.score(r).tasks["liked"] for r in REQUESTS]
    for one in chain(bundle.path, weights, 2, epoch=4):
        writer.apply(one)
        scorer.apply(one)
    assert live.refresh()
    check_equal(live, scorer)
    assert live.version.endswith("+4.2")
    for request, its in zip(REQUESTS, wanted, strict=True):
        np.testing.assert_array_equal(scores(old, request), its)
    assert [p.name for p in writer.folder.glob("gen-*")] == ["gen-2"]


def test_a_delta_that_was_applied_is_ignored_and_one_that_does_not_follow_refused(
    bundle: Bundle, weights: State, writer: LiveWriter
) -> None:
    one, two, three, four = chain(bundle.path, weights, 4)
    scorer = scored(loaded(bundle.path), [one, two])
    live = LiveModel.open(writer.folder, bundle)
    for known in (one, two, one, two):
        writer.apply(known)
    for refused in (four, delta(bundle.path, 1, base="0" * 12), delta(bundle.path, 3, epoch=2)):
        with pytest.raises(DeltaGap):
            writer.apply(refused)
    live.refresh()
    check_equal(live, scorer)
    writer.apply(three)
    live.refresh()
    check_equal(live, scored(scorer, [three]))


@pytest.mark.parametrize("wrong", ["a name", "not finite", "scores nothing", "a calibration", "a row"])
def test_a_delta_that_does_not_fit_changes_nothing(
    bundle: Bundle, weights: State, writer: LiveWriter, wrong: str
) -> None:
    live, rows = LiveModel.open(writer.folder, bundle), rows_of(weights, 1)
    dense: State = {
        "a name": {"ranker.unheard": torch.ones(1)},
        "not finite": {"ranker.heads.bias": torch.tensor([float("nan")])},
        "scores nothing": {
            "ranker.body.0.bias": torch.full((16,), 3e38),
            "ranker.heads.weight": torch.tensor([[3e38, -3e38] * 8]),  # infinite less infinite
        },
        "a calibration": platt(-1.0, 0.0),
        "a row": {},
    }[wrong]
    if wrong == "a row":
        rows["t_item_id"].rows[-1] = 1000
    with pytest.raises(BundleError):
        writer.apply(delta(bundle.path, tables=rows, dense=dense))
    assert not live.refresh()
    check_equal(live, loaded(bundle.path))
    writer.apply(delta(bundle.path, tables=rows_of(weights, 1)))
    assert live.refresh()


def test_a_newer_chain_whose_bundle_is_gone_is_a_gap(bundle: Bundle, weights: State, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    mine = Bundle.open(tmp_path / "bundle")
    with LiveWriter(tmp_path / "live", mine) as writer:
        writer.apply(chain(bundle.path, weights, 1)[0])
        shutil.rmtree(tmp_path / "bundle")
        with pytest.raises(DeltaGap, match="its bundle cannot be read"):
            writer.apply(delta(bundle.path, epoch=1))
        assert writer.version.endswith("+0.1")


def test_a_writer_goes_on_where_the_one_before_ended(bundle: Bundle, weights: State, tmp_path: Path) -> None:
    deltas, scorer = chain(bundle.path, weights, 6), loaded(bundle.path)
    for one in deltas:
        with LiveWriter(tmp_path, bundle) as writer:
            writer.apply(one)
    live = LiveModel.open(tmp_path, bundle)
    check_equal(live, scored(scorer, deltas))
    with LiveWriter(tmp_path, bundle) as writer:
        writer.begin_anew()
        live.refresh()
        check_equal(live, loaded(bundle.path))
        writer.apply(deltas[0])
        live.refresh()
    check_equal(live, scored(loaded(bundle.path), deltas[:1]))


# ------------------------------------------------------------------------------------------------ the folder
def test_a_second_writer_is_refused_by_the_firsts_name(bundle: Bundle, writer: LiveWriter) -> None:
    import os

    with pytest.raises(PlexrankError, match=f"process {os.getpid()} writes there already"):
        LiveWriter(writer.folder, bundle)
    writer.close()
    LiveWriter(writer.folder, bundle).close()
    with pytest.raises(PlexrankError, match="closed"):
        writer.apply(delta(bundle.path))


def test_a_folder_of_another_bundle_is_refused(
    bundle: Bundle, weights: State, writer: LiveWriter, tmp_path: Path
) -> None:
    from tests.scorers.conftest import rewritten

    other = Bundle.open(rewritten(bundle.path, tmp_path / "other", {"ranker.heads.bias": torch.ones(1)}))
    for open_ in (LiveModel.open, LiveWriter):
        writer.close()
        with pytest.raises(BundleError, match=f"live memory of another bundle, tiny {bundle.version}.*feedc0ffee00"):
            open_(writer.folder, other)
    LiveModel.open(writer.folder, bundle)


def test_memory_of_before_the_machine_was_started_is_made_anew(
    bundle: Bundle, weights: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pages that were mapped then only some may have come to the disk."""
    with LiveWriter(tmp_path, bundle) as writer:
        writer.apply(chain(bundle.path, weights, 1)[0])
    (tmp_path / "boot").write_text("00000000-0000-4000-8000-000000000001\n")
    monkeypatch.setattr("engine.inference.live_state._BOOT", tmp_path / "boot")
    check_equal(LiveModel.open(tmp_path, bundle), loaded(bundle.path))


def test_a_reader_scores_on_where_the_folder_is_removed_and_goes_to_the_next(
    bundle: Bundle, weights: State, writer: LiveWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.inference.live._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("engine.inference.live._RETRY_SECONDS", 0.0)
    one, two, _ = chain(bundle.path, weights, 3)
    live = LiveModel.open(writer.folder, bundle)
    writer.apply(one)
    live.refresh()
    shutil.rmtree(writer.folder)
    assert not live.refresh()
    assert live.trouble is not None
    assert str(writer.folder) in live.trouble
    check_equal(live, scored(loaded(bundle.path), [one]))
    with pytest.raises(PlexrankError, match="was removed: start the writer again"):
        writer.apply(two)
    with LiveWriter(writer.folder, bundle) as second:
        second.apply(one)
        second.apply(two)
        assert live.refresh()
    assert live.trouble is None
    check_equal(live, scored(loaded(bundle.path), [one, two]))


def test_a_bundle_whose_weights_were_edited_makes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleError, match="sha256"):
        LiveModel.open(tmp_path / "live", Bundle.open(tmp_path / "bundle", verify=False))
    assert not list((tmp_path / "live").glob("gen-*"))
    assert not (tmp_path / "live" / "state").exists()


def test_a_reader_cannot_write_to_what_all_share(bundle: Bundle, tmp_path: Path) -> None:
    """Its process ends by a signal, before a number changes."""
    live = LiveModel.open(tmp_path, bundle)
    table = dict(live.model.state_dict())["embedding.weights.t_item_id"]
    assert ended(fork(lambda: table.fill_(1.0))) < 0
    check_equal(live, loaded(bundle.path))
