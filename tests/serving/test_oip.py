"""The Open Inference Protocol: its official client asks the server; broken requests get its errors."""

from __future__ import annotations

import json
import re
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient import http as triton

from engine.config import LimitsConfig
from engine.errors import RequestError
from engine.hashing import fingerprints
from serving import oip
from serving.routes.oip import as_tensors
from tests.serving.conftest import Running

ITEMS = ["3", "1", "2", "neu-é", "7"]


def tensor(name: str, values: Any, datatype: str, *, binary: bool) -> triton.InferInput:
    array = np.array([values], dtype=object if datatype == "BYTES" else None)
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


@pytest.fixture
def client(server: Running) -> Any:
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def ranked(server: Running, **more: Any) -> dict[str, float]:
    answer = server.client.post("/v1/rank", json={"items": ITEMS, **more}).json()
    return {item["id"]: item["score"] for item in answer["items"]}


def model_of(server: Running) -> str:
    return server.service.pipeline.served.bundle.name


def task_of(server: Running) -> str:
    return server.service.pipeline.served.schema.tasks[0]


def test_the_official_client_finds_server_and_model(server: Running, client: Any) -> None:
    name = model_of(server)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    found = client.get_server_metadata()
    assert (found["name"], found["extensions"]) == ("plexrank", ["binary_tensor_data"])
    metadata = client.get_model_metadata(name)
    assert metadata["versions"] == [server.service.pipeline.served.bundle.version]
    assert {"name": "candidates", "datatype": "INT64", "shape": [-1, -1]} in metadata["inputs"]
    assert {"name": task_of(server), "datatype": "FP32", "shape": [-1, -1]} in metadata["outputs"]
    assert client.is_model_ready(name, metadata["versions"][0])


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_the_official_client_gets_the_scores_of_rank(
    server: Running, client: Any, binary_in: bool, binary_out: bool
) -> None:
    task = task_of(server)
    inputs = [tensor("candidates", fingerprints(ITEMS), "INT64", binary=binary_in)]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in (task, "version")]
    answer = client.infer(model_of(server), inputs, outputs=outputs, request_id="r1", timeout=5_000_000)
    scores = dict(zip(ITEMS, answer.as_numpy(task)[0].tolist(), strict=True))
    assert scores == pytest.approx(ranked(server), abs=1e-6)
    assert answer.as_numpy("version").tobytes().decode() == server.service.scorer.version
    assert answer.get_response()["id"] == "r1"
    assert answer.get_response()["model_version"] == server.service.scorer.version


@pytest.mark.parametrize("binary", [True, False])
def test_ids_may_come_as_texts(server: Running, client: Any, binary: bool) -> None:
    schema = server.service.pipeline.served.schema
    history = ["2", "5"]
    inputs = [tensor("candidates", ITEMS, "BYTES", binary=binary)]
    inputs += [tensor(s.name, history, "BYTES", binary=binary) for s in schema.sequences if s.of == schema.item]
    answer = client.infer(model_of(server), inputs)
    scores = dict(zip(ITEMS, answer.as_numpy(task_of(server))[0].tolist(), strict=True))
    assert scores == pytest.approx(ranked(server, history=history), abs=1e-6)


def test_no_candidates_give_no_scores(server: Running) -> None:
    body = {"inputs": [{"name": "candidates", "shape": [1, 0], "datatype": "INT64", "data": []}]}
    answer = server.client.post(f"/v2/models/{model_of(server)}/infer", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["shape"] == [1, 0]


def post(server: Running, inputs: Any, **more: Any) -> Any:
    return server.client.post(f"/v2/models/{model_of(server)}/infer", json={"inputs": inputs, **more})


def candidates(**changed: Any) -> dict[str, Any]:
    return {"name": "candidates", "shape": [1, 2], "datatype": "INT64", "data": [1, 2], **changed}


BROKEN = {
    "no candidates": ([], "candidates"),
    "twice": ([candidates(), candidates()], "twice"),
    "unknown": ([candidates(), candidates(name="nothing")], "nothing"),
    "datatype": ([candidates(datatype="FP16")], "FP16"),
    "shape": ([candidates(shape=[2, 1])], r"\[2, 1\]"),
    "count": ([candidates(data=[1])], "1 values"),
    "nested": ([candidates(data=[[1], [2]])], "integer"),
    "float": ([candidates(data=[1, 2.5])], "integer"),
    "true": ([candidates(data=[1, True])], "integer"),
    "too large": ([candidates(data=[1, 1 << 70])], "too large"),
    "no data": ([candidates(data=None)], "neither"),
    "beyond": ([candidates(data=None, parameters={"binary_data_size": 16})], "not in the body"),
    "texts": ([candidates(datatype="BYTES", data=[1, 2])], "strings"),
    "control": ([candidates(datatype="BYTES", data=["a", "\x00"])], "candidates|id"),
    "wrong type": ([candidates(datatype="FP32", data=[1, 2])], "candidates"),
    "too many": ([candidates(shape=[1, 2001], data=[1] * 2001)], "2001|2,001"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(server: Running, case: str) -> None:
    inputs, wanted = BROKEN[case]
    answer = post(server, inputs)
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}
    assert re.search(wanted, answer.json()["error"]), answer.text


def test_an_output_that_is_not_there_is_named(server: Running) -> None:
    answer = post(server, [candidates()], outputs=[{"name": "nothing"}])
    assert answer.status_code == 400
    assert "nothing" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v2/models/none", "/v2/models/none/ready", "/v2/models/{model}/versions/none"])
def test_what_is_not_there_is_404(server: Running, path: str) -> None:
    answer = server.client.get(path.format(model=model_of(server)))
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_a_deadline_that_passed_is_504(server: Running) -> None:
    answer = post(server, [candidates()], parameters={"timeout": 1})
    assert answer.status_code in (503, 504)
    assert "error" in answer.json()


def test_trailing_bytes_and_bad_lengths_are_refused() -> None:
    text = json.dumps({"inputs": [candidates(data=None, parameters={"binary_data_size": 16})]}).encode()
    good = text + struct.pack("<qq", 1, 2)
    assert oip.read(good, str(len(text))).tensors["candidates"].tolist() == [1, 2]  # type: ignore[union-attr]
    for body, length in ((good + b"x", len(text)), (good, len(good) + 1), (good[:-1], len(text))):
        with pytest.raises(RequestError):
            oip.read(body, str(length))


def test_a_length_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(RequestError, match="no number of bytes"):
        oip.read(b'{"inputs": []}', "9" * 5000)


def test_texts_beyond_what_any_request_may_have_are_not_read() -> None:
    count = oip.MOST_TEXTS + 1
    text = json.dumps({"inputs": [candidates(shape=[1, count], datatype="BYTES", data=["a"] * count)]}).encode()
    with pytest.raises(RequestError, match="texts"):
        oip.read(text, None)
    tensor = candidates(shape=[1, count], datatype="BYTES", data=None, parameters={"binary_data_size": 4 * count})
    text = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(RequestError, match="texts"):
        oip.read(text + bytes(4 * count), str(len(text)))


def test_a_request_has_no_more_candidates_than_the_server_allows(server: Running) -> None:
    served, signature = server.service.pipeline.served, server.service.scorer.signature
    limits = LimitsConfig(items=5)
    for values in (np.arange(6), ["a", "b", "c", "d", "e", "f"]):
        with pytest.raises(RequestError, match=r"6 .* more than 5"):
            as_tensors({"candidates": values}, signature, served.bundle.encoder, limits)
    assert len(as_tensors({"candidates": np.arange(5)}, signature, served.bundle.encoder, limits)["candidates"]) == 5


def test_a_number_reads_as_everywhere_else(server: Running) -> None:
    """Rounded to float32 first, and what no float32 holds is missing."""
    served, signature = server.service.pipeline.served, server.service.scorer.signature
    values = [1995.0, 1e300, 1e30, -1.0, float("nan")]
    found = as_tensors({"year": np.array(values)}, signature, served.bundle.encoder, LimitsConfig())
    np.testing.assert_array_equal(found["year"], served.bundle.encoder.encode_values("year", values).values)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.one_of(st.none(), st.text(max_size=4), st.integers(0, 400).map(str)))
def test_no_bytes_meet_another_error(body: bytes, length: str | None) -> None:
    with suppress(RequestError):
        oip.read(body, length)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=8),
        st.one_of(
            st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=5).map(lambda v: np.array(v, np.int64)),
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5).map(
                lambda v: np.array(v, np.float32)
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_what_is_written_is_read(outputs: dict[str, np.ndarray], binary: bool) -> None:
    asked = oip.Infer("7", None, {}, None, binary_by_default=binary)
    body, length = oip.write(asked, outputs, "m", "v")
    described = json.loads(body[:length])["outputs"]
    request = json.dumps({"inputs": described}).encode()
    found = oip.read(
        request + (b"" if length is None else body[length:]), None if length is None else str(len(request))
    )
    assert set(found.tensors) == set(outputs)
    for name, values in outputs.items():
        np.testing.assert_array_equal(found.tensors[name], values)
