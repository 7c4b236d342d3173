"""The official clients ask a gateway and the Triton behind it: the same tensors, the same answers, two versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.config import ComponentConfig
from engine.hashing import fingerprints
from serving.app import create_app
from tests.scorers.conftest import rewritten
from tests.triton_server import Launched

ITEMS = ["3", "1", "東京", "7"]
HISTORY = ["4", "9"]


def scored(kind: Any, client: Any, model: str, version: str = "", **more: Any) -> tuple[list[float], str]:
    """What either of tritonclient's modules gets -> scores of ITEMS, the version that made them."""
    inputs = []
    for name, ids in (("candidates", ITEMS), ("history", HISTORY)):
        tensor = kind.InferInput(name, [1, len(ids)], "INT64")
        tensor.set_data_from_numpy(fingerprints(ids)[None])
        inputs.append(tensor)
    answer = client.infer(model, inputs, model_version=version, **more)
    return answer.as_numpy("liked")[0].tolist(), answer.as_numpy("version").tobytes().decode()


def test_official_clients_are_answered_alike(
    launched: Launched, tiny_bundle: Path, models: Path, tmp_path: Path, listen: Callable[..., Any]
) -> None:
    import tritonclient.grpc
    import tritonclient.http

    from serving.triton.deploy import deploy
    from serving.triton.export import Wish, export

    export(Wish(tiny_bundle), launched.repository)
    there = launched.ready()
    scorer = ComponentConfig(name="triton", options={"url": there["url"], "fallback": "none"})
    config = Bundle.open(models / "tiny").config.serving.model_copy(update={"scorer": scorer})
    server, stop = listen(create_app(models / "tiny", config, tmp_path / "gateway"))
    try:
        wanted = server.client.post("/v1/rank", json={"items": ITEMS, "history": HISTORY}).json()
        assert wanted["degraded"] == []
        by_item = {item["id"]: item["score"] for item in wanted["items"]}
        version = wanted["model"]["version"]

        http, grpc = tritonclient.http, tritonclient.grpc
        clients = [
            (http, http.InferenceServerClient(f"127.0.0.1:{server.port}")),
            (http, http.InferenceServerClient(f"127.0.0.1:{there['ports']['http']}")),
            (grpc, grpc.InferenceServerClient(there["url"])),
        ]
        for kind, client in clients:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("tiny")
            scores, made_by = scored(kind, client, "tiny")
            assert scores == pytest.approx([by_item[item] for item in ITEMS], abs=1e-6)
            assert made_by == version
        described = [client.get_model_metadata("tiny") for kind, client in clients if kind is http]
        for part in ("inputs", "outputs"):
            gateway, triton = ({t["name"]: t for t in metadata[part]} for metadata in described)
            assert gateway == triton

        # Two versions side by side: who names one gets that one.
        other = rewritten(tiny_bundle, tmp_path / "other", {})
        with launched.client() as control:
            deploy(Wish(other), launched.repository, control)
        kind, client = clients[-1]
        first, second = (scored(kind, client, "tiny", number) for number in ("1", "2"))
        assert (first[1], second[1]) == (version, Bundle.open(other, verify=False).version)
        np.testing.assert_allclose(first[0], [by_item[item] for item in ITEMS], atol=1e-6)
    finally:
        stop()
