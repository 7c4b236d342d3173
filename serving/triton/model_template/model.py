"""Written by `plexrank export triton`: hands tensors on between Triton and plexrank, which is installed beside it.

Only by DLPack: Triton's own `as_numpy` gives zeros with numpy 2. Out of torch's tensors: at the end of numpy's own
Triton complains in its log.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        from torch import from_numpy  # only here: Triton has no patience while it imports this file

        from serving.triton.hosted import Hosted

        self.hosted, self.from_numpy = Hosted.started(args), from_numpy

    def execute(self, requests: list[Any]) -> list[Any]:
        answers = self.hosted.score([tensors_of(request) for request in requests])
        return [self.response_of(answer) for answer in answers]

    def response_of(self, answer: Any) -> Any:
        if isinstance(answer, Exception):
            refused = hasattr(answer, "status")  # a RequestError
            code = pb_utils.TritonError.INVALID_ARG if refused else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(answer), code))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor.from_dlpack(name, self.from_numpy(array.reshape(1, -1))) for name, array in answer.items()]
        )

    def finalize(self) -> None:
        self.hosted.close()


def tensors_of(request: Any) -> dict[str, np.ndarray]:
    """name -> array [n]. One without elements cannot come by DLPack; but for candidates it says what none says."""
    tensors: dict[str, np.ndarray] = {}
    for tensor in request.inputs():
        name = tensor.name()
        if 0 not in tensor.shape():
            array = np.from_dlpack(tensor)
            tensors[name] = array[0] if len(array) == 1 else array  # of more requests in one: refused by its shape
        elif name == "candidates":
            tensors[name] = np.empty(0, np.int64)
    return tensors
