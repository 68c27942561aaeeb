"""The reading of machine code in `wgmma.py` sees what it is there for."""

import pytest

from tests.triton.wgmma import overwritten

GROUP = """
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR12], R24, gsb0 ;
"""
WAIT = "        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
LOOP = """
.L_x_1:
        /*0010*/                   LDS R44, [R8+UR7] ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR12], R24, gsb0 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
"""


def write(instruction):
    return f"        /*0040*/                   {instruction} ;\n"


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R40, R2",  # of the first product, whose group is still open
        "LDS.64 R46, [R8]",  # the last two of the second
        "LDS.128 R36, [R8]",  # no: R36 to R39 end below
        "@P0 IMAD.WIDE R42, R2, 0x4, R4",
        "LDSM.16.M88.4 R38, [R8]",
        "FADD R31, R2, R3",  # the result's last
    ],
)
def test_a_write_before_the_wait_is_seen(instruction):
    expected = 0 if "R36" in instruction else 1
    assert len(overwritten(GROUP + write(instruction) + WAIT)) == expected
    assert not overwritten(GROUP + WAIT + write(instruction))


@pytest.mark.parametrize("instruction", ["MOV R48, R40", "STS.128 [R8], R40", "ISETP.GE.AND P0, PT, R40, R2, PT"])
def test_reading_them_is_no_write(instruction):
    assert not overwritten(GROUP + write(instruction) + WAIT)


def test_a_loop_meets_what_its_last_turn_started():
    assert len(overwritten(LOOP.format(left="0x0"))) == 1
    safe = LOOP.format(left="0x0").replace("LDS R44", "LDS R48")
    assert not overwritten(safe)


def test_a_wait_may_leave_the_newest_group():
    both = GROUP + GROUP.replace("R40", "R80").replace("R44", "R84").replace("R24", "R64")
    some = both + WAIT.replace("0x0", "0x1")
    assert not overwritten(some + write("MOV R40, R2")) and overwritten(some + write("MOV R84, R2"))
