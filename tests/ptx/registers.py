"""Registers of a block as rows of numpy arrays, one column a thread: where an operand of an instruction is found.

Every operand becomes a number in one list of arrays, `views`: a register read as a type, half of a register, a
constant. Instructions then need no names at run time.
"""

from __future__ import annotations

import re

import numpy as np
from formats import TYPES, Array, Unsupported, bits_of
from program import Program

POISON = 0xFF  # a register that was never written
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
SINK = "_"
View = tuple[str, np.dtype, int, int]  # register, type, which part of how many


class Layout:
    """Gives out the numbers of operands while a program is translated."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rows: dict[int, dict[str, int]] = {1: {}, 16: {}, 32: {}, 64: {}}  # of registers, by their width
        self.views: dict[View, int] = {}
        self.constants: dict[int, tuple[str, int | float]] = {}

    def read(self, operand: str, kind: str, part: int = 0, parts: int = 1) -> int:
        """The view of an operand as ``kind``; of a register in ``parts``, the one that starts at bit part/parts."""
        if self._is_register(operand):
            return self._view(operand, TYPES[kind], part, parts)
        number = len(self.views)
        self.views[f"constant {number}", TYPES[kind], 0, 1] = number
        self.constants[number] = kind, self._constant(operand)
        return number

    def write(self, operand: str, kind: str, part: int = 0, parts: int = 1) -> int:
        """Like `read`, for a result: one that is narrower than its register is extended to all of it."""
        dtype = TYPES[kind]
        if operand != SINK and parts == 1 and dtype != np.bool_ and 8 * dtype.itemsize < self.program.width(operand):
            dtype = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{self.program.width(operand) // 8}")
        return self._view(operand, dtype, part, parts)

    def row(self, operand: str) -> int:
        """The row of a 32-bit register in the bank of those."""
        if not operand.startswith("%") or self.program.width(operand) != 32:
            raise Unsupported(f"{operand}: a register of 32 bits is wanted")
        return self.rows[32].setdefault(operand, len(self.rows[32]))

    def address(self, operand: str) -> tuple[int | None, int]:
        """View and offset of ``[%rd1+16]``; no view where the base is the start of shared memory."""
        base, _, offset = operand.strip("[]").partition("+")
        if base == self.program.shared:
            return None, int(offset or "0", 0)
        return self.read(base, "u64" if self.program.width(base) == 64 else "u32"), int(offset or "0", 0)

    def special_views(self) -> list[tuple[int, str, np.dtype]]:
        """Views of registers that say where a thread is."""
        named = ((number, *view[:2]) for view, number in self.views.items())
        return [(number, name, dtype) for number, name, dtype in named if SPECIAL.fullmatch(name)]

    def _is_register(self, operand: str) -> bool:
        return operand.startswith("%") or operand in self.program.widths

    def _constant(self, operand: str) -> int | float:
        if operand == self.program.shared:
            return 0
        if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8,16})", operand):
            return int(found.group(1), 16)
        try:
            return int(operand.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {operand} is not understood") from None

    def _view(self, register: str, dtype: np.dtype, part: int, parts: int) -> int:
        if register != SINK and not SPECIAL.fullmatch(register):
            width = self.program.width(register)
            self.rows[width].setdefault(register, len(self.rows[width]))
        return self.views.setdefault((register, dtype, part, parts), len(self.views))

    def plan(self) -> list[tuple[int, int, np.dtype, int, int]]:
        """Of each view: width and row of its register, its type, start and step. Width 0: there is no register."""
        found = []
        for register, dtype, part, parts in self.views:
            if register == SINK or register.startswith("constant ") or SPECIAL.fullmatch(register):
                found.append((0, 0, dtype, 0, 1))
                continue
            width = self.program.width(register)
            steps = max(width // 8, 1) // dtype.itemsize  # more than one where only a part of each register is meant
            found.append((width, self.rows[width][register], dtype, part * steps // parts, steps))
        return found

    def constant_arrays(self) -> dict[int, Array]:
        threads = self.program.threads
        return {number: np.full(threads, bits_of(value, kind)) for number, (kind, value) in self.constants.items()}


class File:
    """The registers of one block. ``fixed``: arrays of what no instruction changes, by view."""

    def __init__(
        self, layout: Layout, plan: list[tuple[int, int, np.dtype, int, int]], fixed: dict[int, Array]
    ) -> None:
        threads = layout.program.threads
        banks = {
            width: np.full((max(len(rows), 1), threads * max(width // 8, 1)), POISON, np.uint8)
            for width, rows in layout.rows.items()
        }
        banks[1][:] = 0
        self.words = banks[32].view(np.uint32)
        rows: dict[tuple[int, np.dtype], list[Array]] = {}
        self.views: list[Array] = []
        for number, (width, row, dtype, start, step) in enumerate(plan):
            if width == 0:
                self.views.append(fixed[number] if number in fixed else np.empty(threads, dtype))
                continue
            typed = rows.get((width, dtype))
            if typed is None:
                typed = rows[width, dtype] = list(banks[width].view(dtype))
            self.views.append(typed[row] if step == 1 else typed[row][start::step])
