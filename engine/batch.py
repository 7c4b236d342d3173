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
    values, lengths, strides, counts = [], [], [], []
    for column_values, column_lengths in columns.values():
        v = torch.as_tensor(column_values, dtype=torch.int64)
        n = torch.ones(len(v), dtype=torch.int64) if column_lengths is None else torch.as_tensor(column_lengths)
        values.append(v)
        lengths.append(n.to(torch.int64))
        strides.append(len(n))
        counts.append(len(v))
    all_values = torch.cat(values) if values else torch.empty(0, dtype=torch.int64)
    all_lengths = torch.cat(lengths) if lengths else torch.empty(0, dtype=torch.int64)
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
