"""A small world behind the page: films with genres, users with histories, a scorer that follows the last clicks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi.concurrency import run_in_threadpool

from engine.components import UserState
from engine.errors import BundleError, PlexrankError
from serving.ranking_view import Card, Reason, Receipt

EVIL = "<img src=x onerror=\"document.title='owned'\">"
FILMS = [
    ("Fargo (1996)", "Crime · Drama · Thriller"),
    ("Toy Story (1995)", "Animation · Children's · Comedy"),
    ("Alien (1979)", "Action · Horror · Sci-Fi"),
    ("Titanic (1997)", "Drama · Romance"),
    ("Pulp Fiction (1994)", "Crime · Drama"),
    ("Blade Runner (1982)", "Film-Noir · Sci-Fi"),
    ("Sense and Sensibility (1995)", "Drama · Romance"),
    ("Aliens (1986)", "Action · Sci-Fi · War"),
    ("Babe (1995)", "Children's · Comedy · Drama"),
    ("L.A. Confidential (1997)", "Crime · Film-Noir · Mystery"),
    ("Emma (1996)", "Drama · Romance"),
    ("Chinatown (1974)", "Film-Noir · Mystery · Thriller"),
    ("The Wrong Trousers (1993)", "Animation · Comedy"),
    ("2001: A Space Odyssey (1968)", "Drama · Mystery · Sci-Fi"),
    ("The Full Monty (1997)", "Comedy"),
    ("Il Postino (1994)", "Drama · Romance"),
    ("The Terminator (1984)", "Action · Sci-Fi · Thriller"),
    ("A Close Shave (1995)", "Animation · Comedy · Thriller"),
    (EVIL, "Horror"),
    ("The Silence of the Lambs (1991)", "Drama · Thriller"),
    ("Cinema Paradiso (1988)", "Comedy · Drama · Romance"),
    ("Monty Python and the Holy Grail (1974)", "Comedy"),
    ("Vertigo (1958)", "Mystery · Thriller"),
    ("The Empire Strikes Back (1980)", "Action · Adventure · Sci-Fi · War"),
    ("Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb (1963)", "Sci-Fi · War"),
    ("Snow White and the Seven Dwarfs (1937)", "Animation · Children's · Musical"),
]


class FilmConsole:
    """Fulfils `serving.playground.Console`. `fails`, `degraded` and `delay` make the states that pages must show."""

    def __init__(self) -> None:
        self.films = {str(n): film for n, film in enumerate(FILMS, start=1)}
        day = 86_400
        self.states = {
            "196": UserState(
                "196",
                {"age": 49, "gender": "M", "occupation": "writer"},
                ["4", "11", "7"],
                [874 * 10**6 - n * 9 * day for n in range(3)],
            ),
            "<b>bold</b>": UserState("<b>bold</b>", {"occupation": "<i>x</i>"}, ["3", "8"], [890_000_000, 880_000_000]),
        }
        for n in range(1, 60):
            history = [str(1 + (n * 7 + k * 5) % len(FILMS)) for k in range(1 + n % 9)]
            features = {"age": 18 + n, "gender": "MF"[n % 2], "occupation": ["student", "engineer", "librarian"][n % 3]}
            times = [880_000_000 - k * day for k in range(len(history))]
            self.states[str(n)] = UserState(str(n), features, history, times)
        self.fails: PlexrankError | None = None
        self.degraded: list[str] = []
        self.delay = 0.0
        self.learnt_version: str | None = None
        self.answers: dict[str, Mapping[str, Reason]] = {}

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await run_in_threadpool(function, *arguments)

    def about(self) -> Mapping[str, str]:
        return {"interest": "din", "embedding": "full", "ranker": "mlp"}

    def learnt(self) -> str | None:
        return self.learnt_version

    def users(self, prefix: str, limit: int) -> Sequence[UserState]:
        return [s for name, s in self.states.items() if name.startswith(prefix)][:limit]

    def user(self, user: str) -> UserState:
        return self.states.get(user, UserState(user))

    def cards(self, ids: Sequence[str]) -> Mapping[str, Card]:
        return {i: Card(i, *self.films[i]) for i in ids if i in self.films}

    def _likeness(self, a: str, b: str) -> float:
        x, y = (set(self.films[i][1].split(" · ")) for i in (a, b))
        return len(x & y) / len(x | y)

    def recommend(self, user: str, count: int) -> Mapping[str, Any]:
        if self.delay:
            time.sleep(self.delay)
        if self.fails:
            raise self.fails
        return self.answer(user, count)

    def answer(self, user: str, count: int) -> Mapping[str, Any]:
        """What `recommend` gives when nothing is wrong."""
        history = self.user(user).history
        scored, reasons = [], {}
        for item in self.films:
            if item in history:
                continue
            weights = [(h, self._likeness(item, h) * math.exp(-0.15 * age)) for age, h in enumerate(history)]
            logit = 0.4 - 0.03 * int(item) + 2.2 * sum(w for _, w in weights) / math.sqrt(len(history) + 1)
            scored.append((1 / (1 + math.exp(-logit)), item))
            reasons[item] = Reason(
                weights, ["popular"] if int(item) % 3 else ["retriever", "popular"], ["mmr"] if item == "9" else []
            )
        scored.sort(reverse=True)
        request = f"r-{time.time_ns()}"
        self.answers[request] = reasons
        return {
            "request_id": request,
            "model": {"name": "films", "version": "3f9a2c71"},
            "items": [
                {"id": i, "score": round(s, 6), "position": p} for p, (s, i) in enumerate(scored[:count], start=1)
            ],
            "degraded": list(self.degraded),
            "took_ms": 6.84,
            "stages": {"retrieve": 1.42, "merge": 0.12, "filter": 0.3, "rank": 4.61, "rerank": 0.39},
        }

    def explain(self, request_id: str, count: int) -> Mapping[str, Reason]:
        return self.answers[request_id]

    def click(self, user: str, item: str, request_id: str) -> Receipt:
        if item not in self.films:
            raise BundleError(f"no item '{item}'")
        state = self.states.setdefault(user, UserState(user))
        before, now = len(state.history), int(time.time())
        state.history.insert(0, item)
        state.times.insert(0, now)
        return Receipt(f"e-{time.time_ns()}", "click", user, self.cards([item])[item], now, "0:7", before, before + 1)


def shown(console: FilmConsole, user: str) -> list[str]:
    """The order of items that the page must show, asked of the world itself."""
    return [item["id"] for item in console.answer(user, 20)["items"]]
