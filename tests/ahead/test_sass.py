"""Instructions by loop, on a small kernel written by hand."""

import dataclasses

import pytest

from sngpt_jax.ahead import sass, trips

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


def counted(trips_of_outer: int) -> trips.Loop:
    """Ten programs, in which one of 20 trips takes the rare side, for 3 trips there."""
    search = trips.Loop("search", False, [], 10 * trips_of_outer, 65 * trips_of_outer)
    rare = trips.Loop("rare", False, [], 8, 24)
    outer = trips.Loop("outer", True, [search, rare], 10, 10 * trips_of_outer)
    return trips.Loop("small", True, [outer], 10, 10)


WORK = {"small": ("rest", ""), "outer": ("sums", "rest"), "search": ("selection", "sums")}


def test_trips_multiply_inwards() -> None:
    rows = trips.rows(sass.loops(KERNEL), counted(8), WORK)
    assert [(row.loop, row.depth, row.trips) for row in rows] == [
        ("small", 0, 1),
        ("outer", 1, 8),
        ("search", 2, 52),
        ("rare", 2, 2.4),
    ]
    assert [row.warp_instructions for row in rows] == [4, 56, 156, pytest.approx(0.8 * 2 + 2.4 * 2)]
    assert [row.barriers for row in rows] == [1, 0, 52, 0]
    assert [row.shares for row in rows] == [
        {"rest": 4},
        {"products": 8, "sums": 48},
        {"selection": 156},
        {"other": pytest.approx(6.4)},
    ]


def test_a_loop_that_the_compiler_unrolled() -> None:
    rows = trips.rows(sass.loops(KERNEL), counted(16), WORK)
    assert (rows[1].unrolled, rows[1].trips, rows[1].warp_instructions) == (2, 8, 56)
    with pytest.raises(RuntimeError, match="small: outer runs 12 times, and its machine code 8"):
        trips.rows(sass.loops(KERNEL), counted(12), WORK)


def test_other_loops_than_counted_are_refused() -> None:
    code = sass.loops(KERNEL)
    (outer,) = code.inside
    other = dataclasses.replace(code, inside=(dataclasses.replace(outer, inside=()),))
    with pytest.raises(RuntimeError, match="0 in outer, which has: search, rare"):
        trips.rows(other, counted(8), WORK)
