"""The optional CUDA library as a backend: which ops it has a kernel for. `dispatch` asks when ``"cuda"`` is named."""

from asymvlm_kernels.unproven.cuda import decode, prefill

LAUNCHERS = {**prefill.LAUNCHERS, **decode.LAUNCHERS}

__all__ = ["LAUNCHERS"]
