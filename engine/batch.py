"""The one currency between data, training and serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


@dataclass
class Batch:
    """U users (requests), N targets (candidates). In training U = N = B; in serving U = 1.

    ids: KeyedJaggedTensor of int64 fingerprints, one key an embedded feature in the schema's order. Keys of the user's
        or context's features have stride U, keys of the item's have stride N (a KeyedJaggedTensor with a stride per key
        where they differ).
    dense_user [U, n] and dense_item [N, m]: float32, scaled, the schema's dense features of each side in order.
    user_of_target [N]: int64, which of the U users each target belongs to.
    labels: task -> float32 [N]. weight: float32 [N] or None. time: int64 [N] or None, seconds since 1970.
    user_key, item_key: int64 [N] fingerprints of user and item, for grouped metrics and negatives; None in serving.
    """

    ids: KeyedJaggedTensor
    dense_user: Tensor
    dense_item: Tensor
    user_of_target: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    time: Tensor | None = None
    user_key: Tensor | None = None
    item_key: Tensor | None = None

    @property
    def users(self) -> int:
        return int(self.dense_user.shape[0])

    @property
    def targets(self) -> int:
        return int(self.user_of_target.shape[0])

    def jagged(self) -> dict[str, JaggedTensor]:
        return self.ids.to_dict()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch on another device."""

        def move(value: object) -> object:
            if isinstance(value, Tensor | KeyedJaggedTensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


def keyed_jagged(columns: Mapping[str, tuple[np.ndarray | Tensor, np.ndarray | Tensor | None]]) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor from `feature -> (values int64 [T], lengths int32/int64 [stride] or None)`.

    None as lengths means one value a row. Strides may differ between keys (one user, many candidates).
    """
    values, lengths = [], []
    ones = np.ones(max((len(v) for v, its in columns.values() if its is None), default=0), np.int64)
    for column_values, column_lengths in columns.values():
        values.append(column_values)
        lengths.append(ones[: len(column_values)] if column_lengths is None else column_lengths)
    strides, counts = [len(n) for n in lengths], [len(v) for v in values]
    all_values, all_lengths = _joined(values), _joined(lengths)
    if len(set(strides)) <= 1:
        return KeyedJaggedTensor(
            keys=list(columns),
            values=all_values,
            lengths=all_lengths,
            stride=strides[0] if strides else 0,
            length_per_key=counts,
        )
    return KeyedJaggedTensor(
        keys=list(columns),
        values=all_values,
        lengths=all_lengths,
        stride_per_key_per_rank=[[s] for s in strides],
        length_per_key=counts,
    )


def _joined(parts: list[np.ndarray | Tensor]) -> Tensor:
    """Behind one another, int64. Arrays are joined by numpy: torch would wake its threads, which the model needs."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64, casting="same_kind"))
    return torch.cat([torch.as_tensor(part).to(torch.int64) for part in parts])
