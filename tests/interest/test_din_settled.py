"""A settled DIN keeps what follows from its weights, and forgets it when it is trained again."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from plugins.interest.din import DINInterest


def test_settled_weights_give_the_same_and_training_ends_it() -> None:
    torch.manual_seed(3)
    din = DINInterest(4, DINInterest.Options())
    for activation in din.activations:
        activation.running_mean.normal_()
        activation.alpha.data.normal_()
    din.eval()
    targets, history = torch.randn(7, 4), JaggedTensor(values=torch.randn(5, 4), lengths=torch.tensor([5]))
    user_of_target = torch.zeros(7, dtype=torch.int64)

    def answer() -> torch.Tensor:
        with torch.inference_mode():
            return din(targets, history, user_of_target)

    before = answer()
    din.settle()
    assert torch.equal(answer(), before)
    din.train()
    with torch.no_grad():
        din.layers[0].weight.mul_(2)
    din.eval()
    assert not torch.allclose(answer(), before)
