"""A bundle as a Triton model: what is written, what is refused, and what an instance makes of it, without a Triton."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle, read_manifest
from engine.bundle.tensors import load_tensors
from engine.components import Scorer
from engine.config_triton import TritonConfig
from engine.data.prepare import Prepared
from engine.errors import BundleError, ConfigError, DeltaGap, PlexrankError, SchemaError
from engine.hookspecs import hookimpl
from engine.inference import live_writer
from engine.inference.live_writer import LiveWriter
from engine.inference.runtime import Runtime
from engine.plugins import GROUP, Plugins
from engine.streaming.deltas.apply import write_rows
from engine.streaming.deltas.delta import TableRows
from plugins.scorers.inproc import InprocScorer
from serving.triton.client import TritonClient
from serving.triton.config_pbtxt import ModelConfig
from serving.triton.export import Wish, export
from serving.triton.hosted import Hosted
from serving.triton.layout import LIVE, live_root
from serving.triton.selftest import SelfTest
from serving.triton.target import TritonTarget
from tests.inference.rich_world import config_of, prepared_shop, random_request
from tests.scorers.conftest import delta
from tests.serving.triton_world import another, asked, bundle_of, differs, scorer_of

pytest.importorskip("tritonclient.grpc", reason="no client of Triton: pip install 'plexrank[triton]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shop")


@pytest.fixture(scope="module")
def shop(folder: Path, plugins: Plugins) -> Prepared:
    return prepared_shop(folder, plugins)


@pytest.fixture(scope="module")
def bundle(folder: Path, shop: Prepared, plugins: Plugins) -> Path:
    return bundle_of(config_of(folder), shop, plugins, folder / "bundle")


def everything(folder: Path) -> list[str]:
    """Also what is hidden."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_configuration_is_whole_and_says_what_the_model_reads(bundle: Path, tmp_path: Path) -> None:
    settings = {"instances": 3, "batch_delay_us": 250, "max_batch": 4, "threads": 2, "live": "../elsewhere"}
    found = export(Wish(bundle, given=settings), tmp_path / "repository")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    parsed = text_format.Parse((found.folder.parent / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("shop", "python", 4)
    kinds = {i.name: pb.DataType.Name(i.data_type) for i in parsed.input}
    assert [i.name for i in parsed.input if not i.optional] == ["candidates"]
    assert all(i.allow_ragged_batch and list(i.dims) == [-1] for i in parsed.input)
    assert {n for n, kind in kinds.items() if kind == "TYPE_FP32"} == {"age", "load", "price", "weight"}
    assert {n for n, kind in kinds.items() if kind == "TYPE_INT32"} == {"tags.lengths"}
    assert {kinds[n] for n in ("candidates", "user_id", "likes", "hour", "brand", "tags", "history", "brands")} == {
        "TYPE_INT64"
    }
    assert [o.name for o in parsed.output] == ["click", "buy", "version"]
    assert parsed.version_policy.latest.num_versions == 2
    assert parsed.dynamic_batching.max_queue_delay_microseconds == 250
    assert [(g.count, g.kind) for g in parsed.instance_group] == [(3, 2)]  # KIND_CPU
    assert {k: v.string_value for k, v in parsed.parameters.items()} == {
        "live": "../elsewhere",
        "threads": "2",
        "item_vectors_mb": "256",
        "variant": "eager",
        "tables": "float32",
        "tolerance": "0.0",
    }
    assert ModelConfig.read(found.folder.parent / "config.pbtxt").settings == TritonConfig(**settings)


def test_nothing_in_the_repository_is_tied_to_this_machine(bundle: Path, tmp_path: Path) -> None:
    found = export(Wish(bundle), tmp_path / "repository")
    ours = [p for p in found.folder.parent.rglob("*") if p.is_file() and "bundle" not in p.parts[len(tmp_path.parts) :]]
    assert len(ours) == 4  # config.pbtxt, model.py, the self-test, and a file in the place of a cache
    for path in ours:
        assert str(tmp_path).encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o444 == 0o444
        assert not path.is_symlink()
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


def test_the_live_folder_lies_beside_the_repository_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LIVE, raising=False)
    repository = tmp_path / "models"
    assert live_root(repository) == tmp_path / "models-live"
    assert live_root(repository, "../there") == tmp_path / "there"
    assert live_root(repository, "/dev/shm/live") == Path("/dev/shm/live")
    monkeypatch.setenv(LIVE, "/data/live")
    assert live_root(repository, "../there") == Path("/data/live")


def test_the_same_bundle_again_changes_nothing_but_what_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = export(Wish(bundle, given={"instances": 2}), repository)
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*") if path.is_file()}
    again = export(Wish(bundle), repository)
    assert (again.new, again.changed, again.number) == (False, False, first.number)
    lock = repository / ".plexrank.lock"
    assert {p: m for p, m in before.items() if p != lock} == {
        p: p.stat().st_mtime_ns for p in repository.rglob("*") if p.is_file() and p != lock
    }, "settings of the first export stay"
    other = export(Wish(bundle, given={"instances": 1}), repository)
    assert (other.new, other.changed) == (False, True)
    assert ModelConfig.read(repository / "shop" / "config.pbtxt").settings.instances == 1


def test_another_bundle_becomes_the_next_version_and_an_older_one_the_one_after(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    second = another(bundle, tmp_path / "second", 1)
    assert export(Wish(bundle), repository).number == 1
    assert export(Wish(second), repository).number == 2
    back = export(Wish(bundle), repository)
    assert (back.number, back.new, back.others) == (3, True, (1,))
    (repository.with_name("repository-live") / "shop" / "7").mkdir(parents=True)
    assert export(Wish(second), repository).number == 8, "the memory of a version that was removed is not met again"


def test_options_go_before_a_configuration_that_goes_before_what_was_exported(bundle: Path) -> None:
    before, own = TritonConfig(threads=3), TritonConfig(threads=4)
    assert Wish(bundle).settings(None, own).threads == 4
    assert Wish(bundle).settings(before, own).threads == 3
    stated = TritonConfig(threads=2, instances=2)
    assert Wish(bundle, stated=stated).settings(before, own).threads == 2
    mixed = Wish(bundle, stated=stated, given={"threads": 1}).settings(before, own)
    assert (mixed.threads, mixed.instances) == (1, 2)
    with pytest.raises(ConfigError, match=r"serving\.triton\.max_batch: 0"):
        Wish(bundle, given={"max_batch": 0}).settings(None, own)


def test_a_feature_that_has_another_tensors_name_is_refused(
    folder: Path, shop: Prepared, plugins: Plugins, tmp_path: Path
) -> None:
    name = "candidates"
    features = [{"name": "user_id", "side": "user"}, {"name": "item_id"}, {"name": name, "column": "brand"}]
    config = config_of(folder, features, interest=None)
    prepared = prepared_for(folder, config, plugins)
    with pytest.raises(SchemaError, match=f"feature '{name}' has the name of another tensor"):
        export(Wish(bundle_of(config, prepared, plugins, tmp_path / "bundle")), tmp_path / "repository")
    assert everything(tmp_path / "repository") == [".plexrank.lock"]


def prepared_for(folder: Path, config: Any, plugins: Plugins) -> Prepared:
    from engine.data.prepare import prepare

    return prepare(config, plugins, cache=folder / "cache")


@pytest.mark.parametrize("name", ["Shop", "a/b", "..", "", "x" * 65, 'a"b'])
def test_a_models_name_that_is_none_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    if not name:
        assert export(Wish(bundle, name), tmp_path / "repository").model == "shop"
        return
    with pytest.raises(ConfigError, match="no model's name"):
        export(Wish(bundle, name), tmp_path / "repository")


def test_a_damaged_bundle_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match="sha256"):
        export(Wish(broken), tmp_path / "repository")
    assert everything(tmp_path / "repository") == [".plexrank.lock"]


def test_two_at_once_get_numbers_of_their_own_and_what_a_kill_left_goes(bundle: Path, tmp_path: Path) -> None:
    second, repository = another(bundle, tmp_path / "second", 1), tmp_path / "repository"
    (tmp_path / ".repository.tmp-0123456789ab" / "1").mkdir(parents=True)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda path: export(Wish(path), repository), [bundle, second]))
    assert sorted(one.number for one in found) == [1, 2]
    for one in found:
        assert SelfTest.open(one.folder).version == one.version
    assert sorted(p.name for p in tmp_path.iterdir()) == ["repository", "second"]


class Slanted(InprocScorer):
    """Scores tensors a little otherwise than it scores requests."""

    def infer(self, tensors: Any, deadline: float | None = None) -> Any:
        return {n: t + np.float32(2e-5) if n == "buy" else t for n, t in super().infer(tensors, deadline).items()}


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [Slanted]


def test_scores_by_tensors_that_are_not_the_scorers_leave_nothing(bundle: Path, tmp_path: Path) -> None:
    points = [p for p in entry_points(group=GROUP) if p.name != "scorers.inproc"]
    slanted = Plugins([*points, EntryPoint("scorers.inproc", __name__, GROUP)])
    with pytest.raises(
        BundleError, match=r"scores by tensors are not the scorer's: .*task 'buy' differ by up to 2e-05"
    ):
        export(Wish(bundle), tmp_path / "repository", slanted)
    assert everything(tmp_path / "repository") == [".plexrank.lock"]
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


def test_a_configuration_by_hand_is_not_written_over(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "repository" / "shop").mkdir(parents=True)
    config = tmp_path / "repository" / "shop" / "config.pbtxt"
    config.write_text('name: "shop"\nbackend: "onnxruntime"\n')
    with pytest.raises(PlexrankError, match="not written by `plexrank export triton`"):
        export(Wish(bundle), tmp_path / "repository")
    assert config.read_text() == 'name: "shop"\nbackend: "onnxruntime"\n'


def test_inputs_of_two_types_need_two_models(bundle: Path, folder: Path, plugins: Plugins, tmp_path: Path) -> None:
    export(Wish(bundle), tmp_path / "repository")
    features = [{"name": "user_id", "side": "user"}, {"name": "item_id"}, {"name": "price"}]
    config = config_of(folder, features, interest=None)
    other = bundle_of(config, prepared_for(folder, config, plugins), plugins, tmp_path / "other")
    with pytest.raises(BundleError, match=r"input 'price' is INT64 .* and FP32 .* another --name"):
        export(Wish(other), tmp_path / "repository")
    assert export(Wish(other, name="shop-ids"), tmp_path / "repository").model == "shop-ids"


@pytest.mark.parametrize("embedding", ["full", "hashing", "unified"])
def test_an_instance_scores_as_in_process_with_each_embedding(
    folder: Path, shop: Prepared, plugins: Plugins, tmp_path: Path, embedding: str
) -> None:
    options = {"rows": 60} if embedding == "unified" else {}
    config = config_of(folder, embedding={"name": embedding, "dim": 8, "options": options})
    bundle = bundle_of(config, shop, plugins, tmp_path / "bundle")
    found = export(Wish(bundle), tmp_path / "repository")
    hosted = Hosted(found.folder, tmp_path / "live", item_vectors_mb=64, threads=1)
    try:
        rng = np.random.default_rng(3)
        requests = asked(bundle, [random_request(rng, (0, 1, 7, 40)) for _ in range(24)], [scorer_of(bundle)])
        for at in range(0, 24, 8):
            some = requests[at : at + 8]
            answers = hosted.score([tensors for tensors, _ in some])
            for answer, (_, expected) in zip(answers, some, strict=True):
                assert not isinstance(answer, PlexrankError)
                assert differs(answer, expected[found.version]) <= 1e-5
    finally:
        hosted.close()


def test_an_instance_refuses_a_version_that_scores_otherwise(bundle: Path, tmp_path: Path) -> None:
    found = export(Wish(bundle), tmp_path / "repository")
    test = SelfTest.open(found.folder)
    expected = {**test.expected, "click": test.expected["click"] + np.float32(3e-5)}
    SelfTest(test.inputs, expected, test.version, test.more).write(found.folder)
    with pytest.raises(BundleError, match="task 'click' differ by up to 3e-05"):
        Hosted(found.folder, tmp_path / "live", item_vectors_mb=64, threads=1)


def test_an_instance_begins_while_a_first_delta_comes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are in the shared memory before the version says so: an instance that is asked meanwhile scores by both,
    and that is no fault of its."""
    found, live = export(Wish(bundle), tmp_path / "repository"), tmp_path / "live"
    state = load_tensors(bundle / "model.safetensors")
    tables = {
        name.removeprefix("embedding.weights."): TableRows(np.arange(len(table)), 3 * table.numpy())
        for name, table in state.items()
        if name.startswith("embedding.weights.")
    }
    written, asked_once, infer = threading.Event(), threading.Event(), Runtime.infer

    def slowly(*arguments: Any, **named: Any) -> None:
        write_rows(*arguments, **named)
        written.set()
        asked_once.wait(20)

    def asking(runtime: Runtime, tensors: Any) -> dict[str, np.ndarray]:
        assert written.wait(20)
        answer = infer(runtime, tensors)
        asked_once.set()
        return answer

    monkeypatch.setattr(live_writer, "write_rows", slowly)
    monkeypatch.setattr(Runtime, "infer", asking)
    with LiveWriter(live, Bundle.open(bundle), item_vectors_mb=64) as writer:
        writing = threading.Thread(target=writer.apply, args=(delta(bundle, tables=tables),))
        hosted: list[Hosted] = []
        starting = threading.Thread(
            target=lambda: hosted.append(Hosted(found.folder, live, item_vectors_mb=64, threads=1))
        )
        starting.start()
        writing.start()
        starting.join(60)
        writing.join(60)
        assert hosted, "it did not start"
        hosted[0].close()


def test_a_bundle_that_was_deployed_once_more_gets_the_deltas(bundle: Path, plugins: Plugins, tmp_path: Path) -> None:
    """By hand, with other settings, while a process follows a learner: it is the newest version that answers."""
    repository = tmp_path / "repository"
    export(Wish(bundle), repository)
    steps = [delta(bundle, n) for n in (1, 2, 3)]
    with TritonClient("127.0.0.1:1") as client, closing(TritonTarget(repository, "shop", client, plugins)) as target:
        target.apply(steps[0])
        target.apply(steps[1])
        assert (target.number, target.version) == (1, steps[1].version)
        assert export(Wish(bundle, given={"tolerance": 0.001}), repository).number == 2
        with pytest.raises(DeltaGap):
            target.apply(steps[2])
        for step in steps:
            target.apply(step)
        assert (target.number, target.version) == (2, steps[2].version)


def test_scores_that_stay_others_are_wrong() -> None:
    answer = {"version": np.frombuffer(b"a", np.uint8), "click": np.array([0.5], np.float32)}
    test = SelfTest({"candidates": np.array([1])}, {"click": np.array([0.6], np.float32)}, "a")
    answers = [answer, answer, answer | {"click": np.array([0.6], np.float32)}]
    assert test.run(lambda _: answers.pop(0)) == "a"
    with pytest.raises(BundleError, match=r"task 'click' differ by up to 0\.1 from"):
        test.run(lambda _: answer)


def test_the_self_test_asks_for_all_that_may_come(bundle: Path, tmp_path: Path) -> None:
    test = SelfTest.open(export(Wish(bundle), tmp_path / "repository").folder)
    sizes = [len(case.inputs["candidates"]) for case in test.cases]
    assert len(test.cases) == 8
    assert (sizes[0], min(sizes), max(sizes)) == (8, 0, 200)
    assert set().union(*(case.inputs for case in test.cases)) == {
        spec.name for spec in scorer_of(bundle).signature.inputs
    }
    assert {frozenset(case.inputs) for case in test.cases} >= {frozenset(["candidates"])}
    known = set(Bundle.open(bundle).catalogue.prints.tolist())
    assert any(not set(case.inputs["candidates"].tolist()) <= known for case in test.cases)
    assert test.version == read_manifest(bundle).version


def test_the_command_says_where_the_version_is(bundle: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "engine", "export", "triton", str(bundle), str(tmp_path / "repository")]
    first = subprocess.run([*line, "--versions", "3"], capture_output=True, text=True, check=True)
    version = read_manifest(bundle).version
    assert first.stdout == f"shop {version}: is version 1 ({tmp_path / 'repository' / 'shop' / '1'})\n"
    wrong = subprocess.run([*line, "--instances", "0"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
