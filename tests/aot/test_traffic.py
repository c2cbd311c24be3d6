"""What programs move to and from memory, counted in their text as libtpu 0.0.42 prints it."""

import pytest

from maestro_jax.aot.traffic import moved

# 64 x 256 in fp32 are 65,536 bytes, a row of it 1,024, or 8,192 as a tile of its own.
FUSED = """\
%cut (p: f32[64,256], i: s32[]) -> f32[8,256] {
  %p = f32[64,256]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[8,256]{1,0:T(8,128)} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={8,256}
}

%change (p: f32[64,256], u: f32[8,256], i: s32[]) -> f32[64,256] {
  %p = f32[64,256]{1,0:T(8,128)} parameter(0)
  %u = f32[8,256]{1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[64,256]{1,0:T(8,128)} dynamic-update-slice(%p, %u, %i, %z)
}

%rename (p: f32[64,256]) -> f32[16384] {
  %p = f32[64,256]{1,0:T(8,128)} parameter(0)
  ROOT %b = f32[16384]{0:T(1024)} bitcast(%p)
}

%whole (p: f32[64,256]) -> f32[16384] {
  %p = f32[64,256]{1,0:T(8,128)} parameter(0)
  %r = f32[16384]{0:T(1024)} fusion(%p), kind=kLoop, calls=%rename
  ROOT %n = f32[16384]{0:T(1024)} negate(%r)
}
"""


def program(*lines: str, also: str = "") -> str:
    """The text of a module whose entry runs these operations on `%x`, `%u` and `%i`."""
    entry = [
        "ENTRY %main (x: f32[64,256], u: f32[8,256], i: s32[]) -> f32[64,256] {",
        "  %x = f32[64,256]{1,0:T(8,128)} parameter(0)",
        "  %u = f32[8,256]{1,0:T(8,128)} parameter(1)",
        "  %i = s32[]{:T(128)S(6)} parameter(2)",
        *[f"  {line}" for line in lines],
        "}",
    ]
    return f"HloModule m\n\n{FUSED}\n{also}\n" + "\n".join(entry) + "\n"


X, ROWS = 65_536, 8_192
OPERATIONS = {
    "a copy": ("%c = f32[64,256]{1,0:T(8,128)} copy(%x)", 2 * X),
    "one into a core": ("%c = f32[64,256]{1,0:T(8,128)S(1)} copy(%x)", X),
    "one that is started": (
        "%c = (f32[64,256]{1,0:T(8,128)S(1)}, f32[64,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)",
        X,
    ),
    "a part that is fetched": (
        "%c = ((f32[64,256]{1,0:T(8,128)}), f32[8,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%x), slice={[0:8], [0:256]}",
        ROWS,
    ),
    "a name": ("%c = f32[16384]{0:T(1024)} bitcast(%x)", 0),
    "padding": ("%c = f32[3,256]{1,0:T(8,128)} slice(%x), slice={[0:3], [0:256]}", 2 * ROWS),
    "a transpose": ("%c = f32[2,9]{0,1:T(8,128)S(1)} copy(%x), metadata={}", X),
    "a fusion that cuts": ("%c = f32[8,256]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%cut", 2 * ROWS),
    "one that changes": ("%c = f32[64,256]{1,0:T(8,128)} fusion(%x, %u, %i), kind=kLoop, calls=%change", 2 * ROWS),
    "one that takes all": ("%c = f32[16384]{0:T(1024)} fusion(%x), kind=kLoop, calls=%whole", 2 * X),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_move_what_they_touch(operation: str) -> None:
    line, expected = OPERATIONS[operation]
    assert moved(program(line)) == expected


def test_loops_multiply_and_the_larger_branch_counts() -> None:
    also = """\
%copies (t: f32[64,256]) -> f32[64,256] {
  %t = f32[64,256]{1,0:T(8,128)} parameter(0)
  ROOT %c = f32[64,256]{1,0:T(8,128)} copy(%t)
}

%nothing (t: f32[64,256]) -> f32[64,256] {
  ROOT %t = f32[64,256]{1,0:T(8,128)} parameter(0)
}

%below (t: (s32[], f32[64,256])) -> pred[] {
  %t = (s32[]{:T(128)S(6)}, f32[64,256]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %b = s32[]{:T(128)S(6)} constant(5)
  ROOT %l = pred[]{:T(512)S(6)} compare(%n, %b), direction=LT
}

%body (t: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {
  %t = (s32[]{:T(128)S(6)}, f32[64,256]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %v = f32[64,256]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %c = f32[64,256]{1,0:T(8,128)} conditional(%n, %v, %v), branch_computations={%copies, %nothing}
  ROOT %r = (s32[]{:T(128)S(6)}, f32[64,256]{1,0:T(8,128)}) tuple(%n, %c)
}
"""
    lines = (
        "%t = (s32[]{:T(128)S(6)}, f32[64,256]{1,0:T(8,128)}) tuple(%i, %x)",
        "%w = (s32[]{:T(128)S(6)}, f32[64,256]{1,0:T(8,128)}) while(%t), condition=%below, body=%body",
    )
    assert moved(program(*lines, also=also)) == 5 * 2 * X
