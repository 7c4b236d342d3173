"""DIN of FuxiCTR: its own model, loss, optimizer (dense Adam), early stopping and loader, on exported rows.

With the option `in_memory` batches are cut from tensors instead, which costs it less than its loader does.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import Clock, Rows, Slices, answer, figures, options
from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DIN import DIN
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

Batch = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


class InMemory:
    """Batches without its loader: (columns of the row, items [history..., target] flattened, mask of the history)."""

    def __init__(self, rows: Rows, features: list[str], batch_size: int, shuffle: bool) -> None:
        self.features = features
        history = torch.from_numpy(rows["history"]).flip(1)  # oldest first, padded before
        items = torch.cat([history, torch.from_numpy(rows["item_id"])[:, None]], dim=1)
        tensors = {name: torch.from_numpy(rows[name]) for name in features} | {"items": items, "mask": history > 0}
        self.slices = Slices(tensors | {"label": torch.from_numpy(rows.label)}, batch_size, shuffle)

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[Batch]:
        for cut in self.slices:
            columns = {name: cut[name] for name in [*self.features, "label"]}
            yield columns, {"item_id": cut["items"].reshape(-1)}, cut["mask"]


def own_loader(
    folder: Path, name: str, rows: Rows, schema: FeatureMap, features: list[str], batch_size: int, shuffle: bool
) -> LongCTRDataLoader:
    """Its own loader, in this process, over Parquet files in the form that it wants."""
    columns = {feature: rows[feature] for feature in features} | {"label": rows.label.astype(np.int64)}
    index = {"user_index": np.arange(len(rows)), "item_index": rows["item_id"], "seq_len": rows["history.length"]}
    pd.DataFrame(columns | index).to_parquet(folder / f"{name}.parquet")
    oldest_first = [h[:n][::-1] for h, n in zip(rows["history"], rows["history.length"], strict=True)]
    pd.DataFrame({"full_item_seq": oldest_first}).to_parquet(folder / f"{name}.users.parquet")
    items = np.arange(rows.sizes["item_id"])
    pd.DataFrame({"item_index": items, "item_id": items}).to_parquet(folder / "items.parquet")
    return LongCTRDataLoader(
        schema,
        str(folder / f"{name}.parquet"),
        str(folder / f"{name}.users.parquet"),
        str(folder / "items.parquet"),
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=0,
        max_len=rows["history"].shape[1],
    )


class Timed(DIN):  # type: ignore[misc]
    """Counts the time of training epochs without that of validation."""

    def train_epoch(self, data_generator: Any) -> None:
        self.clock: Clock
        self.clock.__enter__()
        super().train_epoch(data_generator)

    def eval_step(self) -> None:
        self.clock.__exit__()  # it validates once an epoch, after the last step
        super().eval_step()


def main() -> None:
    asked = options()
    train, validation, test = (Rows(asked["path"], split) for split in ("train", "validation", "test"))
    features: list[str] = asked["features"]
    schema = FeatureMap("exported", ".")
    schema.features = OrderedDict(
        (name, {"source": source, "type": "categorical", "vocab_size": train.sizes[name], "padding_idx": 0})
        for name, source in [*((f, "user") for f in features), ("item_id", "item")]
    )
    schema.features |= {name: {"type": "meta"} for name in ("user_index", "item_index", "seq_len")}
    schema.labels = ["label"]
    schema.num_fields, schema.default_emb_dim = len(features) + 1, asked["dim"]
    size = asked["batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        model = Timed(
            schema,
            gpu=-1,
            embedding_dim=asked["dim"],
            dnn_hidden_units=asked["hidden"],
            attention_hidden_units=asked["attention"],
            attention_hidden_activations="Dice",
            learning_rate=1e-3,
            optimizer="adam",
            loss="binary_crossentropy",
            metrics=["AUC", "logloss"],
            monitor="AUC",
            early_stop_patience=asked["patience"],
            task="binary_classification",
            verbose=0,
            model_root=scratch,
        )
        Path(model.model_dir).mkdir(parents=True, exist_ok=True)
        model.clock = Clock()
        if asked["in_memory"]:
            batches = [InMemory(rows, features, size, rows is train) for rows in (train, validation, test)]
        else:
            batches = [
                own_loader(Path(scratch), name, rows, schema, features, size, rows is train)
                for name, rows in (("train", train), ("validation", validation), ("test", test))
            ]
        model.fit(batches[0], epochs=asked["epochs"], validation_data=batches[1])
        scores = model.predict(batches[2])
    epochs = model._epoch_index + 1
    answer(
        "fuxictr",
        len(train) * epochs,
        model.clock,
        optimizer="dense Adam",
        loader="tensors in memory" if asked["in_memory"] else "its own",
        epochs=epochs,
        **figures(test, np.asarray(scores)),
    )


if __name__ == "__main__":
    main()
