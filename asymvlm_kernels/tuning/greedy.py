"""Tile sizes of the greedy choices. One program takes a sample, so more warps are all there is to speed one up."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class FarthestConfig:
    """The distances of a sample are held in registers, ``block_n`` of them."""

    block_n: int
    num_warps: int


@dataclass(frozen=True)
class DppConfig:
    """Columns of the factor are taken ``block_n`` at a time.

    ``registers``: most of a thread, all there are: where ptxas chooses, it aims lower and spills.
    """

    block_n: int
    num_warps: int
    registers: int


@dataclass(frozen=True)
class DropConfig:
    """``block_e`` tokens at even places beside ``block_o`` at odd ones; lists are read ``block_m`` places at a time.

    ``registers``: as in `DppConfig`.
    """

    block_e: int
    block_o: int
    block_m: int
    num_warps: int
    registers: int


LONGEST = 8192  # tokens whose distances fit the registers of a program: twice as many spill; their matrix is 256 MiB


@functools.cache
def farthest_config(N: int) -> FarthestConfig:
    block_n = max(_power_of_two(N), 128)
    return FarthestConfig(block_n, num_warps=min(max(block_n // 256, 4), 16))


@functools.cache
def dpp_config(N: int) -> DppConfig:
    # four lanes of sums and four rows on their way for each column: 8 columns a thread are 64 registers
    block_n = min(max(_power_of_two(N), 128), 4096)
    num_warps = max(block_n // 256, 4)
    return DppConfig(block_n, num_warps, registers=min(65536 // (32 * num_warps), 255))


@functools.cache
def drop_config(M: int) -> DropConfig:
    # rows of 8 tokens stay in the L1 of a processor, whose sectors a list in ranked order meets again and again
    block_m = min(max(_power_of_two(M), 128), 1024)
    num_warps = block_m // 64 if block_m > 256 else 4
    return DropConfig(8, block_m // 2, block_m, num_warps, registers=min(65536 // (32 * num_warps) - 1, 255))


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
