"""PTX text as instructions: what the assembler would see of one kernel, with the line of Python each came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from formats import Unsupported

WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u16": 16, "u32": 32, "u64": 64, "s32": 32}
PLACE = re.compile(r"\.loc\b.*?//\s*(\S+?):(\d+):\d+")
LABEL = re.compile(r"^(\$?[A-Za-z_][\w$]*):\s*(.*)$")


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.b32 %r1, [%rd2+4];`` is opcode ld, modifiers (global, b32), two operands and a guard."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]  # without blanks; a vector is one operand
    guard: str = ""
    negated: bool = False
    place: str = ""  # in the Python source, "score_item.py:59"

    @property
    def kind(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.place})" if self.place else "")


@dataclass
class Program:
    """One kernel. ``labels`` point at instructions; ``tables`` are the targets of indexed branches."""

    name: str
    threads: int
    parameters: list[str]
    widths: dict[str, int] = field(default_factory=dict)  # bits of the registers, by name or by prefix
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    shared: str = ""  # the symbol of shared memory

    def width(self, register: str) -> int:
        found = self.widths.get(register) or self.widths.get(register.rstrip("0123456789"))
        if found is None:
            raise Unsupported(f"register {register} is not declared")
        return found


def parse(text: str) -> Program:
    """The one kernel of a PTX file."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if head is None:
        raise Unsupported("no kernel: .entry is missing")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(.*)", head.group(3))
    if threads is None or re.search(r"[2-9]|1\d", threads.group(2)):
        raise Unsupported(f"{head.group(1)}: a block of one dimension and known size is wanted")
    if ".explicitcluster" in head.group(3) or re.search(r"\.reqnctapercluster\s+([2-9]|1\d)", head.group(3)):
        raise Unsupported(f"{head.group(1)}: clusters of blocks are not emulated")
    names = [parameter.split()[-1] for parameter in head.group(2).split(",") if parameter.strip()]
    if any("[" in name for name in names):
        raise Unsupported(f"{head.group(1)}: parameters by value (tensor maps, TMA) are not emulated")
    program = Program(head.group(1), int(threads.group(1)), names)
    shared = re.search(r"\.extern\s+\.shared\s.*?([\w$]+)\[\]", text)
    program.shared = shared.group(1) if shared else ""
    _parse_body(program, text[head.end() :])
    return program


def _parse_body(program: Program, body: str) -> None:
    depth, statement, place, label = 1, "", "", ""
    for line in body.splitlines():
        found = PLACE.search(line)
        if found:
            place = f"{found.group(1)}:{found.group(2)}"
        line = line.split("//")[0].strip()
        if not line or line.startswith((".loc", ".file")):
            continue
        if not statement and (labelled := LABEL.match(line)):
            label, line = labelled.groups()
            program.labels[label] = len(program.instructions)
        depth += line.count("{") - line.count("}")
        statement += f" {line}"
        while ";" in statement:
            one, statement = statement.split(";", 1)
            _add_statement(program, one.strip().lstrip("{}").strip(), place, label)
        statement = statement.strip()
        if depth <= 0:
            return
        if statement in ("{", "}"):
            statement = ""


def _add_statement(program: Program, text: str, place: str, label: str) -> None:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            program.widths[name.strip().split("<")[0]] = WIDTHS[kind.lstrip(".")]
    elif text.startswith(".branchtargets"):
        program.tables[label] = [target.strip() for target in text.removeprefix(".branchtargets").split(",")]
        del program.labels[label]
    elif text.startswith(".pragma") or not text:
        pass
    elif text.startswith("."):
        raise Unsupported(f"{program.name}: directive `{text}` is not emulated")
    else:
        program.instructions.append(instruction(text, place))


def instruction(text: str, place: str = "") -> Instruction:
    text = " ".join(text.split())
    guard, negated, rest = "", False, text
    if found := re.match(r"@(!?)(%?[\w$]+)\s+(.*)", text):
        guard, negated, rest = found.group(2), found.group(1) == "!", found.group(3)
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(text, name, tuple(modifiers), tuple(_split(operands)), guard, negated, place)


def _split(operands: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth = [""], 0
    for letter in operands.replace(" ", ""):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part]


def elements(operand: str) -> list[str]:
    """The registers of a vector ``{%r1,%r2}``, or the one operand."""
    return operand.strip("{}").split(",")
