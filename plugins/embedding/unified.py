"""Feature multiplexing: one table for all features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from engine.components import EmbeddingMethod, PluginOptions
from engine.data.statistics import IdStatistics
from engine.errors import SchemaError
from engine.hookspecs import hookimpl
from engine.placement import Hashed, Placement, Table
from engine.schema import FeatureSpec
from engine.tables import TableEmbedding, TableOptions
from plugins.embedding.full import own_rows

DEFAULT_ROWS = 1 << 18
"""8 MiB of float32 at width 8."""

TABLE = "unified"


class UnifiedEmbedding(TableEmbedding):
    """One table of R chunks of width c for all features: an id reads t of them and concatenates.

    Coleman et al. 2023, Unified Embedding (arXiv 2305.12102). Lookup j of an id reads row mix(fingerprint,
    seed(space, j)) mod R. The seeds come from the *name* of the space and the number of the lookup, so a feature that
    is added moves no other, and features of one space share them. Collisions between features are harmless once the
    network reads features through weights of their own (concatenation, not plain sums); those within a feature become
    rare with t >= 2, as two ids must meet in every chunk to be one.

    Width of feature f: t_f * c. Unless `chunk` is given, c = (smallest width) / lookups and t_f = width / c, so that
    each feature keeps its width. `FeatureSpec.lookups` overrules t_f (of its whole space). Memory: R * c floats.
    Two lookups by default: on MovieLens-100k at a tenth of the memory one lookup gave AUC .691, two .758, four .775;
    four cost twice the lookups and gain nothing on large vocabularies.
    """

    name = "unified"

    class Options(TableOptions):
        rows: int | None = Field(None, ge=1, description=f"chunks in the table; default {DEFAULT_ROWS}")
        budget_bytes: int | None = Field(None, ge=4, description="bytes of all tables together, in place of rows")
        ratio: float | None = Field(None, gt=0, description="bytes of all tables as a share of one row an id")
        lookups: int = Field(2, ge=1, le=16, description="chunks an id, where a feature does not name its own")
        chunk: int | None = Field(None, ge=1, le=4096, description="width of a chunk; default: width / lookups")
        exclude: tuple[str, ...] = Field((), description="features that stay out: a row an id in tables of their own")

        @model_validator(mode="after")
        def _one_size(self) -> Self:
            if sum(size is not None for size in (self.rows, self.budget_bytes, self.ratio)) > 1:
                raise ValueError("give one of 'rows', 'budget_bytes' and 'ratio'")
            return self

    options: Options

    @classmethod
    def wants_statistics(cls, options: PluginOptions) -> bool:
        assert isinstance(options, cls.Options)
        return options.ratio is not None or bool(options.exclude)

    def placements(self, statistics: Mapping[str, IdStatistics]) -> dict[str, Placement]:
        names = {f.name for f in self.features}
        for name in self.options.exclude:
            if name not in names:
                raise SchemaError(f"embedding.options.exclude: no embedded feature named '{name}'")
        out = {f.space for f in self.features if f.name in self.options.exclude}
        spaces = {f.space: f for f in reversed(self.features)}  # the first feature of each space stands for it
        made: dict[str, Placement] = {s: own_rows(spaces[s], statistics[s].fingerprints) for s in out}
        inside = [f for s, f in spaces.items() if s not in out]
        if inside:
            chunk = self._chunk(inside)
            spent = sum(4 * p.table.rows * p.table.dim for p in made.values())
            table = Table(TABLE, self._rows(chunk, spent, list(spaces.values()), statistics), chunk)
            made.update((f.space, Hashed(table, f.space, self._lookups(f, chunk))) for f in inside)
        return {f.name: made[f.space] for f in self.features}

    def _chunk(self, inside: list[FeatureSpec]) -> int:
        if self.options.chunk is not None:
            return self.options.chunk
        smallest = min(f.dim or 0 for f in inside)
        if smallest % self.options.lookups:
            raise SchemaError(
                f"embedding: width {smallest} is not a multiple of {self.options.lookups} lookups; "
                "change embedding.dim or embedding.options.lookups, or set embedding.options.chunk"
            )
        return smallest // self.options.lookups

    def _lookups(self, feature: FeatureSpec, chunk: int) -> int:
        """Lookups of a space: the first of its features that names a number decides."""
        named = [f.lookups for f in self.features if f.space == feature.space and f.lookups]
        if named:
            return int(named[0])
        if self.options.chunk is not None:
            return self.options.lookups
        assert feature.dim is not None
        if feature.dim % chunk:
            raise SchemaError(f"feature '{feature.name}': width {feature.dim} is not a multiple of the chunk {chunk}")
        return feature.dim // chunk

    def _rows(self, chunk: int, spent: int, spaces: list[FeatureSpec], statistics: Mapping[str, IdStatistics]) -> int:
        """Chunks that the budget leaves after the excluded features' own tables."""
        if self.options.ratio is not None:
            full = sum(4 * (statistics[f.space].size + 1) * (f.dim or 0) for f in spaces)
            budget = int(self.options.ratio * full)
        elif self.options.budget_bytes is not None:
            budget = self.options.budget_bytes
        else:
            return self.options.rows or DEFAULT_ROWS
        rows = (budget - spent) // (4 * chunk)
        if rows < 1:
            raise SchemaError(
                f"embedding: a budget of {budget} bytes is spent by the excluded features ({spent} bytes); raise it"
            )
        return rows


@hookimpl
def embeddings() -> list[type[EmbeddingMethod]]:
    return [UnifiedEmbedding]
