"""What the tests and the benchmarks share: real model shapes, input makers, the tolerance rule.

Random inputs have random near ties, and fp32 sums in another order may swap them. So `prefill_inputs` draws until the
scores around the cut are apart in float64: then every correct backend must return the same index. `exact_inputs` has
sums that fp32 holds exactly, and many true ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MARGIN = 4e-6  # twice the error of a bf16 score
ATTEMPTS = 100


@dataclass(frozen=True)
class PrefillShape:
    """Vision tokens, text tokens and width of one request."""

    name: str
    N: int
    L: int
    D: int


SHAPES = (
    PrefillShape("Phi-3.5-V", 2500, 30, 3072),
    PrefillShape("Gemma-3-12B", 256, 40, 3840),
    PrefillShape("Gemma-3-12B, 4 images", 1024, 500, 3840),
    PrefillShape("LLaVA-NeXT-8B", 2880, 40, 4096),
    PrefillShape("Qwen2.5-VL-7B, page", 4096, 40, 3584),
    PrefillShape("Qwen2.5-VL-7B, largest image", 16384, 40, 3584),
)


@dataclass(frozen=True)
class PrefillInputs:
    """``(B, N, D)``, ``(B, L, D)``, ``(D,)``."""

    vision: torch.Tensor
    text: torch.Tensor
    weight: torch.Tensor


def prefill_inputs(
    B: int,
    N: int,
    L: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    count: int | None = None,
    margin: float = MARGIN,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PrefillInputs:
    """Random embeddings whose ``count``-th and next best score differ by more than ``margin`` in every row.

    Row lengths and the part of a vision row that lies along a text row vary, as in a model. ``count=None`` asks for no
    margin.

    Raises:
        RuntimeError: if no seed of the next hundred gives such a margin.
    """
    for attempt in range(ATTEMPTS):
        generator = torch.Generator().manual_seed(seed + 1000 * attempt)
        inputs = _draw(B, N, L, D, dtype, generator)
        if count is None or not 0 < count < N or _margin(inputs, count) > margin:
            return PrefillInputs(*(tensor.to(device) for tensor in vars(inputs).values()))
    raise RuntimeError(f"no seed in {ATTEMPTS} leaves {margin} around the {count}-th of {N} scores")


def _draw(B: int, N: int, L: int, D: int, dtype: torch.dtype, generator: torch.Generator) -> PrefillInputs:
    text = torch.randn(B, L, D, generator=generator)
    noise = torch.randn(B, N, D, generator=generator)
    along = torch.randint(max(L, 1), (B, N, 1), generator=generator)
    part = torch.rand(B, N, 1, generator=generator)
    vision = noise + part * text.gather(1, along.expand(B, N, D)) if L else noise
    length = 10 ** torch.empty(B, N, 1).uniform_(-1, 1, generator=generator)
    weight = torch.empty(D).uniform_(0, 2, generator=generator)
    return PrefillInputs((vision * length).to(dtype), (0.02 * text).to(dtype), weight)


def _margin(inputs: PrefillInputs, count: int) -> float:
    ranked = literal_scores(inputs.vision, inputs.text, inputs.weight, torch.float64).sort(-1, descending=True).values
    return float((ranked[:, count - 1] - ranked[:, count]).min())


def exact_inputs(
    B: int,
    N: int,
    L: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PrefillInputs:
    """Inputs whose products, sums and norms fp32 holds exactly: every right score is bitwise the same, and ties abound.

    Entries are 0 and +-1, a power of 4 of them nonzero in a row, so norms are powers of two; so are the weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(*size: int) -> torch.Tensor:
        places = torch.rand(*size, D, generator=generator).argsort(-1)
        most = max(k for k in range(8) if 4**k <= D)
        kept = 4 ** torch.randint(most + 1, (*size, 1), generator=generator)
        signs = torch.randint(2, (*size, D), generator=generator) * 2.0 - 1
        return torch.where(places < kept, signs, 0.0)

    weight = 2.0 ** torch.randint(-1, 2, (D,), generator=generator)
    return PrefillInputs(rows(B, N).to(device, dtype), rows(B, L).to(device, dtype), weight.to(device))


def literal_scores(
    vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Eq. 1 as the paper writes it, computed in ``dtype``: normalises and weights V. ``(B, N)`` in ``dtype``."""
    vision, text = vision.to(dtype), text.to(dtype)
    vision = vision / torch.linalg.vector_norm(vision, dim=-1, keepdim=True).clamp_min(1e-12)
    text = text / torch.linalg.vector_norm(text, dim=-1, keepdim=True).clamp_min(1e-12)
    if weight is not None:
        vision = vision * weight.to(dtype)
    return (vision @ text.mT).amax(-1)


def assert_as_accurate(result: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> None:
    """``result`` errs at most twice as much as ``same_dtype``, computed by PyTorch in the dtype of the inputs.

    Both are measured against ``exact`` (float64). Four roundings of fp32 are always allowed: a CPU's
    blocked sums of a few thousand terms err less than the running sums of a kernel (3e-7 against 1e-7 at D = 3072).
    """
    error = (result.double() - exact).abs().max().item()
    allowed = max(2 * (same_dtype.double() - exact).abs().max().item(), 2**-21 * exact.abs().max().item())
    assert error <= allowed, f"error {error:.2e} exceeds {allowed:.2e}"
