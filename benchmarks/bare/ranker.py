"""The network of configs/movielens-100k.yaml in plain torch: full tables, DIN with Dice, an MLP.

It starts from rows of tables, so it has no ids to hash, no features to encode, nothing ragged and nobody to serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.components import ScoreRequest

USER_FIELDS = ("user_id", "age", "gender", "occupation")
ITEM_FIELDS = ("item_id", "year")
"""In the configuration's order; genres and the interest come behind them."""
_BLOCK = 2**19
"""Numbers of the attention's first layer at a time in `BareFolded`: 2 MB, as much as stays in a core's cache."""


@dataclass(frozen=True)
class Rows:
    """One request as rows of tables, int64: user [1] a field, items [N] a field, genres [T] in bags that begin at
    genre_starts [N], history [H]."""

    user: dict[str, Tensor]
    items: dict[str, Tensor]
    genres: Tensor
    genre_starts: Tensor
    history: Tensor


class BareRanker:
    """The network as its papers write it: [h, t, h - t, h * t] of every pair is made."""

    def __init__(self, bundle: Path) -> None:
        self.w = load_file(bundle / "model.safetensors")

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> Tensor:
        """-> logits float32 [N]."""
        w, n = self.w, len(rows.genre_starts)
        of_items = {name: F.embedding(rows.items[name], self._table(name)) for name in ITEM_FIELDS}
        targets = of_items["item_id"]
        history = F.embedding(rows.history, self._table("item_id"))
        fields = [F.embedding(rows.user[name], self._table(name)).expand(n, -1) for name in USER_FIELDS]
        genres = F.embedding_bag(rows.genres, self._table("genres"), rows.genre_starts, mode="mean")
        x = torch.cat([*fields, *of_items.values(), genres, self._attended(targets, history)], dim=1)
        for layer in ("0", "2"):
            x = F.relu(F.linear(x, w[f"ranker.body.{layer}.weight"], w[f"ranker.body.{layer}.bias"]))
        return F.linear(x, w["ranker.heads.weight"], w["ranker.heads.bias"]).squeeze(1)

    def _attended(self, targets: Tensor, history: Tensor) -> Tensor:
        """targets [N, D], history [H, D] -> sums of the history weighed for each target [N, D]."""
        n, h = len(targets), len(history)
        t = targets[:, None, :].expand(n, h, -1)
        k = history[None, :, :].expand(n, h, -1)
        x = torch.cat([k, t, k - t, k * t], dim=2).flatten(0, 1)
        return self._weights(self._layer(x, 0)).view(n, h) @ history

    def _weights(self, x: Tensor) -> Tensor:
        """First layer's sums [P, 64] -> weights [P]."""
        x = self._layer(self._dice(x, 0), 1)
        return self._layer(self._dice(x, 1), 2).squeeze(1)

    def _layer(self, x: Tensor, number: int) -> Tensor:
        return F.linear(x, self.w[f"interest.layers.{number}.weight"], self.w[f"interest.layers.{number}.bias"])

    def _dice(self, s: Tensor, number: int) -> Tensor:
        alpha, mean, var = (
            self.w[f"interest.activations.{number}.{p}"] for p in ("alpha", "running_mean", "running_var")
        )
        p = torch.sigmoid((s - mean) / torch.sqrt(var + 1e-8))
        return p * s + (1 - p) * alpha * s

    def _table(self, feature: str) -> Tensor:
        return self.w[f"embedding.weights.t_{feature}"]


class BareFolded(BareRanker):
    """The same with the algebra that a hand-written server would use, the strongest peer known: the first layer folded
    to (A + C) h + (B - C) t + M (h * t), in blocks that stay in the cache, activations in place."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(bundle)
        a, b, c, m = self.w["interest.layers.0.weight"].chunk(4, dim=1)
        self._item, self._target, self._product = a + c, (b - c).T.contiguous(), m.contiguous()
        self._dices = [self._folded(number) for number in range(2)]

    def _attended(self, targets: Tensor, history: Tensor) -> Tensor:
        hidden = len(self._item)
        rows = max(1, _BLOCK // (hidden * max(1, len(history))))
        out = []
        for t in targets.split(rows):
            bias = torch.addmm(self.w["interest.layers.0.bias"], t, self._target)
            read = torch.addcmul(self._item, self._product, t[:, None, :])
            x = (history @ read.flatten(0, 1).T).add_(bias.flatten()).view(-1, hidden)
            out.append(self._weights(x).view(len(history), len(t)).T @ history)
        return torch.cat(out)

    def _folded(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, mean, var = (
            self.w[f"interest.activations.{number}.{p}"] for p in ("alpha", "running_mean", "running_var")
        )
        scale = torch.rsqrt(var + 1e-8)
        return scale, -mean * scale, alpha, 1 - alpha

    def _dice(self, s: Tensor, number: int) -> Tensor:
        scale, shift, alpha, beta = self._dices[number]
        p = torch.addcmul(shift, s, scale).sigmoid_()
        return s.mul_(torch.addcmul(alpha, p, beta, out=p))


def rows_of(bundle: Bundle, request: ScoreRequest) -> Rows:
    """A request's ids as rows: an id's place among the known ones, counted from 1; 0 is the unknown id's."""
    batch = bundle.encoder.encode_request(request, bundle.catalogue)
    ids = batch.ids.to_dict()

    def rows(feature: str, space: str) -> Tensor:
        return bundle.statistics[space].rows(ids[feature].values()) + 1

    return Rows(
        user={name: rows(name, name) for name in USER_FIELDS},
        items={name: rows(name, name) for name in ITEM_FIELDS},
        genres=rows("genres", "genres"),
        genre_starts=ids["genres"].offsets()[:-1].to(torch.int64),
        history=rows("history", "item_id"),
    )
