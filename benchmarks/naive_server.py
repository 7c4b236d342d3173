"""What is often written by hand: FastAPI, a pydantic model a candidate that repeats the user's features and history,
dictionaries from ids to rows, and the eager network over [candidates, history].

    python -m benchmarks.naive_server BUNDLE PORT

It answers `POST /score` with one score a candidate, those of the bundle's network (benchmarks/bare/ranker.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import one_thread

one_thread()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.bare.ranker import BareRanker  # noqa: E402
from engine.bundle import Bundle  # noqa: E402


class Candidate(BaseModel):
    """One row of what is scored: the user again with each item."""

    user_id: str
    age: int
    gender: str
    occupation: str
    history: list[str]
    item_id: str
    year: int
    genres: list[str]


class ScoreRequest(BaseModel):
    candidates: list[Candidate]


class ScoreResponse(BaseModel):
    scores: list[float]


USER = ("user_id", "age", "gender", "occupation")
ITEM = ("item_id", "year")
SPACES = {"history": "item_id"}


class NaiveRanker(BareRanker):
    """The same network with a row of its own for the user and the history of each candidate."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        bundle = Bundle.open(path)
        self._calibration = bundle.calibration["like"]
        self._rows = _Dictionaries(bundle)

    @torch.inference_mode()
    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        rows = self._rows
        fields = [
            F.embedding(torch.tensor([rows.of(name, getattr(c, name)) for c in candidates]), self._table(name))
            for name in (*USER, *ITEM)
        ]
        history = torch.tensor([[rows.of("item_id", item) for item in c.history] for c in candidates])
        past, targets = F.embedding(history, self._table("item_id")), fields[len(USER)]
        genres = torch.stack(
            [
                F.embedding(torch.tensor([rows.of("genres", g) for g in c.genres]), self._table("genres")).mean(0)
                for c in candidates
            ]
        )
        n, h, _ = past.shape
        t = targets[:, None, :].expand(n, h, -1)
        weights = self._weights(self._layer(torch.cat([past, t, past - t, past * t], dim=2).flatten(0, 1), 0))
        interest = (weights.view(n, h, 1) * past).sum(1)
        x = torch.cat([*fields, genres, interest], dim=1)
        logits = self._body(x)
        scores: list[float] = self._calibration.apply(logits.numpy()).tolist()
        return scores

    def _body(self, x: Tensor) -> Tensor:
        for layer in ("0", "2"):
            x = F.relu(F.linear(x, self.w[f"ranker.body.{layer}.weight"], self.w[f"ranker.body.{layer}.bias"]))
        return F.linear(x, self.w["ranker.heads.weight"], self.w["ranker.heads.bias"]).squeeze(1)


class _Dictionaries:
    """feature -> value -> row of its table, each value looked up once through the bundle's encoder."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._known: dict[str, dict[Any, int]] = {name: {} for name in (*USER, *ITEM, "genres")}

    def of(self, name: str, value: Any) -> int:
        row = self._known[name].get(value)
        if row is None:
            raw = [value] if name != "genres" else [[value]]
            prints = torch.from_numpy(self._bundle.encoder.encode_values(name, raw).values)
            row = self._known[name][value] = int(self._bundle.statistics[name].rows(prints)[0]) + 1
        return row


def candidates_of(
    user: Mapping[str, Any], history: Sequence[str], items: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The body of a request."""
    return {"candidates": [{**user, "history": list(history), **item} for item in items]}


def create_app(bundle: Path) -> FastAPI:
    torch.set_num_threads(1)
    ranker = NaiveRanker(bundle)
    app = FastAPI()

    @app.post("/score")
    def score(request: ScoreRequest) -> ScoreResponse:
        return ScoreResponse(scores=ranker.score(request.candidates))

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning", http="httptools")
