"""Reading a listing: which spilled values move inside loops."""

from nvit_kernels.aot import spills_in_loops

LISTING = """
        /*0de0*/                   STL [R1], R0 ;                  /* 0x0000000001007387 */
        /*1640*/                   FFMA R2, R3, R4, R2 ;           /* 0x0000000001007387 */
        /*1650*/              @!P0 BRA 0x1900 ;                    /* 0x0000000001007387 */
        /*1660*/                   LDL.LU R7, [R1+0x4] ;           /* 0x0000000001007387 */
        /*3a20*/               @P1 BRA 0x1640 ;                    /* 0x0000000001007387 */
        /*3a30*/                   LDL.LU R28, [R1] ;              /* 0x0000000001007387 */
        /*3a40*/                   EXIT ;                          /* 0x0000000001007387 */
        /*3a50*/                   BRA 0x3a50 ;                    /* 0x0000000001007387 */
"""


def test_only_what_lies_between_a_backward_branch_and_its_target_counts():
    assert spills_in_loops(LISTING) == 1
    assert spills_in_loops(LISTING.replace("LDL.LU R7", "MOV R7")) == 0
