"""Embedding methods that are tables: TorchRec looks them up and shards them, plain tensors serve them.

On CPU an unpooled lookup is fastest as bags of one value each (`PoolingMode.NONE` and EmbeddingCollection are several
times slower backwards), so every table is one key of an EmbeddingBagCollection and the values of all its features lie
behind one another. Tables of equal index length share a collection; a table that feeds jagged features has its own.
Bags past the last value are empty: they cost no lookup, and let all processes have the same stride, which gloo needs.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.components import EmbeddingMethod, Memory, PluginOptions
from engine.placement import Own, Placement, Placer, Table
from engine.schema import FeatureSpec

if TYPE_CHECKING:
    from engine.data.statistics import IdStatistics

CHUNK = 1 << 14
"""Rows drawn from one seed: a shard of any size and place gets the numbers that the whole table would have there."""

_UNALLOCATED: ContextVar[bool] = ContextVar("unallocated", default=False)


@contextmanager
def unallocated_tables() -> Iterator[None]:
    """Tables made inside take no memory (meta device): sharding allocates each process's part, loading maps files."""
    token = _UNALLOCATED.set(True)
    try:
        yield
    finally:
        _UNALLOCATED.reset(token)


def table_name(name: str) -> str:
    """A parameter name for a space: features may be named with dots, or like a method of torch's modules."""
    return "t_" + name.replace(".", "%")


class TableOptions(PluginOptions):
    """Options of every table-shaped method.

    `init` is small because row-wise Adagrad's first step on a row is as long as its learning rate, whatever the
    gradient: rows that training hardly sees should not be louder than those it knows. On MovieLens-100k (DIN, time
    split, three seeds, learning rate .05) 0.01 gave AUC .7160 and logloss .6164, 0.05 gave .7162 and .6187.
    """

    init: float = Field(0.01, ge=0, description="weights start uniform in [-init, init]")


class TableEmbedding(EmbeddingMethod):
    """Base of table-shaped methods: a subclass says where each feature's ids live, all else is here.

    The numbers that the tables start from depend on torch's seed when the module is made and on the table's name, not
    on the order of tables, the number of processes or the sharding.
    """

    options: TableOptions

    def __init__(
        self, features: Sequence[FeatureSpec], options: PluginOptions, statistics: Mapping[str, IdStatistics]
    ) -> None:
        super().__init__(features, options, statistics)
        self.seed = torch.initial_seed() & 0x7FFFFFFF
        self._placements = self.placements(statistics)
        self.placer = Placer(self._placements)
        self.tables: dict[str, Table] = {p.table.name: p.table for p in self._placements.values()}
        self._widths = {f: p.lookups * p.table.dim for f, p in self._placements.items()}
        self._readers = readers(self._placements)
        self.groups = nn.ModuleDict()
        device = torch.device("meta" if _UNALLOCATED.get() else "cpu")
        self._members = self._grouped()
        for key, names in self._members.items():
            configs = [
                EmbeddingBagConfig(
                    name=n,
                    num_embeddings=self.tables[n].rows,
                    embedding_dim=self.tables[n].stored,
                    feature_names=[n],
                    pooling=PoolingType.SUM,
                    init_fn=_leave,
                )
                for n in names
            ]
            self.groups[key] = EmbeddingBagCollection(tables=configs, device=device)
        if not _UNALLOCATED.get():
            self.initialise()

    @abstractmethod
    def placements(self, statistics: Mapping[str, IdStatistics]) -> dict[str, Placement]:
        """feature -> where its ids live. Called once, when `features` and `options` are set."""

    @property
    def widths(self) -> dict[str, int]:
        return self._widths

    def _grouped(self) -> dict[str, list[str]]:
        """group -> tables whose index has equal length in training, where requests and targets are as many."""
        jagged = {f.name for f in self.features if f.is_jagged}
        groups: dict[str, list[str]] = {}
        for table, its_features in self._readers.items():
            length = sum(self._placements[f].lookups for f in its_features)
            key = table if jagged & set(its_features) else f"values{length}"
            groups.setdefault(key, []).append(table)
        return groups

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        rows = self.placer(_split(ids))
        vectors: dict[str, Tensor] = {}
        for key, names in self._members.items():
            if any(f in rows for n in names for f in self._readers[n]):
                vectors.update(self._look_up(self.groups[key], names, rows))
        return _jagged(ids, vectors)

    def _look_up(self, group: nn.Module, names: list[str], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One collection: rows of each feature -> vectors [n, width] of the features it holds."""
        parts = [[rows[f] for f in self._readers[n] if f in rows] for n in names]
        sizes = [sum(len(p) for p in table) for table in parts]
        stride = _agreed(group, max(1, *sizes))
        flat = [p for table in parts for p in table]
        values = torch.cat(flat) if len(flat) > 1 else flat[0]
        index = torch.arange(stride, device=values.device).expand(len(sizes), stride)
        lengths = (index < torch.tensor(sizes, device=values.device)[:, None]).to(torch.int32).reshape(-1)
        jagged = KeyedJaggedTensor(names, values, lengths=lengths, stride=stride, length_per_key=sizes)
        looked_up = group(jagged).to_dict()
        vectors: dict[str, Tensor] = {}
        for name, size in zip(names, sizes, strict=True):
            features = [f for f in self._readers[name] if f in rows]
            counts = [len(rows[f]) for f in features]
            table = self.tables[name]
            read = looked_up[name] if table.stored == table.dim else looked_up[name][:, : table.dim]
            if counts == [stride]:  # as it is where it can be: columns of one tensor, which `runs` joins
                width = self._widths[features[0]]
                vectors[features[0]] = read if read.shape[1] == width else read.reshape(-1, width)
                continue
            pieces = read.split([*counts, stride - size])
            vectors.update((f, p.reshape(-1, self._widths[f])) for f, p in zip(features, pieces, strict=False))
        return vectors

    @torch.no_grad()
    def initialise(self) -> None:
        """Fills the tables, or this process's shards of them, with their first weights."""
        for name, weight, first in self.local_weights():
            last, dim = first + weight.shape[0], self.tables[name].dim
            weight[:, dim:] = 0.0
            for chunk in range(first // CHUNK, -(-last // CHUNK)):
                begin, drawn = chunk * CHUNK, self.first_weights(name, chunk)
                low, high = max(first, begin), min(last, begin + CHUNK)
                weight[low - first : high - first, :dim] = drawn[low - begin : high - begin].to(weight.device)

    def first_weights(self, table: str, chunk: int) -> Tensor:
        """What rows `CHUNK * chunk` and on of a table begin with, float32 [CHUNK, dim]."""
        half, begin = self.options.init, chunk * CHUNK
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{table}".encode()).digest()[:6], "little")
        generator = torch.Generator().manual_seed(seed + chunk)
        drawn = torch.empty(CHUNK, self.tables[table].dim).uniform_(-half, half, generator=generator)
        unknown = {p.table.name: p.unknown_rows for p in self._placements.values() if isinstance(p, Own)}
        drawn[: max(0, unknown.get(table, 0) - begin)] = 0.0
        return drawn

    def own_rows(self) -> dict[str, Own]:
        """feature -> its placement, where ids have rows of their own."""
        return {f: p for f, p in self._placements.items() if isinstance(p, Own)}

    def _weights(self) -> dict[str, Tensor | ShardedTensor]:
        """table -> its whole weight, sharded or not."""
        state = {}
        for group in self.groups.values():
            for key, value in group.state_dict().items():
                state[key.split(".")[-2]] = value
        return state

    def local_weights(self) -> Iterator[tuple[str, Tensor, int]]:
        """(table, this process's rows of it [n, stored], number of the first); writing to them changes the table."""
        for name, weight in self._weights().items():
            if isinstance(weight, ShardedTensor):
                for shard in weight.local_shards():
                    yield name, shard.tensor, shard.metadata.shard_offsets[0]
            else:
                yield name, weight, 0

    def memory_bytes(self) -> Memory:
        """Training: weights, row-wise Adagrad's float a row, vocabularies. Inference: the frozen form's tensors."""
        trained = sum(4 * t.rows * (t.stored + 1) for t in self.tables.values())
        weights = sum(4 * t.rows * t.dim for t in self.tables.values())
        maps = sum(b.nbytes for b in self.placer.buffers())
        return Memory(training=trained + maps, inference=weights + maps)

    @torch.no_grad()
    def touched_rows(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        return _touched(self._readers, self.placer(_split(ids)))

    @torch.no_grad()
    def freeze(self) -> FrozenTables:
        """Plain tables. One process shares their memory with this module; of several, each calls this, process 0 gets
        the weights and the others tables on the meta device."""
        whole = {}
        for name, weight in self._weights().items():
            stored = gather(weight) if isinstance(weight, ShardedTensor) else weight
            table = self.tables[name]
            whole[name] = stored if table.stored == table.dim else stored[:, : table.dim].contiguous()
        return FrozenTables(self._placements, whole)

    @torch.no_grad()
    def as_they_are(self) -> FrozenTables:
        """The tables of a training in one process, read by the plain lookup: what is trained shows at once."""
        weights = {name: weight[:, : self.tables[name].dim] for name, weight, _ in self.local_weights()}
        return FrozenTables(self._placements, weights)


class FrozenTables(nn.Module):
    """The inference form of table-shaped methods: `F.embedding` on plain tensors, which may be memory-mapped."""

    def __init__(self, placements: Mapping[str, Placement], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._placements = dict(placements)
        self._readers = readers(placements)
        self.widths = {f: p.lookups * p.table.dim for f, p in placements.items()}
        self.placer = Placer(placements)
        self.weights = nn.ParameterDict({n: nn.Parameter(w.detach(), requires_grad=False) for n, w in weights.items()})

    @property
    def placements(self) -> Mapping[str, Placement]:
        """feature -> where its ids live."""
        return self._placements

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return _jagged(ids, self.look_up(_split(ids)))

    def look_up(self, prints: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feature -> fingerprints int64 [n] gives feature -> vectors float32 [n, width]."""
        vectors = {}
        for feature, index in self.placer(prints).items():
            weight = self.weights[self._placements[feature].table.name]
            vectors[feature] = F.embedding(index, weight).reshape(-1, self.widths[feature])
        return vectors

    @torch.no_grad()
    def touched_rows(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        return _touched(self._readers, self.placer(_split(ids)))

    def memory_bytes(self) -> Memory:
        """Training is not this form's business: both figures are the bytes of its tensors."""
        held = sum(t.nbytes for t in (*self.parameters(), *self.buffers()))
        return Memory(training=held, inference=held)


def readers(placements: Mapping[str, Placement]) -> dict[str, list[str]]:
    """table -> the features that read it, in the order of the features."""
    found: dict[str, list[str]] = {}
    for feature, placement in placements.items():
        found.setdefault(placement.table.name, []).append(feature)
    return found


def gather(weight: ShardedTensor) -> Tensor:
    """The whole of a sharded table on process 0, without a copy where one shard is all; elsewhere on meta."""
    local = weight.local_shards()
    if dist.get_world_size() == 1 and len(local) == 1:
        return local[0].tensor
    whole = torch.empty(weight.size(), dtype=weight.dtype) if dist.get_rank() == 0 else None
    for shard in weight.metadata().shards_metadata:
        owner = _owner(shard)
        rows = slice(shard.shard_offsets[0], shard.shard_offsets[0] + shard.shard_sizes[0])
        mine = [s.tensor for s in local if s.metadata.shard_offsets == shard.shard_offsets]
        if shard.shard_sizes[0] == 0:
            continue
        if whole is not None:
            if owner == 0:
                whole[rows] = mine[0].cpu()
            else:
                device = local[0].tensor.device if local else torch.device("cpu")
                part = torch.empty(*shard.shard_sizes, dtype=weight.dtype, device=device)
                dist.recv(part, src=owner)
                whole[rows] = part.cpu()
        elif owner == dist.get_rank():
            dist.send(mine[0].contiguous(), dst=0)
    return torch.empty(weight.size(), dtype=weight.dtype, device="meta") if whole is None else whole


def _owner(shard: ShardMetadata) -> int:
    """The process that holds a shard."""
    assert shard.placement is not None
    rank = shard.placement.rank()
    assert rank is not None
    return int(rank)


def _leave(weight: Tensor) -> Tensor:
    """TorchRec's initialisation hook: the weights are set by `initialise`."""
    return weight


def _split(ids: KeyedJaggedTensor) -> dict[str, Tensor]:
    return dict(zip(ids.keys(), ids.values().split(ids.length_per_key()), strict=True))


def _jagged(ids: KeyedJaggedTensor, vectors: Mapping[str, Tensor]) -> dict[str, JaggedTensor]:
    """Vectors with the lengths of their ids; unlike `KeyedJaggedTensor.to_dict`, also for a batch without rows."""
    lengths = ids.lengths().split(ids.stride_per_key())
    return {key: JaggedTensor(values=vectors[key], lengths=its) for key, its in zip(ids.keys(), lengths, strict=True)}


def _touched(readers_of: Mapping[str, list[str]], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        table: torch.cat([rows[f] for f in features if f in rows]).unique()
        for table, features in readers_of.items()
        if any(f in rows for f in features)
    }


def _agreed(group: nn.Module, stride: int) -> int:
    """The largest stride over all processes, for a sharded collection."""
    if isinstance(group, EmbeddingBagCollection) or dist.get_world_size() == 1:
        return stride
    largest = torch.tensor(stride)
    if dist.get_backend() == "nccl":
        largest = largest.cuda()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
