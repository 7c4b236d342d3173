"""A training loop over 26 large tables written straight on TorchRec: DeepFM, fused row-wise Adagrad, dense Adam.

Imports nothing of the engine. Options (JSON, last argument): path (.npz with ids int64 [n, 26], dense float32 [n, 13],
label float32 [n]), sizes, dim, hidden, batch_size, seed. Prints one JSON object last.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import fbgemm_gpu  # noqa: E402, F401 (its operators must be registered before torchrec's)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fbgemm_gpu.split_embedding_configs import EmbOptimType  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder  # noqa: E402
from torchrec.distributed.model_parallel import DistributedModelParallel  # noqa: E402
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType  # noqa: E402
from torchrec.modules.embedding_modules import EmbeddingBagCollection  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402


class DeepFM(nn.Module):
    """Fields are projected to one width by weights of their own; first order + pairs + a deep network."""

    def __init__(self, sizes: list[int], dim: int, dense: int, hidden: list[int]) -> None:
        super().__init__()
        self.names = [f"t{i}" for i in range(len(sizes))]
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=n, num_embeddings=s, embedding_dim=dim, feature_names=[n], pooling=PoolingType.SUM
                )
                for n, s in zip(self.names, sizes, strict=True)
            ],
            device=torch.device("meta"),
        )
        width, fields = len(sizes) * dim + dense, len(sizes)
        self.project = nn.Parameter(torch.randn(fields, dim, dim) / dim**0.5)
        self.of_dense = nn.Linear(dense, dim)
        self.first = nn.Linear(width, 1)
        layers: list[nn.Module] = []
        for inner, outer in zip([width, *hidden], hidden, strict=False):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.deep = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, ids: KeyedJaggedTensor, dense: Tensor) -> Tensor:
        found = self.tables(ids)
        vectors = torch.cat([found[n] for n in self.names], dim=1)
        x = torch.cat([vectors, dense], dim=1)
        fields = vectors.view(len(x), len(self.names), -1)
        meet = torch.einsum("nfd,fde->nfe", fields, self.project)
        meet = torch.cat([meet, self.of_dense(dense).unsqueeze(1)], dim=1)
        pairs = 0.5 * (meet.sum(1).square() - meet.square().sum(1)).sum(1)
        return self.first(x).squeeze(1) + pairs + self.deep(x).squeeze(1)


def main() -> None:
    asked = json.loads(sys.argv[-1])
    torch.set_num_threads(1)
    torch.manual_seed(asked["seed"])
    with np.load(asked["path"]) as stored:
        ids, dense, label = (torch.from_numpy(stored[n]) for n in ("ids", "dense", "label"))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05, "eps": 1e-8}
    model = DistributedModelParallel(
        DeepFM(asked["sizes"], asked["dim"], dense.shape[1], asked["hidden"]),
        device=torch.device("cpu"),
        sharders=[EmbeddingBagCollectionSharder(fused_params=fused)],
    )
    parameters = [p for n, p in model.named_parameters() if ".tables." not in f".{n}"]
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    loss_of = nn.BCEWithLogitsLoss()
    size, keys, losses = asked["batch_size"], [f"t{i}" for i in range(ids.shape[1])], []
    order = torch.randperm(len(label))
    began = time.perf_counter(), time.process_time()
    for rows in order.split(size):
        values = ids[rows].T.reshape(-1)
        lengths = torch.ones(len(values), dtype=torch.int32)
        jagged = KeyedJaggedTensor(keys, values, lengths=lengths, stride=len(rows))
        adam.zero_grad(set_to_none=True)
        loss = loss_of(model(jagged, dense[rows]), label[rows])
        loss.backward()
        adam.step()
        losses.append(loss.item())
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"rows_per_second": len(label) / wall, "rows_per_cpu_second": len(label) / cpu, "peak_rss_mb": peak}
    print(json.dumps({**found, "last_loss": float(np.mean(losses[-10:]))}))


if __name__ == "__main__":
    main()
