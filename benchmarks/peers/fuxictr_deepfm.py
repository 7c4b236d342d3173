"""DeepFM put together from FuxiCTR's layers, trained by its own step: dense Adam over all rows."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Clock, Slices, answer, options
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class DeepFM(BaseModel):  # type: ignore[misc]
    """Its wheel carries the layers of DeepFM but not the model: this is the one of its documentation."""

    def __init__(self, schema: FeatureMap, hidden: list[int], dim: int, **more: Any) -> None:
        super().__init__(schema, model_id="DeepFM", gpu=-1, **more)
        self.embedding_layer = FeatureEmbedding(schema, dim)
        self.fm = FactorizationMachine(schema)
        self.mlp = MLP_Block(
            input_dim=schema.sum_emb_out_dim(), output_dim=1, hidden_units=hidden, hidden_activations="ReLU"
        )
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        columns = self.get_inputs(inputs)
        vectors = self.embedding_layer(columns)
        logit = self.fm(columns, vectors) + self.mlp(vectors.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logit)}


def main() -> None:
    asked = options()
    with np.load(asked["path"]) as stored:
        ids, dense, label = (torch.from_numpy(stored[n][: asked["rows"]]) for n in ("ids", "dense", "label"))
    schema = FeatureMap("exported", ".")
    schema.features = OrderedDict(
        (f"t{i}", {"source": "", "type": "categorical", "vocab_size": size}) for i, size in enumerate(asked["sizes"])
    )
    schema.features |= {f"d{i}": {"source": "", "type": "numeric"} for i in range(dense.shape[1])}
    schema.labels, schema.default_emb_dim, schema.num_fields = ["label"], asked["dim"], len(schema.features)
    columns = {f"t{i}": c for i, c in enumerate(ids.T)} | {f"d{i}": c for i, c in enumerate(dense.T)}
    with tempfile.TemporaryDirectory() as scratch:
        model = DeepFM(
            schema, asked["hidden"], asked["dim"], task="binary_classification", metrics=["AUC"], verbose=0,
            model_root=str(Path(scratch)),
        )  # fmt: skip
    model._max_gradient_norm = 10.0
    model.train()
    batches = list(Slices(columns | {"label": label}, asked["batch_size"], shuffle=True))
    model.train_step(batches[0])  # Adam makes its moments in the first step
    clock = Clock()
    with clock:
        for batch in batches:
            model.train_step(batch).item()
    answer("fuxictr", len(label), clock, optimizer="dense Adam over all rows", model="DeepFM")


if __name__ == "__main__":
    main()
