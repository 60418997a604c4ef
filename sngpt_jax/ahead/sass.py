"""The instructions that a kernel issues, counted by loop in its machine code (SASS).

The text is that of `nvdisasm -c` (PyPI: nvidia-cuda-nvdisasm). The loops are the natural loops of
the graph of its branches. Both sides of a forward branch count, so a count is an upper limit. The
code that leads to a loop alone, such as one side of a condition, counts as often as the loop is
entered. A branch for threads that have diverged (BRA.DIV) counts as never taken.
"""

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sngpt_jax.ahead.targets import INSTALL, MissingToolchain

_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_BARRIER = re.compile(r"(BAR\.(SYNC|RED|ARV)|UCGABAR_WAIT)\b")
_PRODUCT = re.compile(r"[HIDQO]G?MMA\b|UTC\w*MMA\b")  # by tensor cores


@dataclass(frozen=True)
class Part:
    """Straight-line code."""

    instructions: int
    barriers: int
    products: int  # instructions up to the last one on tensor cores


@dataclass(frozen=True)
class Loop:
    """A loop, or the whole code of a kernel."""

    trips: int | None  # per entry, where the code compares a counter with a constant
    arm: Part  # the code that only leads to the loop, per entry
    parts: tuple[Part, ...]  # per trip, before each loop inside and after the last
    inside: tuple["Loop", ...]  # in the order of the code


@dataclass(frozen=True)
class _Instruction:
    guard: str  # its predicate, or empty
    name: str
    operands: str

    @property
    def fields(self) -> list[str]:
        """The operands, of which the first is mostly the result."""
        return [field.strip().removesuffix(".reuse") for field in self.operands.split(",")]


def find_nvdisasm() -> str:
    """The path of the disassembler among Python's packages, else of the machine's.

    Raises MissingToolchain if there is none.
    """
    nvidia = importlib.util.find_spec("nvidia")
    roots = (nvidia and nvidia.submodule_search_locations) or ()
    beside = [str(path) for root in roots for path in sorted(Path(root).glob("*/bin/nvdisasm"))]
    found = beside[0] if beside else shutil.which("nvdisasm")
    if found is None:
        raise MissingToolchain(f"counting instructions by loop needs nvdisasm; run: {INSTALL}")
    return found


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, Loop]:
    """The code of each kernel of a CUDA binary, by name."""
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip().splitlines()[0]}")
    sections = re.split(r"^//-+ \.text\.([\w$]+) +-+$", done.stdout, flags=re.M)
    return {name: loops(text) for name, text in zip(sections[1::2], sections[2::2], strict=True)}


def _parse(text: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and the labels' places among them."""
    labels: dict[str, int] = {}
    code: list[_Instruction] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append(_Instruction(found[2] or "", found[3], found[4]))
    return code, labels


def _successors(code: list[_Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Where the control may go after each instruction."""
    result = []
    meeting: dict[str, int] = {}  # where threads go on after they have met at a barrier register
    for place, instruction in enumerate(code):
        kind, operands = instruction.name.split(".")[0], instruction.operands
        if kind in ("BRX", "JMX"):
            raise RuntimeError(f"{instruction.name} has no target in its text")
        target = _TARGET.search(operands)
        following = [place + 1] if place + 1 < len(code) else []
        if kind == "BSSY" and target:
            meeting[operands.split(",")[0]] = labels[target[1]]
        elif kind == "BSYNC" and not instruction.guard:
            following = [meeting.get(operands, place + 1)]
        elif kind in ("EXIT", "RET") and not instruction.guard:
            following = []
        elif kind == "BRA" and target and ".DIV" not in instruction.name:
            conditional = instruction.guard or operands.split(",")[0].strip() != target[0]
            following = [*(following if conditional else []), labels[target[1]]]
        result.append(following)
    return result


def _blocks(following: list[list[int]]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks that the kernel's entry reaches, and the blocks after each."""
    heads = {0}
    for place, targets in enumerate(following):
        if targets != [place + 1]:
            heads |= {place + 1, *targets}
    starts = sorted(head for head in heads if head < len(following))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(following)], strict=True)]
    numbers = {block.start: number for number, block in enumerate(blocks)}
    after = [[numbers[target] for target in following[block[-1]]] for block in blocks]
    reached, waiting = {0}, [0]
    while waiting:
        new = set(after[waiting.pop()]) - reached
        reached |= new
        waiting += new
    kept = sorted(reached)
    renumbered = {number: i for i, number in enumerate(kept)}
    return [blocks[i] for i in kept], [[renumbered[j] for j in after[i]] for i in kept]


def _dominators(after: list[list[int]]) -> list[set[int]]:
    """The blocks that every way from the entry to a block passes, itself among them."""
    before: list[list[int]] = [[] for _ in after]
    for block, targets in enumerate(after):
        for target in targets:
            before[target].append(block)
    found = [{0}] + [set(range(len(after))) for _ in after[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(after)):
            new = set.intersection(*(found[b] for b in before[block])) | {block}
            changed |= new != found[block]
            found[block] = new
    return found


def _natural_loops(after: list[list[int]], dominators: list[set[int]]) -> dict[int, set[int]]:
    """The blocks of each loop by its head."""
    before: dict[int, set[int]] = {}
    for block, targets in enumerate(after):
        for target in targets:
            before.setdefault(target, set()).add(block)
    found: dict[int, set[int]] = {}
    for block, targets in enumerate(after):
        for head in set(targets) & dominators[block]:
            body, waiting = found.setdefault(head, {head}), [block]
            while waiting:
                inner = waiting.pop()
                if inner not in body:
                    body.add(inner)
                    waiting += before[inner]
    return found


def _part(code: Iterable[_Instruction]) -> Part:
    names = [instruction.name for instruction in code]
    products = [i for i, name in enumerate(names, 1) if _PRODUCT.match(name)]
    barriers = sum(bool(_BARRIER.match(name)) for name in names)
    return Part(len(names), barriers, products[-1] if products else 0)


def loops(text: str) -> Loop:
    """The code of one kernel with its loops."""
    code, labels = _parse(text)
    blocks, after = _blocks(_successors(code, labels))
    dominators = _dominators(after)
    bodies = _natural_loops(after, dominators)

    def part(chosen: set[int]) -> Part:
        return _part(code[i] for b in sorted(chosen) for i in blocks[b])

    def build(head: int | None, body: set[int], arm: set[int]) -> Loop:
        inner = {h: b for h, b in bodies.items() if h != head and b <= body}
        outermost = sorted(h for h, b in inner.items() if not any(b < o for o in inner.values()))
        ends = [b for b in body if not after[b] or head in after[b]]
        if not ends:  # the code ends inside a loop, whose way out is an EXIT with a predicate
            ends = [b for b in body if any(code[i].name == "EXIT" for i in blocks[b])]
        always = set.intersection(*(dominators[b] for b in ends))  # in every trip
        own = body.difference(*(inner[h] for h in outermost))
        children = []
        for h in outermost:
            to_loop = sorted((dominators[h] & body) - always, key=lambda b: len(dominators[b]))
            alone = {b for b in own if to_loop and to_loop[0] in dominators[b]}
            own -= alone
            children.append(build(h, inner[h], alone))
        bounds = [-1, *outermost, len(blocks)]
        parts = [
            part({b for b in own if low < b < high}) for low, high in itertools.pairwise(bounds)
        ]
        trips = None
        if head is not None and len(ends) == 1:
            inside = [i for b in sorted(body) for i in blocks[b]]
            trips = _trips(code, inside, blocks[head].start, blocks[ends[0]][-1])
        return Loop(trips, part(arm), tuple(parts), tuple(children))

    return build(None, set(range(len(blocks))), set())


def _constant(text: str) -> int | None:
    """The number that an operand is, if it is one."""
    if text in ("RZ", "URZ", "SRZ"):
        return 0
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text) else None


def _trips(code: list[_Instruction], body: list[int], head: int, last: int) -> int | None:
    """(bound - start) / step of the counter that decides whether the loop goes on.

    The counter is read where a constant is added to it once per trip, where the trip ends by its
    comparison with a constant, and where the last instruction before the loop that writes it
    writes a constant.
    """
    fields = [instruction.fields for instruction in code]
    predicate, at = code[last].guard.lstrip("!"), last
    while not re.match(r"U?ISETP\.(NE|GE|LT)\b", code[at].name):
        before = [i for i in body if i < at and fields[i][:1] == [predicate]]
        if not before or not re.match(r"BRA|PLOP3", code[at].name):
            return None
        at = before[-1]
        if code[at].name.startswith("PLOP3"):  # a copy of the predicate of a whole warp
            predicate = next((f for f in fields[at][1:] if re.fullmatch(r"UP\d", f)), "")
    _, _, counter, bound, *_ = fields[at]
    adds = [i for i in body if fields[i][:1] == [counter]]
    end = _constant(bound)
    if len(adds) != 1 or end is None or "ADD" not in code[adds[0]].name:
        return None
    terms = [field for field in fields[adds[0]][1:] if not re.fullmatch(r"!?U?P[\dT]", field)]
    steps = [step for step in map(_constant, terms) if step]
    pair = re.sub(r"\d+", lambda number: str(int(number[0]) & ~1), counter)
    starts = [
        i
        for i in range(head)
        if fields[i][:1] == [counter] or (fields[i][:1] == [pair] and code[i].name == "CS2R")
    ]
    if counter not in terms or len(steps) != 1 or not starts:
        return None
    values = [_constant(field) for field in fields[starts[-1]][1:]]
    if not re.fullmatch(r"U?MOV|CS2R|IMAD\.MOV\.U32", code[starts[-1]].name) or None in values:
        return None
    (step,) = (step - 2**32 * (step >= 2**31) for step in steps)
    span = end - (values[-1] or 0)
    trips, rest = divmod((span if step > 0 else -span) % 2**32, abs(step))
    return trips if trips and not rest else None
