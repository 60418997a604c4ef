"""Instructions by loop, on a small kernel written by hand and on an interpreted one."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from sngpt_jax import plan
from sngpt_jax.ahead import by_loop, sass, targets, trips
from sngpt_jax.base.errors import UserError

# A loop of 8 trips around a loop without a known count and around a condition, one side of which
# holds a loop and lies behind the end. Warps that diverge would go to .L_x_9.
KERNEL = """
.text.small:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, 0x8 ;
.L_x_0:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R6, RZ ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_9) ;
.L_x_1:
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   ISETP.GE.AND P1, PT, R4, R3, PT ;
        /*0070*/             @!P1  BRA `(.L_x_1) ;
        /*0080*/               @P3 BRA P4, `(.L_x_5) ;
.L_x_2:
        /*0090*/                   VIADD R2, R2, 0x3 ;
        /*00a0*/                   ISETP.NE.U32.AND P2, PT, R2.reuse, 0x20, PT ;
        /*00b0*/              @P2  BRA `(.L_x_0) ;
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   FADD R4, R4, R5 ;
.L_x_6:
        /*00f0*/                   FADD R4, R4, R5 ;
        /*0100*/               @P5 BRA `(.L_x_6) ;
        /*0110*/                   BRA `(.L_x_2) ;
.L_x_9:
        /*0120*/                   WARPSYNC.COLLECTIVE R9, `(.L_x_8) ;
.L_x_8:
        /*0130*/                   BRA `(.L_x_1) ;
.L_x_10:
        /*0140*/                   BRA `(.L_x_10);
        /*0150*/                   NOP;
"""


def test_loops_nest_and_what_is_never_reached_does_not_count() -> None:
    code = sass.loops(KERNEL)
    assert code.parts == (sass.Part(2, 0, 0), sass.Part(2, 1, 0)) and code.trips is None
    (outer,) = code.inside
    assert outer.trips == 8  # (0x20 - 8) / 3
    assert outer.parts == (sass.Part(3, 0, 1), sass.Part(4, 0, 0), sass.Part(0, 0, 0))
    search, rare = outer.inside
    assert search == sass.Loop(None, sass.Part(0, 0, 0), (sass.Part(3, 1, 0),), ())
    assert rare == sass.Loop(None, sass.Part(2, 0, 0), (sass.Part(2, 0, 0),), ())


def test_a_kernel_may_end_inside_its_loop() -> None:
    """Its way out is an EXIT with a predicate, and all instructions count."""
    code = sass.loops("""
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R4, R4, R5 ;
        /*0020*/              @!P0 EXIT ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   BRA `(.L_x_0) ;
""")
    (loop,) = code.inside
    assert code.parts == (sass.Part(1, 0, 0), sass.Part(0, 0, 0))
    assert loop.parts == (sass.Part(4, 0, 0),)


def counted(trips_of_outer: int) -> trips.Loop:
    """Ten programs, in which one of 20 trips takes the rare side, for 3 trips there."""
    search = trips.Loop("search", False, [], 10 * trips_of_outer, 65 * trips_of_outer)
    rare = trips.Loop("rare", False, [], 8, 24)
    outer = trips.Loop("outer", True, [search, rare], 10, 10 * trips_of_outer)
    return trips.Loop("small", True, [outer], 10, 10)


WORK = {"small": ("rest", ""), "outer": ("sums", "rest"), "search": ("selection", "sums")}


def test_trips_multiply_inwards() -> None:
    """A program of four warps does two tokens."""
    rows = by_loop.rows(sass.loops(KERNEL), counted(8), WORK, 1 / 2, 4)
    assert [(row.loop, row.depth) for row in rows] == [
        ("small", 0),
        ("outer", 1),
        ("search", 2),
        ("rare", 2),
    ]
    assert [row.trips for row in rows] == pytest.approx([0.5, 4, 26, 1.2])
    assert [row.barriers for row in rows] == [0.5, 0, 26, 0]
    rare = pytest.approx(4 * (0.4 * 2 + 1.2 * 2))
    assert [row.warp_instructions for row in rows] == [4 * 2, 4 * 28, 4 * 78, rare]
    assert [row.shares for row in rows] == [
        {"rest": 8},
        {"products": 16, "sums": 96},
        {"selection": 312},
        {"other": rare},
    ]
    kernel = {"name": "small", "by_loop": [dataclasses.asdict(row) for row in rows]}
    print(*by_loop.format_rows(kernel), sep="\n")
    program = {"target": "h100", "pass": "forward_backward", "kernels": [kernel]}
    kinds = "selection 70%, sums 22%, products 4%, other 3%, rest 2%"
    table = by_loop.format_totals([{"case": "toy", "programs": [program]}])
    assert table.splitlines()[2:] == [f"| toy | h100 | `small` | 445 | 26 | {kinds} |"]


def test_a_loop_that_the_compiler_unrolled() -> None:
    rows = by_loop.rows(sass.loops(KERNEL), counted(16), WORK, 0.5, 4)
    assert (rows[1].unrolled, rows[1].trips, rows[1].warp_instructions) == (2, 4, 112)
    with pytest.raises(RuntimeError, match="small: outer runs 12 times, and its machine code 8"):
        by_loop.rows(sass.loops(KERNEL), counted(12), WORK, 0.5, 4)


def test_a_loop_that_the_compiler_unrolled_completely() -> None:
    gone = trips.Loop("gone", True, [], 80, 160)
    whole = counted(8)
    whole.inside[0].inside.insert(1, gone)
    code = sass.loops(KERNEL)
    assert by_loop.rows(code, whole, WORK, 1, 4) == by_loop.rows(code, counted(8), WORK, 1, 4)


def test_other_loops_than_counted_are_refused() -> None:
    code = sass.loops(KERNEL)
    (outer,) = code.inside
    other = dataclasses.replace(code, inside=(dataclasses.replace(outer, inside=()),))
    with pytest.raises(RuntimeError, match="0 in outer, which has: search, rare"):
        by_loop.rows(other, counted(8), WORK, 0.5, 4)


COUNTER = """
        /*0000*/                   {start} ;
        /*0010*/                   MOV R9, 0x5 ;
.L_x_0:
        /*0020*/                   {step} ;
        /*0030*/                   {compare} ;
        /*0040*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*0050*/               @{guard} BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("start", "step", "compare", "guard", "found"),
    [
        (
            "CS2R R2, SRZ",
            "IADD3 R3, P2, R3, 0x2000, RZ",
            "ISETP.NE.AND P1, PT, R3, 0x10000, PT",
            "P1",
            8,
        ),
        (
            "UMOV UR4, URZ",
            "UIADD3 UR4, UR4, 0x1, URZ",
            "UISETP.NE.U32.AND UP0, UPT, UR4, 0x30, UPT",
            "P0",
            48,
        ),
        ("MOV R2, 0xfffffff0", "VIADD R2, R2, 0x4", "ISETP.GE.AND P1, PT, R2, 0x10, PT", "!P1", 8),
        ("MOV R2, 0x6", "VIADD R2, R2, 0xffffffff", "ISETP.NE.AND P1, PT, R2, RZ, PT", "P1", 6),
        ("MOV R2, RZ", "VIADD R2, R2, 0x3", "ISETP.NE.AND P1, PT, R2, 0x10, PT", "P1", None),
        ("MOV R2, R7", "VIADD R2, R2, 0x1", "ISETP.NE.AND P1, PT, R2, 0x10, PT", "P1", None),
        ("MOV R2, RZ", "VIADD R2, R2, 0x1", "ISETP.NE.AND P1, PT, R2, R9, PT", "P1", None),
        ("MOV R2, RZ", "VIADD R2, R2, 0x1", "FSETP.GE.AND P1, PT, R2, 0x10, PT", "P1", None),
    ],
)
def test_trips_that_the_code_states(
    start: str, step: str, compare: str, guard: str, found: int | None
) -> None:
    text = COUNTER.format(start=start, step=step, compare=compare, guard=guard)
    assert sass.loops(text).inside[0].trips == found


def kernel(x_ref, y_ref):
    def add(i, total):
        return total + x_ref[i]

    def shrink(total):
        return lax.cond(total > 100, lambda: total / 100, lambda: total / 2)

    def row(i, _):
        total = lax.fori_loop(0, 4, add, jnp.float32(0))
        y_ref[i] = lax.while_loop(lambda total: total > 1, shrink, total)

    lax.fori_loop(0, jnp.minimum(pl.program_id(0) + 1, 2), row, None)


def test_loops_count_while_they_are_interpreted() -> None:
    """Two programs do 1 and 2 rows. A sum of 12 is halved four times."""
    with trips.counting() as found:
        y = pl.pallas_call(
            kernel, jax.ShapeDtypeStruct((2,), jnp.float32), grid=(2,), name="k", interpret=True
        )(jnp.full(4, 3.0))
        assert jnp.all(y == 0.75)
    add, shrink = trips.Loop("add", True, [], 3, 12), trips.Loop("shrink", False, [], 3, 12)
    row = trips.Loop("row", False, [add, shrink], 2, 3)
    assert found == {"k": trips.Loop("k", True, [row], 2, 2)}


def test_without_the_disassembler_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets, "prepare", lambda: None)
    monkeypatch.setattr("sngpt_jax.ahead.ptx.find_ptxas", lambda: "ptxas")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError) as caught:
        plan.main(["--kernels", "cayley", "--sass", "--json"])
    needs = "counting instructions by loop needs nvdisasm"
    assert str(caught.value) == f"{needs}; run: {targets.INSTALL}"
