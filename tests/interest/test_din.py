"""DIN against a slow, literal reading of the paper: a loop over targets and history items in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from plugins.interest.attention import AttentionInterest
from plugins.interest.din import DINInterest
from plugins.interest.mean import MeanInterest

DIM = 6
LENGTHS = [4, 0, 1, 9, 2]


def world(seed: int = 0) -> tuple[torch.Tensor, JaggedTensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    targets = torch.randn(len(LENGTHS), DIM, generator=random)
    values = torch.randn(sum(LENGTHS), DIM, generator=random)
    return targets, JaggedTensor(values=values, lengths=torch.tensor(LENGTHS)), torch.arange(len(LENGTHS))


def made(**options) -> DINInterest:
    torch.manual_seed(5)
    model = DINInterest(DIM, DINInterest.Options(hidden=(8, 4), **options))
    for activation in model.activations:
        if hasattr(activation, "alpha"):
            torch.nn.init.uniform_(activation.alpha, 0.1, 0.4)
            torch.nn.init.uniform_(activation.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(activation.running_var, 0.5, 2)
    return model


def literal(model: DINInterest, targets, history, *, training: bool, softmax: bool = False) -> np.ndarray:
    """Each pair's [h, t, h - t, h * t] written out, Dice over all pairs, then the weighted sum a target."""
    values, offsets = history.values().double().numpy(), history.offsets().tolist()
    t = targets.double().numpy()
    of = [(i, j) for i in range(len(t)) for j in range(offsets[i], offsets[i + 1])]
    x = np.array([np.concatenate([values[j], t[i], values[j] - t[i], values[j] * t[i]]) for i, j in of])
    for layer, activation in zip(model.layers, [*model.activations, None], strict=True):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        if activation is not None and hasattr(activation, "alpha"):
            mean = x.mean(0) if training else activation.running_mean.double().numpy()
            var = x.var(0) if training else activation.running_var.double().numpy()
            p = 1 / (1 + np.exp(-(x - mean) / np.sqrt(var + 1e-8)))
            x = p * x + (1 - p) * activation.alpha.detach().double().numpy() * x
        elif activation is not None:
            x = np.maximum(x, 0)
    weights = x[:, 0]
    out = np.zeros_like(t)
    for i in range(len(t)):
        mine = [k for k, (target, _) in enumerate(of) if target == i]
        w = weights[mine]
        if softmax and mine:
            w = np.exp(w - w.max()) / np.exp(w - w.max()).sum()
        for k, weight in zip(mine, w, strict=True):
            out[i] += weight * values[of[k][1]]
    return out


@pytest.mark.parametrize("training", [True, False], ids=["training", "serving"])
@pytest.mark.parametrize("activation", ["dice", "relu"])
@pytest.mark.parametrize("softmax", [False, True], ids=["intensity", "softmax"])
def test_din_is_the_weighted_sum_of_the_paper(training: bool, activation: str, softmax: bool) -> None:
    model = made(activation=activation, softmax=softmax).train(training)
    targets, history, users = world()
    expected = literal(model, targets, history, training=training, softmax=softmax)
    got = model(targets, history, users).detach()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not got[1].any()  # the user without history


@pytest.mark.parametrize("activation", ["dice", "prelu", "relu"])
def test_a_request_of_many_candidates_scores_them_as_pairs_do(activation: str) -> None:
    model = made(activation=activation).eval()
    random = torch.Generator().manual_seed(6)
    values, targets = torch.randn(7, DIM, generator=random), torch.randn(50, DIM, generator=random)
    history = JaggedTensor(values=values, lengths=torch.tensor([7]))
    copies = JaggedTensor(values=values.repeat(50, 1), lengths=torch.full((50,), 7))
    with torch.no_grad():
        one = model(targets, history, torch.zeros(50, dtype=torch.int64))
        pairs = model(targets, copies, torch.arange(50))
    torch.testing.assert_close(one, pairs, rtol=1e-4, atol=1e-5)


def test_candidates_scored_in_blocks_get_the_same_interest(monkeypatch) -> None:
    model = made().eval()
    values, targets = torch.randn(7, DIM), torch.randn(50, DIM)
    history, users = JaggedTensor(values=values, lengths=torch.tensor([7])), torch.zeros(50, dtype=torch.int64)
    with torch.no_grad():
        whole = model(targets, history, users)
        monkeypatch.setattr("plugins.interest.din._BLOCK", 7 * 8 * 3)  # three targets at a time
        blocks = model(targets, history, users)
    torch.testing.assert_close(whole, blocks, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [DINInterest, AttentionInterest, MeanInterest])
@pytest.mark.parametrize("training", [True, False], ids=["training", "serving"])
def test_the_order_of_the_history_does_not_matter(cls, training: bool) -> None:
    torch.manual_seed(1)
    model = cls(DIM, cls.Options()).train(training)
    targets, history, users = world()
    order = torch.cat([torch.randperm(n) + start for n, start in zip(LENGTHS, history.offsets()[:-1], strict=True)])
    shuffled = JaggedTensor(values=history.values()[order], lengths=history.lengths())
    torch.testing.assert_close(model(targets, history, users), model(targets, shuffled, users), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [DINInterest, AttentionInterest, MeanInterest])
def test_only_the_newest_items_of_a_long_history_count(cls) -> None:
    torch.manual_seed(1)
    model = cls(DIM, cls.Options(max_history=2)).eval()
    targets, history, users = world()
    newest = [part[:2] for part in history.to_dense()]
    with torch.no_grad():
        got = model(targets, history, users)
        expected = model(targets, JaggedTensor.from_dense(newest), users)
    torch.testing.assert_close(got, expected)


def test_explain_gives_the_weights_that_made_the_sum() -> None:
    model = made().eval()
    targets, history, users = world()
    with torch.no_grad():
        weights = model.explain(targets, history, users)
        interest = model(targets, history, users)
    assert weights.lengths().tolist() == LENGTHS
    for i, (w, items) in enumerate(zip(weights.to_dense(), history.to_dense(), strict=True)):
        torch.testing.assert_close((w * items).sum(0), interest[i], rtol=1e-4, atol=1e-5)


def test_the_scale_multiplies_every_weight() -> None:
    targets, history, users = world()
    plain, scaled = made(scale=1.0), made(scale=0.25)
    torch.testing.assert_close(scaled(targets, history, users), 0.25 * plain(targets, history, users))
    for model in (plain, scaled):
        model.eval()
    weights = plain.explain(targets, history, users).values()
    torch.testing.assert_close(scaled.explain(targets, history, users).values(), 0.25 * weights)


def test_attention_is_the_softmax_of_inner_products() -> None:
    targets, history, users = world()
    got = AttentionInterest(DIM, AttentionInterest.Options())(targets, history, users)
    for i, items in enumerate(history.to_dense()):
        h, t = items.double().numpy(), targets[i].double().numpy()
        logits = h @ t / np.sqrt(DIM)
        expected = (np.exp(logits) / np.exp(logits).sum()) @ h if len(h) else np.zeros(DIM)
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)


def test_mean_is_the_mean() -> None:
    targets, history, users = world()
    got = MeanInterest(DIM, MeanInterest.Options())(targets, history, users)
    for i, items in enumerate(history.to_dense()):
        expected = items.numpy().mean(0) if len(items) else np.zeros(DIM)
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)
