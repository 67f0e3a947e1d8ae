"""Instructions of one thread, of a warp and of tensor cores, against numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest
from formats import bf16_of_float, float_of_bf16
from small import aligned, run

DRAWN = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)
EDGES = np.array([0, 1, 5, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF9], np.uint32)
WORDS = np.concatenate([EDGES, DRAWN])[:64]
OTHERS = np.roll(WORDS, 7) | 1


def computed(body: str, words: np.ndarray = WORDS, others: np.ndarray = OTHERS) -> np.ndarray:
    """%r10 of each thread, from %r3 and %r4."""
    first, second = aligned(words), aligned(others)
    load = "ld.global.b32 %r3, [%rd3];\n ld.global.b32 %r4, [%rd4];\n"
    run(load + body + "\n st.global.b32 [%rd3], %r10;", first, second)
    return first


def signed(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32).astype(np.int64)


def low(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64).astype(np.uint64).astype(np.uint32)


TRUNCATED = np.array([int(a / b) for a, b in zip(signed(WORDS).tolist(), signed(OTHERS).tolist())], np.int64)
WIDE = WORDS.astype(np.uint64) * OTHERS.astype(np.uint64)


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("add.s32 %r10, %r3, %r4;", WORDS + OTHERS),
        ("mul.hi.u32 %r10, %r3, %r4;", (WIDE >> np.uint64(32)).astype(np.uint32)),
        ("mul.hi.s32 %r10, %r3, %r4;", low(signed(WORDS) * signed(OTHERS) >> 32)),
        ("mul.wide.u32 %rd9, %r3, %r4;\n shr.u64 %rd9, %rd9, 32;\n cvt.u32.u64 %r10, %rd9;", (WIDE >> np.uint64(32)).astype(np.uint32)),  # noqa: E501
        ("div.s32 %r10, %r3, %r4;", low(TRUNCATED)),
        ("rem.s32 %r10, %r3, %r4;", low(signed(WORDS) - TRUNCATED * signed(OTHERS))),
        ("max.s32 %r10, %r3, %r4;", low(np.maximum(signed(WORDS), signed(OTHERS)))),
        ("max.relu.s32 %r10, %r3, %r4;", low(np.maximum(np.maximum(signed(WORDS), signed(OTHERS)), 0))),
        ("min.u32 %r10, %r3, %r4;", np.minimum(WORDS, OTHERS)),
        ("shr.s32 %r10, %r3, 40;", low(signed(WORDS) >> 63)),
        ("shl.b32 %r10, %r3, 32;", WORDS * 0),
        ("bfe.u32 %r10, %r3, 4, 9;", WORDS >> 4 & 0x1FF),
        ("bfe.s32 %r10, %r3, 4, 4;", low((WORDS >> 4 & 15).astype(np.int64) - 16 * (WORDS >> 7 & 1))),
        ("prmt.b32 %r10, %r3, %r4, 0x5410;", WORDS & 0xFFFF | OTHERS << 16),
        ("popc.b32 %r10, %r3;", np.array([bin(x).count("1") for x in WORDS], np.uint32)),
        ("mov.b32 {%rs1, %rs2}, %r3;\n mov.b32 %r10, {%rs2, %rs1};", WORDS << 16 | WORDS >> 16),
        ("cvt.u16.u32 %rs1, %r3;\n cvt.s32.s16 %r10, %rs1;", low(WORDS.astype(np.uint16).view(np.int16))),
        ("setp.lt.s32 %p1, %r3, %r4;\n selp.b32 %r10, 1, 2, %p1;", np.where(signed(WORDS) < signed(OTHERS), 1, 2)),
        ("setp.lt.s32 %p1, %r3, 0;\n mov.b32 %r10, 8;\n @!%p1 mov.b32 %r10, 4;", np.where(signed(WORDS) < 0, 8, 4)),
        ("shfl.sync.bfly.b32 %r10, %r3, 1, 31, -1;", WORDS[np.arange(64) ^ 1]),
        ("shfl.sync.up.b32 %r10|%p1, %r3, 1, 0, -1;\n @!%p1 mov.b32 %r10, 0;", np.where(np.arange(64) % 32, np.roll(WORDS, 1), 0)),  # noqa: E501
        ("shfl.sync.idx.b32 %r10, %r3, 5, 31, -1;", WORDS[np.arange(64) // 32 * 32 + 5]),
        ("redux.sync.max.s32 %r10, %r3, -1;", low(signed(WORDS).reshape(2, 32).max(1).repeat(32))),
    ],
)  # fmt: skip
def test_integers(body, wanted):
    np.testing.assert_array_equal(computed(body), wanted)


FLOATS = np.array(
    [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -3.3, 65504, 1e38, 3.4e38, np.inf, -np.inf, np.nan, 1e-40, 7]
)
NUMBERS = np.concatenate([FLOATS, np.random.default_rng(1).normal(size=50)]).astype(np.float32)


def test_bf16_is_rounded_to_nearest_even():
    torch = pytest.importorskip("torch")
    wanted = torch.from_numpy(NUMBERS).to(torch.bfloat16)
    got = float_of_bf16(bf16_of_float(NUMBERS))
    np.testing.assert_array_equal(got, wanted.float().numpy())
    pair = computed("cvt.rn.bf16x2.f32 %r10, %r3, %r4;", NUMBERS.view(np.uint32), NUMBERS[::-1].copy().view(np.uint32))
    np.testing.assert_array_equal(float_of_bf16((pair >> 16).astype(np.uint16)), got)
    np.testing.assert_array_equal(float_of_bf16((pair & 0xFFFF).astype(np.uint16)), got[::-1])


@pytest.mark.parametrize(
    "body, function",
    [
        ("fma.rn.f32 %r10, %r3, %r3, 0fBF800000;", lambda x: (x.astype(np.float64) ** 2 - 1).astype(np.float32)),
        ("max.f32 %r10, %r3, 0f00000000;", lambda x: np.fmax(x, np.float32(0))),
        ("ex2.approx.ftz.f32 %r10, %r3;", np.exp2),
        ("setp.nan.f32 %p1, %r3, %r3;\n selp.f32 %r10, 0f3F800000, 0f00000000, %p1;", lambda x: np.isnan(x) * 1.0),
        ("setp.ne.f32 %p1, %r3, %r3;\n selp.f32 %r10, 0f3F800000, 0f00000000, %p1;", lambda x: x * 0 * 0 + 0 * x != 0),
        ("setp.neu.f32 %p1, %r3, %r3;\n selp.f32 %r10, 0f3F800000, 0f00000000, %p1;", lambda x: np.isnan(x) * 1.0),
        ("cvt.rn.f16.f32 %rs1, %r3;\n cvt.f32.f16 %r10, %rs1;", lambda x: x.astype(np.float16)),
    ],
)
def test_floats(body, function):
    with np.errstate(all="ignore"):
        wanted = np.zeros(64) if "setp.ne.f32" in body else function(NUMBERS)
    np.testing.assert_array_equal(computed(body, NUMBERS.view(np.uint32)).view(np.float32), wanted.astype(np.float32))


def test_floats_become_integers_towards_zero_and_saturate():
    body = "cvt.f64.f32 %rd9, %r3;\n cvt.rzi.s64.f64 %rd9, %rd9;\n cvt.u32.u64 %r10, %rd9;"
    numbers = np.array([1.9, -1.9, 1e30, -1e30, np.nan, 4e9] + [0] * 58, np.float32)
    wanted = np.array([1, -1, 2**63 - 1, -(2**63), 0, 4e9] + [0] * 58, np.int64)
    np.testing.assert_array_equal(computed(body, numbers.view(np.uint32)), wanted.astype(np.uint32))


def halves(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers in bf16, as bits and as fp32: their products are exact."""
    numbers = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    return bf16_of_float(numbers), numbers


def test_mma_multiplies_matrices():
    """By the tables of the PTX manual, written out element by element."""
    a_bits, a = halves(0, 16, 16)
    b_bits, b = halves(1, 16, 8)
    words = np.zeros((32, 16), np.uint32)  # of a lane: 4 of A, 2 of B, 4 of C; the result goes to the last
    c = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(8):
            row = group + 8 * (i in (2, 3, 6, 7))
            column = member * 2 + (i & 1) + 8 * (i >= 4)
            words[lane, i // 2] |= np.uint32(a_bits[row, column]) << np.uint32(16 * (i & 1))
        for i in range(4):
            words[lane, 4 + i // 2] |= np.uint32(b_bits[member * 2 + (i & 1) + 8 * (i >= 2), group]) << np.uint32(
                16 * (i & 1)
            )
        for i in range(4):
            words[lane, 6 + i] = c[group + 8 * (i >= 2), member * 2 + (i & 1)].view(np.uint32)
    first = aligned(words)
    load = "".join(f"ld.global.b32 %r{20 + i}, [%rd8+{4 * i}];\n" for i in range(10))
    store = "".join(f"st.global.b32 [%rd8+{40 + 4 * i}], %r{40 + i};\n" for i in range(4))
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r40, %r41, %r42, %r43}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r26, %r27, %r28, %r29};\n"  # noqa: E501
    run("mad.wide.u32 %rd8, %r1, 64, %rd1;\n" + load + product + store, first, aligned(words), threads=32)
    wanted = (a @ b + c).astype(np.float32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(4):
            got = first[lane, 10 + i].view(np.float32)
            assert got == wanted[group + 8 * (i >= 2), member * 2 + (i & 1)], (lane, i)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_wgmma_reads_swizzled_operands(width):
    """One step of 16 columns of A (64 rows) and B (16 rows), both with k contiguous in tiles of 8 rows."""
    a_bits, a = halves(3, 64, 16)
    b_bits, b = halves(4, 16, 16)
    shared = np.zeros(16384, np.uint8)
    for start, bits in ((0, a_bits), (8192, b_bits)):
        for row in range(len(bits)):
            for k in range(16):
                place = start + row // 8 * 8 * width + row % 8 * width + 2 * k
                place ^= (place >> 7 & (width // 16 - 1)) << 4
                shared[place : place + 2] = bits[row, k : k + 1].view(np.uint8)
    layout = {128: 1, 64: 2, 32: 3}[width]
    descriptors = [start >> 4 | 1 << 16 | (8 * width >> 4) << 32 | layout << 62 for start in (0, 8192)]
    sums = ", ".join(f"%r{50 + i}" for i in range(8))
    body = "".join(
        f"ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd8+{2048 * i}];\n"
        f"st.shared.v4.b32 [%r19+{2048 * i}], {{%r20, %r21, %r22, %r23}};\n"
        for i in range(8)
    )
    clear = "".join(f"mov.b32 %r{50 + i}, 0f7FC00000;\n" for i in range(8))  # ignored: the sums start anew
    store = "".join(f"st.global.b32 [%rd9+{4 * i}], %r{50 + i};\n" for i in range(8))
    text = f"""
        shl.b32 %r19, %r1, 4;
        cvt.u64.u32 %rd8, %r19;
        add.s64 %rd8, %rd8, %rd1;
        {body} {clear}
        bar.sync 0;
        mov.b64 %rd10, {descriptors[0]};
        mov.b64 %rd11, {descriptors[1]};
        mov.pred %p1, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, %rd10, %rd11, %p1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %rd9, %r1, 32, %rd2;
        {store}
    """
    out = aligned(np.zeros((128, 8), np.float32))
    report = run(text, aligned(shared), out, threads=128, shared=16384)
    assert not report.races
    assert run(text.replace("bar.sync 0;", ""), aligned(shared), out.copy() * 0 + out, threads=128, shared=16384).races
    wanted = a @ b.T
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            row = 16 * warp + lane // 4 + 8 * (i // 2 & 1)
            assert out[thread, i] == wanted[row, lane % 4 * 2 + (i & 1) + 8 * (i // 4)], (thread, i)


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_come_from_shared_memory_and_go_back(transposed):
    matrix = np.arange(64 * 4, dtype=np.uint16).reshape(4, 8, 8)
    out = aligned(np.zeros((4, 32), np.uint32))
    text = """
        shl.b32 %r5, %r1, 4;
        cvt.u64.u32 %rd8, %r5;
        add.s64 %rd8, %rd8, %rd1;
        ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd8];
        st.shared.v4.b32 [%r5], {%r20, %r21, %r22, %r23};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r30, %r31, %r32, %r33}, [%r5];
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r5], {%r30, %r31, %r32, %r33};
        bar.sync 0;
        ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r5];
        st.global.v4.b32 [%rd8], {%r20, %r21, %r22, %r23};
        st.global.b32 [%rd4], %r30;
        st.global.b32 [%rd4+128], %r31;
        st.global.b32 [%rd4+256], %r32;
        st.global.b32 [%rd4+384], %r33;
    """
    first = aligned(matrix)
    run(re.sub(r"\.trans", transposed, text), first, out, threads=32)
    np.testing.assert_array_equal(first, matrix)
    seen = matrix.transpose(0, 2, 1) if transposed else matrix
    np.testing.assert_array_equal(out, np.ascontiguousarray(seen).view(np.uint32).reshape(4, 32))
