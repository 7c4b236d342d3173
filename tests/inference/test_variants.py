"""Scores by compiled code and from int8 tables, beside those of the in-process scorer; what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.bundle import Bundle, read_manifest
from engine.bundle.tensors import load_tensors
from engine.components import EmbeddingMethod, Memory
from engine.data.prepare import Prepared
from engine.errors import BundleError, PlexrankError
from engine.hookspecs import hookimpl
from engine.inference.compiled import CompiledModel, Package, check_compiler, exported
from engine.inference.live import LiveModel
from engine.inference.live_view import LiveView
from engine.inference.live_writer import LiveWriter
from engine.inference.quantised import QuantisedTables, quantised, read, row_bytes
from engine.inference.runtime import Runtime
from engine.inference.signature import VERSION
from engine.model import build_model
from engine.plugins import GROUP, Plugins
from plugins.interest.din import DINInterest
from serving.triton.export import Exported, Wish, export
from serving.triton.hosted import Hosted
from serving.triton.selftest_cases import of_all_sizes
from serving.triton.variant import FILE, PACKAGE, Variant
from tests.inference.live_world import chain, dense_of, scored
from tests.inference.rich_world import config_of
from tests.scorers.conftest import delta, loaded
from tests.serving.triton_world import bundle_of, differs
from tests.triton_server import Launched

INT8 = 0.01
"""Largest difference of a score from int8 tables, as documented."""


@pytest.fixture(scope="module")
def made(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Compiled, over int8 tables: the one compilation here."""
    try:
        check_compiler()
    except PlexrankError as error:
        pytest.skip(str(error))
    given = {"variant": "aoti", "tables": "int8"}
    return export(Wish(tiny_bundle, given=given), tmp_path_factory.mktemp("variants") / "repository")


@pytest.fixture(scope="module")
def package(made: Exported) -> Package:
    return Package(made.folder / PACKAGE)


@pytest.fixture
def opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, verify=False)


@pytest.fixture
def compiled(tmp_path: Path, opened: Bundle, package: Package) -> Iterator[LiveModel]:
    """Over float32 tables, which the same package scores."""
    with closing(LiveModel.open(tmp_path / "live", opened, over=lambda m: CompiledModel(m, package))) as live:
        yield live


@pytest.fixture(scope="module")
def weights(tiny_bundle: Path) -> dict[str, Tensor]:
    return load_tensors(tiny_bundle / "model.safetensors")


def worst(found: list[Any], wanted: list[Any]) -> float:
    return max(differs(answer, {"liked": its["liked"]}) for answer, its in zip(found, wanted, strict=True))


# -------------------------------------------------------------------------------------------------- compiled code
def test_compiled_code_scores_any_number_of_requests_candidates_and_past_items(
    compiled: LiveModel, opened: Bundle, tiny_bundle: Path
) -> None:
    asked = of_all_sizes(opened)
    sizes = {len(tensors["candidates"]) for tensors in asked}
    past = {len(tensors.get("history", ())) for tensors in asked}
    assert {1, 2000} <= sizes
    assert {0, 1, 10} <= past
    scorer, view = loaded(tiny_bundle), compiled.now
    wanted = [scorer.infer(tensors) for tensors in asked]
    for items in (view.items, None):  # from items' vectors, and from ids
        runtime = Runtime(lambda items=items: replace(view, items=items))
        assert worst([runtime.infer(tensors) for tensors in asked], wanted) <= 1e-5
        for count in (2, 3, 30):
            groups = [asked[n : n + count] for n in range(0, len(asked), count)]
            assert worst([answer for group in groups for answer in runtime.score(group)], wanted) <= 1e-5


def test_code_that_was_compiled_once_scores_with_each_delta(
    compiled: LiveModel, tmp_path: Path, opened: Bundle, tiny_bundle: Path, weights: dict[str, Tensor]
) -> None:
    scorer, asked = loaded(tiny_bundle), of_all_sizes(opened)[::4]
    runtime = Runtime(lambda: compiled.now)
    before = [runtime.infer(tensors) for tensors in asked]
    with LiveWriter(tmp_path / "live", opened) as writer:
        for one in chain(tiny_bundle, weights, 6):
            writer.apply(one)
            scorer.apply(one)
            compiled.refresh()
            found = [runtime.infer(tensors) for tensors in asked]
            assert compiled.version == scorer.version
            assert isinstance(compiled.model, CompiledModel)
            assert worst(found, [scorer.infer(tensors) for tensors in asked]) <= 1e-5
    assert worst(found, before) > 1e-3


def test_no_score_is_of_half_a_dense_part(
    compiled: LiveModel, tmp_path: Path, opened: Bundle, tiny_bundle: Path, weights: dict[str, Tensor]
) -> None:
    """Each answer, while deltas come, is that of the version that it names."""
    deltas = [delta(tiny_bundle, n, dense=dense_of(weights, 1 + n / 10)) for n in range(1, 9)]
    asked = of_all_sizes(opened)[9]
    expected = {scorer.version: scorer.infer(asked) for scorer in [loaded(tiny_bundle)]}
    scorer = loaded(tiny_bundle)
    for one in deltas:
        scored(scorer, [one])
        expected[scorer.version] = scorer.infer(asked)
    runtime, ended, answers = Runtime(lambda: compiled.now), threading.Event(), []

    def ask() -> None:
        while not ended.is_set() or not answers:
            answers.append(runtime.infer(asked))

    thread = threading.Thread(target=ask)
    thread.start()
    with LiveWriter(tmp_path / "live", opened) as writer:
        for one in deltas:
            writer.apply(one)
            compiled.refresh()
            seen = len(answers)
            while len(answers) < seen + 3 and thread.is_alive():
                ended.wait(0.001)
    ended.set()
    thread.join()
    named = [answer[VERSION].tobytes().decode() for answer in answers]
    assert set(named) >= {one.version for one in deltas}
    assert max(differs(a, {"liked": expected[v]["liked"]}) for a, v in zip(answers, named, strict=True)) <= 1e-5
    scores = np.stack([its["liked"] for its in expected.values()])
    assert np.abs(np.diff(scores, axis=0)).max(axis=1).min() > 1e-4  # versions can be told apart


def test_an_interest_that_torch_cannot_follow_is_named_and_nothing_is_left(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = DINInterest.forward

    def peeking(self: DINInterest, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        more = float(targets.sum()) > 1e9
        return right(self, targets, history, user_of_target) + more

    monkeypatch.setattr(DINInterest, "forward", peeking)
    with pytest.raises(BundleError, match=r"interest 'din' cannot be compiled: .*data-dependent.* as eager"):
        export(Wish(tiny_bundle, given={"variant": "aoti"}), tmp_path / "repository")
    assert "def forward" not in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]
    assert [p.name for p in (tmp_path / "repository").iterdir()] == [".plexrank.lock"]


@pytest.mark.parametrize(
    ("interest", "ranker"), [("attention", "dlrm"), ("mean", "deepfm"), ("mean", "mmoe"), (None, "dcnv2")]
)
def test_other_parts_can_be_followed_too(
    interest: str | None, ranker: str, shop_folder: Path, shop: Prepared, plugins: Plugins
) -> None:
    """The graph, before it is compiled, gives the model's logits whatever the sizes are."""
    wanted = None if interest is None else {"name": interest}
    config = config_of(shop_folder, interest=wanted, ranker={"name": ranker})
    model = build_model(config, shop.statistics, plugins, frozen=True)
    program = exported(model).module()
    state = model.state_dict()
    weights = [state[name] for name in sorted(state) if name.startswith(("interest.", "ranker."))]
    widths = {f.name: model.ranker.inputs.fields[f.name] for f in model.fields}
    for users, targets, past in ((1, 1, 0), (1, 40, 1), (1, 5, 12), (4, 40, 3), (5, 5, 2), (3, 9, 0)):
        pooled = {name: torch.randn(targets, width) for name, width in widths.items()}
        dense, user_of_target = torch.randn(targets, model.ranker.inputs.dense), torch.arange(targets) % users
        given, attended = [torch.cat([*pooled.values(), dense], dim=1)], None
        if interest is not None:
            read = torch.cat([pooled[s.of] for s in model.sequences], dim=1)
            history, lengths = torch.randn(users * past, read.shape[1]), torch.full((users,), past)
            attended = read, JaggedTensor(values=history, lengths=lengths)
            given += [history, lengths, user_of_target]
        logits = model.rank(pooled, dense, attended, user_of_target)
        for found, its in zip(program(given, weights), logits.values(), strict=True):
            torch.testing.assert_close(found, its, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- what is refused
def test_without_a_compiler_the_package_to_install_is_named(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlexrankError, match="no g\\+\\+: apt-get install g\\+\\+"):
        export(Wish(tiny_bundle, given={"variant": "aoti"}), tmp_path / "repository")
    assert [p.name for p in (tmp_path / "repository").iterdir()] == [".plexrank.lock"]


def test_code_that_was_edited_or_is_of_another_machine_does_not_run(made: Exported, tmp_path: Path) -> None:
    said = Variant.read(made.folder)
    path = shutil.copy(made.folder / PACKAGE, tmp_path / PACKAGE)
    with pytest.raises(PlexrankError, match=r"made for a processor with avx999: export it on a machine like this"):
        Package.open(path, said.sha256, {**said.made_for, "flags": [*said.made_for["flags"], "avx999"]})
    with pytest.raises(PlexrankError, match=r"made for torch 1\.0, here is "):
        Package.open(path, said.sha256, {**said.made_for, "torch": "1.0"})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlexrankError, match="its sha256 is not that of the export"):
        Package.open(path, said.sha256, said.made_for)
    path.unlink()
    with pytest.raises(PlexrankError, match="No such file"):
        Package.open(path, said.sha256, said.made_for)


def test_scores_that_are_too_far_off_leave_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"as eager with int8 tables, scores differ by up to .* more than 1e-07"):
        export(Wish(tiny_bundle, given={"tables": "int8", "tolerance": 1e-7}), tmp_path / "repository")
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]
    assert [p.name for p in (tmp_path / "repository").iterdir()] == [".plexrank.lock"]


class Waves(EmbeddingMethod):
    """Has no tables."""

    name = "waves"

    def __init__(self, features: Any, options: Any, statistics: Any) -> None:
        super().__init__(features, options, statistics)
        self.scale = torch.nn.Parameter(torch.rand(features[0].dim))

    @property
    def widths(self) -> dict[str, int]:
        return {f.name: f.dim or 0 for f in self.features}

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        parts = zip(ids.values().split(ids.length_per_key()), ids.lengths().split(ids.stride_per_key()), strict=True)
        waves = [JaggedTensor(torch.sin((v % 1009).float()[:, None] * self.scale), lengths=n) for v, n in parts]
        return dict(zip(ids.keys(), waves, strict=True))

    def memory_bytes(self) -> Memory:
        return Memory(self.scale.nbytes, self.scale.nbytes)

    def touched_rows(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        return {}

    def freeze(self) -> torch.nn.Module:
        return self


@hookimpl
def embeddings() -> list[type[EmbeddingMethod]]:
    return [Waves]


def test_an_embedding_without_tables_is_not_held_as_int8(shop_folder: Path, shop: Prepared, tmp_path: Path) -> None:
    plugins = Plugins([*entry_points(group=GROUP), EntryPoint("embeddings.waves", __name__, GROUP)])
    config = config_of(shop_folder, embedding={"name": "waves", "dim": 8})
    bundle = Bundle.open(bundle_of(config, shop, plugins, tmp_path / "bundle"), verify=False)
    with pytest.raises(BundleError, match="embedding 'waves' has no tables that could be held as int8"):
        LiveModel.open(tmp_path / "live", bundle, plugins, tables="int8")
    LiveModel.open(tmp_path / "other", bundle, plugins).close()


# ----------------------------------------------------------------------------------------------------- int8 tables
@pytest.mark.parametrize("dim", [1, 6, 8, 16, 33])
def test_a_quantised_number_is_off_by_half_a_step_at_most(dim: int) -> None:
    rows = np.random.default_rng(dim).normal(size=(300, dim)).astype(np.float32)
    rows[7], rows[8, 0] = 0.25, 1000.0
    table = quantised(torch.from_numpy(rows))
    assert table.shape == (300, row_bytes(dim))
    found = read(table, torch.arange(300), dim).numpy()
    step = (rows.max(axis=1) - rows.min(axis=1)) / 255
    assert (np.abs(found - rows) <= step[:, None] * 0.501 + 1e-6 * np.abs(rows)).all()
    np.testing.assert_array_equal(found[7], rows[7])


@pytest.mark.parametrize("row", [300, -1, 2**31, -(2**40), 2**62])
def test_a_row_that_is_not_there_is_an_error_and_no_memory_is_read(row: int) -> None:
    table = quantised(torch.randn(300, 8))
    with pytest.raises(IndexError, match="a row that the table of 300 does not have"):
        read(table, torch.tensor([3, row, 4]), 8)


def test_int8_tables_take_a_byte_a_number_and_eight_a_row(tmp_path: Path, opened: Bundle) -> None:
    sizes = {}
    for kind in ("float32", "int8"):
        with closing(LiveModel.open(tmp_path / kind, opened, tables=kind)) as live:
            tables = live.model.embedding
            sizes[kind] = {name: (len(t), t.nbytes) for name, t in tables.weights.items()}
            assert isinstance(tables, QuantisedTables) is (kind == "int8")
    for name, (rows, size) in sizes["int8"].items():
        assert sizes["float32"][name] == (rows, rows * 4 * 8)
        assert size == rows * (8 + 8)  # of 64 numbers it would be a quarter and an eighth
    assert row_bytes(128) / (4 * 128) < 0.27


def test_rows_of_a_delta_are_quantised_by_the_writer(
    tmp_path: Path, opened: Bundle, tiny_bundle: Path, weights: dict[str, Tensor]
) -> None:
    scorer, asked = loaded(tiny_bundle), of_all_sizes(opened)[::3]
    with (
        LiveWriter(tmp_path / "live", opened, tables="int8") as writer,
        closing(LiveModel.open(tmp_path / "live", opened)) as live,
    ):
        runtime = Runtime(lambda: live.now)
        for one in chain(tiny_bundle, weights, 4):
            small = {n: replace(p, values=p.values * np.float32(0.1)) for n, p in one.tables.items()}
            one = replace(one, tables=small)
            writer.apply(one)
            scorer.apply(one)
            live.refresh()
            assert live.version == scorer.version
            for name, part in one.tables.items():
                held = live.model.embedding.weights[name][torch.from_numpy(part.rows)]
                assert torch.equal(held, quantised(torch.from_numpy(part.values)))
            found = [runtime.infer(tensors) for tensors in asked]
            assert worst(found, [scorer.infer(tensors) for tensors in asked]) <= INT8
        writer.begin_anew()
        live.refresh()
        assert isinstance(live.model.embedding, QuantisedTables)
        assert live.version == opened.version


# ------------------------------------------------------------------------------------------------------------ both
def test_an_instance_scores_compiled_from_int8_tables(
    made: Exported, opened: Bundle, tiny_bundle: Path, tmp_path: Path
) -> None:
    said = json.loads((made.folder / FILE).read_text())
    assert (said["variant"], said["tables"], said["tolerance"]) == ("aoti", "int8", INT8)
    scorer, asked = loaded(tiny_bundle), of_all_sizes(opened)
    with closing(Hosted(made.folder, tmp_path / "live", item_vectors_mb=64, threads=1)) as hosted:
        wanted = [scorer.infer(tensors) for tensors in asked]
        difference = worst(hosted.score(asked), wanted)
        assert 0 < difference <= INT8
        view: LiveView = hosted._live.now
        assert isinstance(view.model, CompiledModel)
        assert isinstance(view.model.embedding, QuantisedTables)


def test_another_variant_of_a_bundle_is_another_version(made: Exported, tiny_bundle: Path) -> None:
    repository = made.folder.parents[1]
    again = export(Wish(tiny_bundle), repository)
    assert (again.number, again.new) == (made.number, False)  # a model's settings hold on
    other = export(Wish(tiny_bundle, given={"variant": "eager", "tables": "float32"}), repository)
    assert (other.number, other.new) == (made.number + 1, True)
    assert not (other.folder / FILE).exists()
    shutil.rmtree(other.folder)


def test_triton_serves_compiled_code_over_int8_tables_and_takes_deltas(
    made: Exported, opened: Bundle, tiny_bundle: Path, weights: dict[str, Tensor], launched: Launched
) -> None:
    shutil.copytree(made.folder.parent, launched.repository / made.model)
    launched.ready()
    scorer, asked = loaded(tiny_bundle), of_all_sizes(opened)
    live = launched.repository.with_name(f"{launched.repository.name}-live") / made.model / str(made.number)
    with launched.client() as client, LiveWriter(live, opened, tables="int8") as writer:
        found = [client.infer(made.model, tensors) for tensors in asked]
        assert worst(found, [scorer.infer(tensors) for tensors in asked]) <= INT8
        one = delta(tiny_bundle, 1, dense=dense_of(weights, 1.2))
        writer.apply(one)
        scorer.apply(one)

        def answer() -> Any:
            its = client.infer(made.model, asked[9])
            return its if its[VERSION].tobytes().decode() == scorer.version else None

        assert differs(launched.wait(answer), {"liked": scorer.infer(asked[9])["liked"]}) <= INT8
    assert scorer.version != read_manifest(tiny_bundle).version
