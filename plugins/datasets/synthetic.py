"""A made-up service whose truth is known: who would click what, at which place, and how tastes drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from engine.components import Dataset, DatasetFiles, PluginOptions
from engine.hookspecs import hookimpl
from plugins.datasets.files import folder_for, whole, write_table

START = 1_767_225_600
"""2026-01-01, in seconds since 1970."""
DAY = 86_400
CATEGORIES = ("action", "comedy", "crime", "drama", "family", "fantasy", "history", "music", "nature", "space")
ADJECTIVES = ("Quiet", "Red", "Broken", "Golden", "Distant", "Hidden", "Electric", "Paper", "Northern", "Last")
NOUNS = ("River", "Machine", "Garden", "Letter", "Harbour", "Winter", "Orchestra", "Signal", "Island", "Clock")
COUNTRIES = ("AT", "BR", "DE", "FR", "IN", "JP", "KE", "US")
PAGE = 10
"""Impressions of one page: they share a time."""
WIDTH = 6
"""Dimensions of the planted tastes."""


class Synthetic(Dataset):
    """Impressions with planted tastes, position bias and drift; the true click probability is kept beside each.

    interactions: user_id, item_id, timestamp, position (1 is the top), device, clicked, true_ctr. `true_ctr` is the
    probability that `clicked` was drawn with: for measuring, never a feature. items: item_id, title, category, price.
    users: user_id, age, country.

    A user's taste is a point near some of the categories; an item's is its category's plus its own. A click's logit is
    taste . item + quality - position_bias * log(position) - 1; the taste turns towards another point over time,
    `drift` of the way from the first day to the last.
    """

    name = "synthetic"

    class Options(PluginOptions):
        users: int = Field(500, ge=1, description="people")
        items: int = Field(300, ge=1, description="things")
        impressions: int = Field(50_000, ge=1, description="rows")
        seed: int = Field(1, ge=0, lt=2**31, description="fixes the data")
        drift: float = Field(0.3, ge=0, le=1, description="how far tastes move from the first day to the last")
        position_bias: float = Field(0.5, ge=0, description="weight of the place's logarithm against a click")
        taste: float = Field(2.0, ge=0, description="how strongly tastes decide")

    options: Options

    def prepare(self, cache: Path) -> DatasetFiles:
        """Draws everything from one seed; equal options give equal files."""
        folder = folder_for(cache, [], self.options.model_dump_json())
        out = DatasetFiles([folder / "impressions.parquet"], folder / "items.parquet", folder / "users.parquet")
        if not whole(out):
            world = _World(self.options)
            assert out.items
            assert out.users
            write_table(world.items(), out.items)
            write_table(world.users(), out.users)
            write_table(world.impressions(), out.interactions[0])
        return out


class _World:
    def __init__(self, options: Synthetic.Options) -> None:
        self.o = options
        self.rng = np.random.default_rng(options.seed)
        draw = self.rng.normal
        self.category = self.rng.integers(len(CATEGORIES), size=options.items)
        centres = draw(size=(len(CATEGORIES), WIDTH))
        self.item = centres[self.category] + 0.5 * draw(size=(options.items, WIDTH))
        self.quality = 0.5 * draw(size=options.items)
        self.first, self.last = (self._tastes(centres) for _ in range(2))

    def _tastes(self, centres: np.ndarray) -> np.ndarray:
        """float64 [users, WIDTH], length one: between two categories, with a part of one's own."""
        size = self.o.users
        liked = self.rng.integers(len(CATEGORIES), size=(size, 2))
        mixed: np.ndarray = centres[liked].sum(axis=1) + 0.7 * self.rng.normal(size=(size, WIDTH))
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        return mixed

    def items(self) -> pa.Table:
        number = np.arange(self.o.items)
        adjective = np.array(ADJECTIVES)[number % len(ADJECTIVES)]
        noun = np.array(NOUNS)[number // len(ADJECTIVES) % len(NOUNS)]
        volume = (number // (len(ADJECTIVES) * len(NOUNS)) + 1).astype(str)
        title = np.char.add(np.char.add(np.char.add(adjective, " "), np.char.add(noun, " ")), volume)
        return pa.table(
            {
                "item_id": _names("i", number),
                "title": pa.array(title),
                "category": pa.array(np.array(CATEGORIES)[self.category]),
                "price": pa.array(np.round(self.rng.lognormal(2.0, 0.8, self.o.items), 2)),
            }
        )

    def users(self) -> pa.Table:
        ages = np.clip(self.rng.normal(38, 14, self.o.users), 14, 90).astype(np.int16)
        country = np.array(COUNTRIES)[self.rng.integers(len(COUNTRIES), size=self.o.users)]
        return pa.table({"user_id": _names("u", np.arange(self.o.users)), "age": ages, "country": pa.array(country)})

    def impressions(self) -> pa.Table:
        """Pages of ten in the order of time; users and items are drawn by a long tail."""
        rows, rng = self.o.impressions, self.rng
        pages = -(-rows // PAGE)
        page = np.arange(rows) // PAGE
        clock = np.sort(rng.integers(0, 30 * DAY, size=pages))
        user = rng.choice(self.o.users, size=pages, p=_tail(self.o.users))[page]
        item = self._shown(page)
        position = np.arange(rows) % PAGE + 1
        moved = (self.o.drift * clock / (30 * DAY))[page, None]
        taste = (1 - moved) * self.first[user] + moved * self.last[user]
        logit = self.o.taste * np.einsum("nd,nd->n", taste, self.item[item]) + self.quality[item]
        logit += -1.0 - self.o.position_bias * np.log(position)
        true = 1 / (1 + np.exp(-logit))
        device = np.array(["phone", "desktop", "tablet"])[rng.choice(3, size=pages, p=[0.6, 0.3, 0.1])[page]]
        return pa.table(
            {
                "user_id": _names("u", user),
                "item_id": _names("i", item),
                "timestamp": START + clock[page],
                "position": position.astype(np.int16),
                "device": pa.array(device),
                "clicked": (rng.random(rows) < true).astype(np.int8),
                "true_ctr": true.astype(np.float32),
            }
        )

    def _shown(self, page: np.ndarray) -> np.ndarray:
        """int64 [rows]: an item a place, by a long tail, no item twice on a page (where there are enough)."""
        chance = self.rng.permutation(_tail(self.o.items))
        item = self.rng.choice(self.o.items, size=len(page), p=chance)
        for _ in range(100 if self.o.items >= PAGE else 0):
            order = np.lexsort((item, page))
            repeats = (np.diff(item[order]) == 0) & (np.diff(page[order]) == 0)
            again = order[1:][repeats]
            if not len(again):
                break
            item[again] = self.rng.choice(self.o.items, size=len(again), p=chance)
        return item


def _names(letter: str, numbers: np.ndarray) -> pa.Array:
    return pa.array(np.char.add(letter, numbers.astype(str)))


def _tail(size: int) -> np.ndarray:
    """Probabilities that fall as 1 / sqrt(rank)."""
    weight: np.ndarray = 1 / np.sqrt(np.arange(1, size + 1))
    weight /= weight.sum()
    return weight


@hookimpl
def datasets() -> list[type[Dataset]]:
    return [Synthetic]
