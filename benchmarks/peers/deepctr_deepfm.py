"""DeepFM of DeepCTR-Torch over large tables: its own model and training loop, dense Adam."""

from __future__ import annotations

import numpy as np
import torch
from common import Clock, answer, options
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DeepFM


def main() -> None:
    asked = options()
    rows = asked["rows"]
    with np.load(asked["path"]) as stored:
        ids, dense, label = (stored[n][:rows] for n in ("ids", "dense", "label"))
    features = [SparseFeat(f"t{i}", size, asked["dim"]) for i, size in enumerate(asked["sizes"])]
    features += [DenseFeat(f"d{i}") for i in range(dense.shape[1])]
    model = DeepFM(features, features, dnn_hidden_units=tuple(asked["hidden"]), seed=asked["seed"], device="cpu")
    model.compile(torch.optim.Adam(model.parameters(), lr=1e-3), "binary_crossentropy")
    inputs = {f"t{i}": ids[:, i] for i in range(ids.shape[1])} | {f"d{i}": dense[:, i] for i in range(dense.shape[1])}
    size = asked["batch_size"]
    warm = {name: values[:size] for name, values in inputs.items()}
    model.fit(warm, label[:size], batch_size=size, epochs=1, verbose=0)  # Adam makes its moments in the first step
    clock = Clock()
    with clock:
        model.fit(inputs, label, batch_size=size, epochs=1, verbose=0)
    answer("deepctr-torch", len(label), clock, optimizer="dense Adam over all rows", model="DeepFM")


if __name__ == "__main__":
    main()
