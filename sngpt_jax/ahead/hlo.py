"""The work of a compiled program, read from its optimized HLO: FLOPs, bytes, collectives, kernels.

The compiler's own analysis counts a loop's body once and does not know custom kernels. Here the
body counts as often as it runs. Every top-level instruction is one kernel that reads its operands
and writes its result, as if no cache held anything. A slice of an operand, or an update in one,
counts as the slice.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# Other types carry their width: f32, s8, f8e4m3fn.
_DTYPE_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "bf16": 16}
_NO_KERNEL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id",
    "replica-id", "after-all", "add-dependency", "opt-barrier",
}  # fmt: skip
_COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
}  # fmt: skip
_SUMS = {"reduce", "reduce-window", "scatter", "all-reduce", "reduce-scatter"}
_SLICES = {"dynamic-slice", "slice", "gather"}
PRODUCTS = "mlp_"  # begins the names of our kernels that are one matrix product each


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    type: str  # of its result: f32[8,16]{1,0}, or a tuple of types
    opcode: str
    operands: tuple[str, ...]  # names in the computation
    attributes: str  # the rest of the line
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the attributes; "" if they do not match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Kernel:
    """A top-level instruction that runs on the device."""

    name: str  # a custom kernel's own name, otherwise the instruction's
    opcode: str
    times: int  # in one run of the program
    flops: int  # per call, of matrix products and attention, two per multiply-add
    bytes: int  # per call; of a collective, the contribution of one device
    is_custom: bool
    scope: str = ""  # the names of its source code: jit(step)/optimizer/mul
    group: int = 0  # of a collective: the devices that exchange with each other; 0 for all

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time of all its calls: the longer of the times of their FLOPs and bytes."""
        return self.times * max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass
class Program:
    """One device's part of a program."""

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Kernel] = field(default_factory=list)
    narrow_sums: Counter[str] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        return sum(kernel.flops * kernel.times for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes * kernel.times for kernel in self.kernels)

    def custom_kernels(self) -> dict[str, int]:
        """The number of runs of each custom kernel, by name."""
        runs: Counter[str] = Counter()
        for kernel in self.kernels:
            if kernel.is_custom:
                runs[kernel.name] += kernel.times
        return dict(runs)

    def collective_counts(self) -> dict[str, tuple[int, int]]:
        """(calls, bytes in all) of each kind of collective."""
        counts: dict[str, tuple[int, int]] = {}
        for k in self.collectives:
            calls, size = counts.get(k.opcode, (0, 0))
            counts[k.opcode] = calls + k.times, size + k.times * k.bytes
        return counts

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time of all kernels one after the other."""
        return sum(kernel.seconds(flops_per_second, bytes_per_second) for kernel in self.kernels)


def size_of(type_text: str) -> int:
    """The bytes of a type in HLO's notation, or of a tuple of types."""
    bits = 0
    for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", type_text):
        if dtype not in _DTYPE_BITS:
            _DTYPE_BITS[dtype] = int(re.findall(r"[a-z](\d+)", dtype)[0])
        bits += _DTYPE_BITS[dtype] * math.prod(_dims(dims))
    return bits // 8


def _dims(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _shape(type_text: str) -> list[int]:
    match = re.search(r"\[([\d,]*)\]", type_text)
    return _dims(match[1]) if match else []


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


_SCOPE = r'op_name="([^"]*)"'
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{\s*(?:/\*.*)?$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = (.*)$")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an HLO module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _LINE.match(line):
            name, rest = match[2], match[3]
            end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            opened = rest.index("(", end)
            closed = _closing(rest, opened)
            operands = tuple(re.findall(r"%([\w.$-]+)", rest[opened:closed]))
            opcode, is_root = rest[end:opened].strip(), bool(match[1])
            current[name] = Instruction(
                name, rest[:end], opcode, operands, rest[closed + 1 :], is_root
            )
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return computations, entry


def analyse(text: str) -> Program:
    """The work of one run on one device; `text` is `compiled.as_text()`."""
    computations, entry = parse(text)
    program = Program(narrow_sums=narrow_sums(computations))
    _visit(computations, entry, 1, program)
    return program


def narrow_sums(computations: dict[str, Computation]) -> Counter[str]:
    """The sums whose terms and results are bfloat16, such as `reduce bf16[512] …/block_1/mul`.

    A GPU adds them in bfloat16, where 256 + 1 is 256. Products add in float32 whatever their type.
    """
    found: Counter[str] = Counter()
    for computation in computations.values():
        for x in computation.values():
            kind = x.opcode.removesuffix("-start")
            if kind not in _SUMS or "bf16[" not in x.type:
                continue
            roots = (
                i.opcode
                for c in _called(x, "to_apply")
                for i in computations[c].values()
                if i.is_root
            )
            if "add" in roots:
                found[f"{kind} {x.type.partition('{')[0]} {x.attribute(_SCOPE)}"] += 1
    return found


def _called(instruction: Instruction, *names: str) -> list[str]:
    """The computations that an instruction's attributes name, in order."""
    found: list[str] = []
    for name in names:
        found += re.findall(rf"\b{name}=%?([\w.$-]+)", instruction.attributes)
    branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    return found + re.findall(r"%([\w.$-]+)", branches)


def _visit(computations: dict[str, Computation], name: str, times: int, program: Program) -> None:
    for instruction in computations[name].values():
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode in _NO_KERNEL or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "while":
            trips = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
            for body in _called(instruction, "body"):
                _visit(computations, body, times * int(trips or 1), program)
        elif opcode == "conditional":  # the branch with the most work counts
            parts = []
            for branch in _called(instruction, "true_computation", "false_computation"):
                parts.append(Program())
                _visit(computations, branch, times, parts[-1])
            most = max(parts, key=lambda part: (part.flops, part.bytes))
            program.kernels += most.kernels
            program.collectives += most.collectives
        elif opcode in ("call", "async-start"):
            for callee in _called(instruction, "to_apply", "calls"):
                _visit(computations, callee, times, program)
        elif kind in _COLLECTIVES:
            size = sum(size_of(computations[name][o].type) for o in instruction.operands)
            where = instruction.attribute(_SCOPE), _group(instruction.attributes)
            program.collectives.append(
                Kernel(instruction.name, kind, times, 0, size, False, *where)
            )
        else:
            program.kernels.append(_kernel(computations, computations[name], instruction, times))


def _kernel(
    computations: dict[str, Computation], inside: Computation, instruction: Instruction, times: int
) -> Kernel:
    opcode, name = instruction.opcode, instruction.name
    is_custom = opcode == "custom-call"
    if opcode == "fusion":
        (fused,) = _called(instruction, "calls")
        flops, size = _flops(computations, fused), _fused_bytes(computations[fused])
    else:
        flops, size = 0, _instruction_bytes(inside, instruction)
        if opcode == "dot":
            flops = _dot_flops(inside, instruction)
        elif is_custom:
            name, flops = custom_name(instruction), _attention_flops(inside, instruction)
            if name.startswith(PRODUCTS):
                flops = _product_flops(inside, instruction)
    return Kernel(name, opcode, times, flops, size, is_custom, instruction.attribute(_SCOPE))


def _group(attributes: str) -> int:
    """The devices per group of a collective; 0 for one group of all. HLO has three notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):  # {{0,1},{2,3}}
        return len(_dims(listed[1]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [groups,devices]<=[all]
        return int(counted[1])
    # mesh['x'=2,'y'=4] {'x','y':(1)2}
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 0


def custom_name(instruction: Instruction) -> str:
    """The kernel of a custom call: the name of a Triton kernel, else of the call's target."""
    named = instruction.attribute(r'\bname = \\?"([^"\\]+)')
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    return named or target.lstrip("_$") or instruction.name


def _dot_flops(inside: Computation, dot: Instruction) -> int:
    contracting = _dims(dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    lhs = _shape(inside[dot.operands[0]].type)
    return 2 * math.prod(_shape(dot.type)) * math.prod(lhs[axis] for axis in contracting)


def _flops(computations: dict[str, Computation], name: str) -> int:
    """The FLOPs of the products in a fused computation."""
    total = 0
    for instruction in computations[name].values():
        if instruction.opcode == "dot":
            total += _dot_flops(computations[name], instruction)
        elif instruction.opcode == "fusion":
            total += sum(_flops(computations, callee) for callee in _called(instruction, "calls"))
    return total


def _product_flops(inside: Computation, call: Instruction) -> int:
    """The FLOPs of a kernel whose first result [M, N] is its operand [M, K] times a matrix."""
    return 2 * math.prod(_shape(call.type)[:2]) * _shape(inside[call.operands[0]].type)[-1]


def _attention_flops(inside: Computation, call: Instruction) -> int:
    """The FLOPs of cuDNN's fused attention: two products forward or five backward.

    Causal attention counts half of each product.
    """
    if "fmhaSoftmax" not in call.attributes:
        return 0
    scores = call.attribute(r'"intermediate_tensor_shape":\s*\{[^[]*"dimensions":\s*\[([^\]]*)\]')
    sizes = map(int, re.findall(r"\d+", scores))
    products = 5 if "Backward" in call.attributes else 2
    share = 2 if re.search(r'"mask_type":\s*"CAUSAL"', call.attributes) else 1
    return products * 2 * math.prod(sizes) * _shape(inside[call.operands[0]].type)[-1] // share


def _instruction_bytes(inside: Computation, instruction: Instruction) -> int:
    result = size_of(instruction.type)
    if instruction.opcode in _SLICES:
        return 2 * result
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size_of(inside[instruction.operands[1]].type)
    return result + sum(size_of(inside[operand].type) for operand in instruction.operands)


def _users(computation: Computation, name: str) -> Iterator[Instruction]:
    """The instructions that use `name`, directly or through bitcasts."""
    for instruction in computation.values():
        if name in instruction.operands:
            if instruction.opcode == "bitcast" and not instruction.is_root:
                yield from _users(computation, instruction.name)
            else:
                yield instruction


def _behind(computation: Computation, name: str) -> Instruction:
    """The instruction behind `name` and its bitcasts."""
    instruction = computation[name]
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    return instruction


def _fused_bytes(fused: Computation) -> int:
    root = next(i for i in fused.values() if i.is_root)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    total, updated = 0, set()
    for result in (_behind(fused, name) for name in names):
        if result.opcode == "dynamic-update-slice":  # in place
            updated.add(_behind(fused, result.operands[0]).name)
            result = fused[result.operands[1]]
        total += size_of(result.type)
    for parameter in fused.values():
        if parameter.opcode != "parameter" or parameter.name in updated:
            continue
        users = list(_users(fused, parameter.name))
        size = size_of(parameter.type)
        if users and all(user.opcode in _SLICES for user in users):
            size = min(size, sum(size_of(user.type) for user in users))
        total += size
    return total
