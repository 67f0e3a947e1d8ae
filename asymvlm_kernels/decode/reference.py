"""The decode phase in plain PyTorch: specification, CPU path and test oracle at once.

The public functions beside this file check their arguments; these do not. Nothing here synchronises a CUDA device.
Axes: B batch, Q query rows, S cache slots, H query heads, G key heads, R = H / G query heads that share a key head,
D head width, M moves. K and V are ``(B, S, G, D)`` of any strides; GQA never expands them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asymvlm_kernels._checks import WORDS

INFINITY = float("inf")
LOGITS = 2**25  # query rows are taken in blocks of at most so many logits: 128 MiB of fp32


def valid_slots(
    Q: int,
    S: int,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    left: int,
    right: int,
    device: torch.device,
) -> torch.Tensor:
    """``(B or 1, Q, S)`` bool: the slots that each query row may see.

    Without ``slot_pos`` a slot's position is its number, and the last row stands at the last slot that is in use. With
    it, a slot is seen iff ``0 <= pos <= q_pos`` and ``pos >= q_pos - left``. A bound of -1 is no bound.
    """
    slot = torch.arange(S, device=device)[None, None]
    end = torch.full((1, 1, 1), S, device=device) if seqlens is None else seqlens[:, None, None].long().clamp_max(S)
    valid = slot < end
    if leftpad is not None:
        valid = valid & (slot >= leftpad[:, None, None])
    if slot_pos is not None and q_pos is not None:
        place, row = slot_pos[:, None].long(), q_pos[:, :, None].long().clamp(-1, 2**31 - 1)
        valid = valid & (place >= 0) & (place <= row)
    else:
        place, row = slot, end - Q + torch.arange(Q, device=device)[None, :, None]
        if right >= 0:
            valid = valid & (place <= row + right)
    if left >= 0:
        valid = valid & (place >= row - left)
    return valid.expand(-1, Q, -1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``(B, G, M, K) @ (B, G, K, N)``, on a CPU sample by sample: MKL's order of sums depends on the batch."""
    if a.device.type != "cpu" or len(a) < 2:
        return a @ b
    return torch.stack([left @ right for left, right in zip(a, b, strict=True)])


def scaled_logits(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float, valid: torch.Tensor) -> torch.Tensor:
    """``(B, G, R, Q, S)`` fp32: ``softcap * tanh(scale * q k / softcap)``, -inf where a row may not look."""
    B, Q, H, D = q.shape
    S, G = k.shape[1:3]
    rows = (q.float() * scale).view(B, Q, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * Q, D)
    logits = _product(rows, k.float().permute(0, 2, 3, 1)).view(B, G, H // G, Q, S)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill_(~valid[:, None, None], -INFINITY)


def attend_slots(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    num_splits: int,
    with_lse: bool,
    score_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(B, Q, H, D)`` output, ``(B, H, Q)`` fp32 logsumexp and ``(B, S)`` fp32 scores, or no columns if not wanted."""
    valid = valid_slots(q.shape[1], k.shape[1], seqlens, leftpad, slot_pos, q_pos, left, right, q.device)
    valid = valid.expand(q.shape[0], -1, -1)
    samples = [(q, k, v, valid)]
    if q.device.type == "cpu" and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] > LOGITS:
        samples = list(zip(*(x.split(1) for x in (q, k, v, valid)), strict=True))  # blocks of rows as of one alone
    parts = [_attend(*sample, scale, softcap, score_rows) for sample in samples]
    out, lse, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return out, lse if with_lse else lse[..., :0].clone(), scores


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor,
    scale: float,
    softcap: float,
    score_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, logsumexp and scores under the mask ``valid`` ``(B, Q, S)``."""
    B, Q, H, D = q.shape
    S, G = k.shape[1:3]
    seen = valid.any(1)
    values = v.float()
    if q.device.type != "cpu" or not bool(seen.all()):  # a NaN in a free slot times a probability of 0 would be NaN
        values = values.masked_fill(~seen[:, :, None, None], 0.0)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, Q), dtype=torch.float32)
    scores = q.new_zeros((B, S if score_rows else 0), dtype=torch.float32)
    block = max(1, LOGITS // max(B * H * S, 1))
    for start in range(0, Q, block):
        stop = min(start + block, Q)
        logits = scaled_logits(q[:, start:stop], k, scale, softcap, valid[:, start:stop])
        # a row that sees nothing has probabilities of 0, an output of 0, and FlashAttention's logsumexp of +inf
        peak = logits.amax(-1, keepdim=True) if S else logits.new_full((*logits.shape[:-1], 1), -INFINITY)
        weights = (logits - peak.masked_fill(peak == -INFINITY, 0.0)).exp_()  # (B, G, R, rows, S)
        total = weights.sum(-1, keepdim=True)
        weights /= total.masked_fill(total == 0, 1.0)
        weights.masked_fill_(logits == -INFINITY, 0.0)  # in a row with a NaN too
        rows = _product(weights.flatten(2, 3), values.permute(0, 2, 1, 3))
        rows = rows.view(B, G, H // G, stop - start, D).permute(0, 3, 1, 2, 4)
        out[:, start:stop] = rows.reshape(B, stop - start, H, D).to(q.dtype)
        sums = (peak + total.log()).masked_fill_(total == 0, INFINITY)
        lse[:, :, start:stop] = sums.view(B, H, stop - start)
        scored = max(Q - score_rows - start, 0)
        if score_rows and scored < stop - start:
            scores += weights[:, :, :, scored:].sum((1, 2, 3))
    return out, lse, scores / (H * max(score_rows, 1))


def score_from_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    score_rows: int,
) -> torch.Tensor:
    """``scores[b, s] = mean over heads and the last rows of exp(logit - lse)``: ``(B, S)`` fp32."""
    B, Q, H, _ = q.shape
    S, G = k.shape[1:3]
    q, lse = q[:, Q - score_rows :], lse[..., Q - score_rows :]
    if q_pos is not None:
        q_pos = q_pos[:, Q - score_rows :]
    valid = valid_slots(score_rows, S, seqlens, leftpad, slot_pos, q_pos, left, right, q.device)
    logits = scaled_logits(q, k, scale, softcap, valid)
    total = lse.reshape(B, G, H // G, score_rows, 1)
    # in an empty row both are infinite, and their difference might be NaN
    weights = (logits - total).exp_().masked_fill_(logits == -INFINITY, 0.0)
    return weights.sum((1, 2, 3)) / (H * score_rows)


def attention_column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> torch.Tensor:
    """``sums[b, g, s] = mean over the heads of g, sum over queries of softmax(logits)``: ``(B, G, S)`` fp32.

    Samples one after the other, queries in blocks of a size that the batch does not change.
    """
    (B, Q, H, _), (S, G) = q.shape, k.shape[1:3]
    sums = q.new_zeros((B, G, S), dtype=torch.float32)
    block = max(1, LOGITS // max(H * S, 1))
    if slot_pos is None:
        slot_pos = torch.arange(S, dtype=torch.int32, device=q.device).expand(B, S)
    for b in range(B):
        one = slice(b, b + 1)
        for start in range(0, Q, block):
            rows = slice(start, min(start + block, Q))
            places = slot_pos[one], q_pos[one, rows]
            seen = valid_slots(rows.stop - start, S, None, None, *places, left, 0, q.device)
            logits = scaled_logits(q[one, rows], k[one], scale, softcap, seen)
            if lse is None:
                weights = logits.softmax(-1)
            else:
                weights = (logits - lse[one, :, rows].reshape(*logits.shape[:-1], 1)).exp_()
            weights.masked_fill_(logits == -INFINITY, 0.0)  # in an empty row all of them are NaN
            sums[b] += weights.sum((2, 3))[0]
    return sums / (H // G)


def plan_moves(keep: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The i-th kept slot at or past ``m = keep.sum()`` goes into the i-th free slot before ``m``."""
    slot = torch.arange(keep.shape[1], device=keep.device)
    kept = keep.sum(-1, keepdim=True)
    return _places(keep & (slot >= kept), capacity), _places(~keep & (slot < kept), capacity)


def _places(mask: torch.Tensor, capacity: int) -> torch.Tensor:
    """``(B, S)`` bool -> ``(B, capacity)`` int64: the places of True, ascending, padded with -1."""
    B, S = mask.shape
    rank = (mask.cumsum(-1) - 1).masked_fill(~mask, capacity).clamp_max(capacity)
    places = torch.full((B, capacity + 1), -1, dtype=torch.int64, device=mask.device)
    places.scatter_(-1, rank, torch.arange(S, device=mask.device).expand(B, S))
    return places[:, :capacity].contiguous()


def move_slots_(source: torch.Tensor, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """``tensor[b, target[b, i]] = tensor[b, source[b, i]]`` for each tensor ``(B, S, ...)``; -1 moves nothing."""
    tensors = [tensor for tensor in tensors if tensor.numel() > 0]
    # PyTorch indexes few other types
    tensors = [tensor.view(WORDS[tensor.itemsize]) if tensor.itemsize in WORDS else tensor for tensor in tensors]
    if source.numel() == 0:
        return
    batch = torch.arange(source.shape[0], device=source.device)[:, None].expand_as(source)
    if source.device.type == "cpu":
        real = (source >= 0) & (target >= 0)
        batch, source, target = batch[real], source[real], target[real]
        for tensor in tensors:
            tensor[batch, target] = tensor[batch, source]
        return
    # without a synchronisation padding cannot be left out: each of its writes repeats the write of move 0, or writes
    # slot 0 to itself where there is no move at all (move 0 is padding only in such rows)
    real = (source >= 0) & (target >= 0)
    source, target = (torch.where(real, x, torch.where(real[:, :1], x[:, :1], 0)) for x in (source, target))
    for tensor in tensors:
        tensor[batch, target] = tensor[batch, source]
