"""DIN of DeepCTR-Torch: its own model, training loop and optimizer (dense Adam), on exported rows."""

from __future__ import annotations

import copy

import numpy as np
from common import Clock, Rows, answer, figures, options
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DIN
from sklearn.metrics import roc_auc_score


def columns(rows: Rows, features: list[str]) -> dict[str, np.ndarray]:
    found = {name: rows[name] for name in [*features, "item_id"]}
    return found | {"hist_item_id": rows["history"], "seq_length": rows["history.length"]}


def main() -> None:
    asked = options()
    train, validation, test = (Rows(asked["path"], split) for split in ("train", "validation", "test"))
    features: list[str] = asked["features"]
    dim, length = asked["dim"], train["history"].shape[1]
    single = [SparseFeat(name, train.sizes[name], dim) for name in [*features, "item_id"]]
    item = SparseFeat("hist_item_id", train.sizes["item_id"], dim, embedding_name="item_id")
    model = DIN(
        [*single, VarLenSparseFeat(item, length, length_name="seq_length")],
        ["item_id"],
        dnn_hidden_units=tuple(asked["hidden"]),
        att_hidden_size=tuple(asked["attention"]),
        att_activation="Dice",
        seed=asked["seed"],
        device="cpu",
    )
    model.compile("adam", "binary_crossentropy")  # its learning rate is 1e-3, as the others'
    inputs = {rows: columns(rows, features) for rows in (train, validation, test)}
    clock = Clock()
    best, waited, epochs = (-1.0, {}), 0, 0
    while epochs < asked["epochs"] and waited < asked["patience"]:
        with clock:
            model.fit(inputs[train], train.label, batch_size=asked["batch_size"], epochs=1, verbose=0)
        epochs += 1
        auc = float(roc_auc_score(validation.label, model.predict(inputs[validation], 4096)))
        if auc > best[0]:
            best, waited = (auc, copy.deepcopy(model.state_dict())), 0
        else:
            waited += 1
    model.load_state_dict(best[1])
    scores = model.predict(inputs[test], 4096)
    rows = len(train) * epochs
    answer("deepctr-torch", rows, clock, optimizer="dense Adam", epochs=epochs, **figures(test, scores))


if __name__ == "__main__":
    main()
