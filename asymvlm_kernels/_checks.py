"""Argument checks shared by the public ops. None of them reads a CUDA tensor's values: that would synchronise."""

from __future__ import annotations

import math

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a copy moves bits, whatever they mean


def check_shape(name: str, tensor: torch.Tensor, wanted: tuple[int | str, ...]) -> None:
    """``wanted`` mixes fixed sizes and axis names: ``(2, "N")`` is two rows of any length."""
    fits = tensor.ndim == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, wanted, strict=True)
    )
    if not fits:
        text = ", ".join(str(want) for want in wanted) + ("," if len(wanted) == 1 else "")
        raise ValueError(f"{name} must have shape ({text}), got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: torch.Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in wanted:
        text = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise ValueError(f"{name} must be {text}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_mask(name: str, mask: torch.Tensor | None, like: torch.Tensor) -> None:
    """A mask is bool, True = real, and covers the first two axes of ``like``."""
    if mask is None:
        return
    check_shape(name, mask, tuple(like.shape[:2]))
    check_dtype(name, mask, (torch.bool,))
    check_device(name, mask, like)


def check_places(name: str, places: torch.Tensor, length: int) -> None:
    """Every place must be in ``[-1, length)``, or another sample's row would answer. For `define_op`: reads values."""
    if places.numel() == 0:
        return
    lowest, highest = (int(value) for value in places.aminmax())
    if lowest < -1 or highest >= length:
        found = lowest if lowest < -1 else highest
        raise IndexError(f"{name} must be in [-1, {length}), got {found}")


def check_number(name: str, value: float, *, least: float | None = None, above: float | None = None) -> None:
    """A finite number of the host, at least ``least`` or greater than ``above``."""
    fits = not isinstance(value, (bool, str)) and math.isfinite(value)
    if fits and (least is None or value >= least) and (above is None or value > above):
        return
    bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")


def check_pad(name: str, pad: float, dtype: torch.dtype) -> None:
    """A padding value must be a number of ``dtype``: -100 in a uint8 would be 156, and 1.5 in an index 1."""
    if isinstance(pad, str) or not isinstance(pad, (int, float, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{name} must be a number, got {pad!r}")
    if dtype == torch.bool:
        fits, wanted = pad in (0, 1), "0 or 1"
    elif dtype.is_floating_point or dtype.is_complex:
        largest = torch.finfo(dtype).max
        fits, wanted = not math.isfinite(pad) or abs(pad) <= largest, f"at most {largest:g} in size"
        if math.isinf(pad) and str(dtype).startswith("torch.float8") and "fn" in str(dtype):
            fits, wanted = False, "finite or NaN"  # these types have no infinity
    else:
        info = torch.iinfo(dtype)
        fits = math.isfinite(pad) and pad == int(pad) and info.min <= pad <= info.max
        wanted = f"a whole number from {info.min} to {info.max}"
    if not fits:
        raise ValueError(f"{name} must be {wanted} for {str(dtype).removeprefix('torch.')}, got {pad!r}")


def check_no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """An inference op that dropped a gradient silently would train a wrong model."""
    check_no_transform(op, **tensors)
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op} is not differentiable in {name}: detach it or call under torch.no_grad()")


def check_no_transform(op: str, **tensors: torch.Tensor | None) -> None:
    """Tangents and the levels of torch.func do not show in ``requires_grad``, and no op knows them."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise ValueError(f"{op} does not run under torch.func (grad, jvp, vmap, ...), which transforms {name}")
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{op} has no forward-mode derivative, and {name} carries a tangent")
