"""GaLore's own optimizer, of the package galore-torch, as a peer on the CPU."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def load() -> Any:
    """Returns the module with galore-torch's AdamW.

    The package's ``__init__`` imports bitsandbytes, a library of CUDA kernels, for its 8-bit optimizer.  AdamW does not
    need it: the package is entered without its ``__init__``.

    Raises:
      ImportError: galore-torch, torch or transformers is not installed.
    """
    if "galore_torch" not in sys.modules:
        spec = importlib.util.find_spec("galore_torch")
        if spec is None:
            raise ImportError("it is not installed: pip install --no-deps galore-torch")
        package = types.ModuleType("galore_torch")
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw")


class Steps:
    """A call makes one step of galore-torch on kernels."""

    def __init__(self, rank: int, gap: int, params: dict, grads: dict):
        import torch

        tensors = {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in params.items()}
        for name, x in grads.items():
            tensors[name].grad = torch.tensor(np.asarray(x))
        group = {"params": list(tensors.values()), "rank": rank, "update_proj_gap": gap, "scale": 0.25}
        self._optimizer = load().AdamW([group | {"proj_type": "std"}], lr=1e-3, no_deprecation_warning=True)
        self._params = list(tensors.values())

    def __call__(self):
        """Makes one step and returns the parameters, as arrays that are there."""
        self._optimizer.step()
        return self._params[0].detach()

    @property
    def state_bytes(self) -> int:
        """Bytes of bases and moments."""
        total = 0
        for state in self._optimizer.state.values():
            own = [state["exp_avg"], state["exp_avg_sq"], state["projector"].ortho_matrix]
            total += sum(x.numel() * x.element_size() for x in own)
        return total
