"""Exported models on a real Triton: scores of the in-process scorer, and versions that come and go under load."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import read_manifest
from engine.data.prepare import Prepared
from engine.errors import BundleError
from engine.inference.signature import CANDIDATES
from engine.plugins import Plugins
from serving.triton.client import TritonClient, TritonError
from serving.triton.deploy import deploy
from serving.triton.export import Wish, export
from serving.triton.layout import version_numbers
from tests.inference.rich_world import FEATURES, config_of, prepared_shop, random_request
from tests.serving.triton_world import Asked, Load, another, answered, asked, bundle_of, differs, scorer_of
from tests.triton_server import Launched

SIZES = (0, 1, 1, 2, 9, 9, 40, 40, 90, 150, 500, 2000)
NARROW = [feature for feature in FEATURES if feature["name"] != "weight"]
BATCHED = {"max_batch": 8, "batch_delay_us": 500}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def shop(folder: Path, plugins: Plugins) -> Prepared:
    (folder / "shop").mkdir()
    return prepared_shop(folder / "shop", plugins)


@pytest.fixture(scope="module")
def bundle(folder: Path, shop: Prepared, plugins: Plugins) -> Path:
    """Without a feature that later ones have."""
    return bundle_of(config_of(folder / "shop", NARROW), shop, plugins, folder / "first")


@pytest.fixture(scope="module")
def others(folder: Path, bundle: Path, shop: Prepared, plugins: Plugins) -> list[Path]:
    """Other weights; a feature more; other weights again."""
    wider = bundle_of(config_of(folder / "shop"), shop, plugins, folder / "wider")
    return [another(bundle, folder / "second", 1), wider, another(wider, folder / "third", 2)]


@pytest.fixture(scope="module")
def server(triton_wheel: Any, folder: Path, bundle: Path) -> Iterator[Launched]:
    """With the first bundle."""
    export(Wish(bundle, given=BATCHED), folder / "repository")
    launched = Launched(folder / "repository", folder / "state")
    launched.ready()
    yield launched
    launched.close()


@pytest.fixture(scope="module")
def client(server: Launched) -> Iterator[TritonClient]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def questions(bundle: Path, others: list[Path]) -> list[Asked]:
    """With the answers of all bundles."""
    rng = np.random.default_rng(5)
    scorers = [scorer_of(path) for path in (bundle, *others)]
    return asked(bundle, [random_request(rng, (0, 1, 7, 40)) for _ in range(40)], scorers)


def test_a_thousand_requests_of_eight_threads_score_as_in_process(client: TritonClient, bundle: Path) -> None:
    rng = np.random.default_rng(6)
    requests = asked(bundle, [random_request(rng, SIZES) for _ in range(1000)], [scorer_of(bundle)])
    version = read_manifest(bundle).version
    assert {len(tensors[CANDIDATES]) for tensors, _ in requests} == set(SIZES)

    def worst(question: Asked) -> float:
        tensors, expected = question
        answer = client.infer("shop", tensors, timeout=60.0)
        assert answered(answer) == version
        return differs(answer, expected[version])

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(worst, requests))
    assert max(found) <= 1e-5
    assert max(_batches(client)) > 1, "no two requests were scored together"


def _batches(client: TritonClient) -> list[int]:
    """Sizes of the batches that the model scored."""
    (stats,) = client._client.get_inference_statistics("shop").model_stats
    return [batch.batch_size for batch in stats.batch_stats]


def test_a_request_that_does_not_fit_fails_alone_and_says_why(client: TritonClient, questions: list[Asked]) -> None:
    good, expected = questions[1]
    bad = {CANDIDATES: good[CANDIDATES], "price": np.zeros(len(good[CANDIDATES]) + 1, np.float32)}

    def ask(number: int) -> str:
        if number % 2:
            with pytest.raises(TritonError) as refused:
                client.infer("shop", bad, timeout=30.0)
            return f"{refused.value.code} {refused.value}"
        answer = client.infer("shop", good, timeout=30.0)
        return str(differs(answer, expected[answered(answer)]) <= 1e-5)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(40)))
    assert set(found[::2]) == {"True"}
    assert all(text.startswith("INVALID_ARGUMENT") and "tensor 'price'" in text for text in found[1::2])


def test_three_versions_come_and_one_goes_back_without_a_lost_request(
    server: Launched, client: TritonClient, bundle: Path, others: list[Path], questions: list[Asked]
) -> None:
    def check(number: int, answer: Any) -> str:
        by = differs(answer, questions[number][1][answered(answer)])
        return "" if by <= 1e-5 else f"request {number} by {answered(answer)} differs by {by}"

    model = server.repository / "shop"
    with Load(client.url, "shop", [tensors for tensors, _ in questions], check) as load:
        for at, path in enumerate((others[0], others[1], bundle), start=2):
            done = deploy(Wish(path), server.repository, client)
            version = read_manifest(path).version
            assert (done.exported.number, done.exported.new) == (at, True)
            load.wait_for(version.__eq__)
            assert answered(client.infer("shop", questions[0][0])) == version
            assert version_numbers(model) == [at - 1, at]
            assert version_numbers(server.repository.with_name("repository-live") / "shop") == [at - 1, at]
            older = answered(client.infer("shop", questions[0][0], str(at - 1)))
            assert older != version, "the version before goes on answering those that name it"
        assert done.removed == (2,)
    assert load.wrong == []
    assert len(load.versions) == 3


def test_what_is_there_already_is_not_loaded_again(server: Launched, client: TritonClient, bundle: Path) -> None:
    before = {stub.process.pid for stub in server.stubs()}
    done = deploy(Wish(bundle), server.repository, client)
    assert (done.exported.new, done.exported.changed, done.removed) == (False, False, ())
    client.load("shop")
    assert {stub.process.pid for stub in server.stubs()} == before


def test_a_bundle_that_is_not_fit_is_refused_and_the_old_one_serves(
    server: Launched, client: TritonClient, others: list[Path], questions: list[Asked], folder: Path
) -> None:
    numbers, config = version_numbers(server.repository / "shop"), server.repository / "shop" / "config.pbtxt"
    text, serves = config.read_text(), answered(client.infer("shop", questions[0][0]))
    broken = another(others[0], folder / "broken", 9)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(BundleError, match="sha256"):
        deploy(Wish(broken), server.repository, client)
    # What only the instance can find out: there is no place for its live memory.
    taken = server.repository.with_name("repository-live") / "shop" / f"{numbers[-1] + 1}"
    taken.write_text("not a folder")
    with pytest.raises(BundleError, match=f"what served goes on.*{taken}"):
        deploy(Wish(others[2], given={"batch_delay_us": 700}), server.repository, client)
    assert version_numbers(server.repository / "shop") == numbers
    assert config.read_text() == text
    assert answered(client.infer("shop", questions[0][0])) == serves
