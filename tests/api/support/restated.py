"""The rules of methods before the decoder, in plain loops over one row, float64: columns that stay -> embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asymvlm.methods import VisionPrompt


class Row:
    """One row of what a method sees."""

    def __init__(self, prompt: VisionPrompt, number: int) -> None:
        self.columns = prompt.tokens.prunable[number].nonzero()[:, 0].tolist()
        self.vision = (prompt.cells.line[number] >= 0).nonzero()[:, 0].tolist()
        self.embeds = prompt.embeds[number].double()
        self.features = prompt.features[number].double()
        self.keys = prompt.tower_keys[number].double()
        self.attention = prompt.tower_attention[number].tolist()
        self.text = self.embeds[prompt.text[number]]
        self.images = prompt.images[number].tolist()
        self.grids = [] if prompt.grids is None else prompt.grids[number]

    def whole(self, columns) -> dict[int, Tensor]:
        return {column: self.embeds[column] for column in columns}


def cosines(first: Tensor, second: Tensor) -> list[list[float]]:
    """Of each row of the one with each of the other."""
    return (first @ second.mT / first.norm(dim=-1)[:, None] / second.norm(dim=-1)).tolist()


def best_first(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda column: (-scores[column], column))


def half_and_half(row: Row, scores: dict[int, float], count: int) -> dict[int, Tensor]:
    order = best_first(scores)
    best, rest = order[: count // 2], order[count // 2 :]
    left = count - len(best)
    while len(rest) > left:
        alike = cosines(row.features[rest[::2]], row.features[rest[1::2]])
        near = dict(zip(rest[::2], (max(one, default=-2.0) for one in alike)))
        gone = sorted(rest[::2], key=lambda column: -near[column])[: min(8, len(rest) - left)]
        rest = [column for column in rest if column not in gone]
    return row.whole(best + rest)


def vispruner(row: Row, count: int) -> dict[int, Tensor]:
    return half_and_half(row, {column: row.attention[column] for column in row.columns}, count)


def scaled(values: list[float]) -> list[float]:
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


def softmax(values: list[float], temperature: float) -> list[float]:
    powers = [math.exp((value - max(values)) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def flashvlm(row: Row, count: int) -> dict[int, Tensor]:
    likeness = cosines(row.embeds[row.columns], row.text)
    found = [sum(p * c for p, c in zip(softmax(alike, 0.05), alike)) for alike in likeness]
    found = scaled([p**2.5 for p in softmax(found, 0.01)])
    ranked, place = sorted(found), 0.995 * (len(found) - 1)
    low = int(place)
    bound = ranked[low] + (place - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])
    found = scaled([0.1 * value if value < bound else value for value in found])
    attention = scaled([row.attention[column] for column in row.columns])
    scores = [math.exp(0.5 * math.log(max(a, 1e-6)) + 0.5 * math.log(max(q, 1e-6))) for a, q in zip(attention, found)]
    return half_and_half(row, dict(zip(row.columns, scores)), count)


def visionzip(row: Row, count: int) -> dict[int, Tensor]:
    number = min(max(1, count * 10 // 64), count - 1)
    dominant = best_first({column: row.attention[column] for column in row.columns})[: count - number]
    rest = [column for column in row.columns if column not in dominant]
    step = max(1, len(rest) // number)
    targets = [rest[step * n] for n in range(number)]
    joined: dict[int, list[Tensor]] = {target: [] for target in targets}
    for column, alike in zip(rest, cosines(row.keys[rest], row.keys[targets])):
        near = {t: likeness for t, likeness in zip(targets, alike) if row.images[t] == row.images[column]}
        if column not in targets and near:
            joined[best_first(near)[0]].append(row.embeds[column])
    merged = {t: row.embeds[t] + torch.stack(rows).mean(0) for t, rows in joined.items() if rows}
    return {**row.whole(dominant + targets), **merged}


def divprune(row: Row, count: int) -> dict[int, Tensor]:
    alike = cosines(row.embeds[row.columns], row.embeds[row.columns])
    far = {a: {b: 1 - c for b, c in zip(row.columns, line) if b != a} for a, line in zip(row.columns, alike)}
    chosen = best_first({a: min(far[a].values()) for a in row.columns})[:1]
    while len(chosen) < count:
        chosen += best_first({a: min(far[a][b] for b in chosen) for a in row.columns if a not in chosen})[:1]
    return row.whole(chosen)


def cdpruner(row: Row, count: int) -> dict[int, Tensor]:
    relevance = scaled([sum(line) / len(line) for line in cosines(row.embeds[row.columns], row.text)])
    alike = torch.tensor(cosines(row.embeds[row.columns], row.embeds[row.columns]), dtype=torch.float64)
    kernel = torch.tensor(relevance)[:, None] * alike * torch.tensor(relevance)
    chosen: list[int] = []
    while len(chosen) < count:  # by the determinants themselves
        gains = {
            n: float(torch.linalg.slogdet(kernel[[*chosen, n]][:, [*chosen, n]]).logabsdet)
            for n in range(len(row.columns))
            if n not in chosen
        }
        chosen.append(best_first(gains)[0])
    return row.whole(row.columns[n] for n in chosen)


def downsample(row: Row, count: int) -> dict[int, Tensor]:
    found, start, total = {}, 0, len(row.vision)
    for height, width in row.grids:
        end = start + height * width
        share = max(1, count * end // total - count * start // total)
        shapes = []
        for tall in range(
            1, height + 1
        ):  # the largest near the shape of the grid, of equal ones the nearest, the wider
            wide = min(width, share // tall)
            if wide and abs(tall - math.sqrt(share * height / width)) <= 1:
                stretched = max(tall * width, wide * height) / min(tall * width, wide * height)
                shapes.append((tall * wide, -stretched, wide, tall))
        columns, rows = max(shapes)[2:]
        grid = row.embeds[row.vision[start:end]].view(height, width, -1)
        fine = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)  # every token as many equal parts
        pooled = fine.unflatten(1, (columns, width)).unflatten(0, (rows, height)).mean((1, 3))
        for r in range(rows):
            for c in range(columns):
                middle = ((r + 0.5) * height / rows, (c + 0.5) * width / columns)
                token = min(
                    range(height * width),
                    key=lambda n: (
                        (n // width + 0.5 - middle[0]) ** 2 + (n % width + 0.5 - middle[1]) ** 2, n
                    ),
                )  # fmt: skip
                column = row.vision[start + token]
                if column in row.columns:
                    found[column] = pooled[r, c]
        start = end
    return found


RULES = {
    "vispruner": vispruner,
    "flashvlm": flashvlm,
    "visionzip": visionzip,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "downsample": downsample,
}
