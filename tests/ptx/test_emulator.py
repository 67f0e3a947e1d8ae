"""The emulator itself on kernels of a few lines: control flow, memory, races, order, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from formats import Fault, Unsupported
from grid import Conditions
from small import aligned, run

WORDS = np.arange(64, dtype=np.uint32)
TO_SHARED = "shl.b32 %r5, %r1, 2;\n mov.b32 %r6, global_smem;\n add.s32 %r5, %r6, %r5;\n"


def zeros(count: int = 64) -> np.ndarray:
    return aligned(np.zeros(count, np.uint32))


def test_threads_part_and_meet_again():
    out = zeros()
    run(
        """
        setp.lt.u32 %p1, %r1, 20;
        mov.b32 %r3, 7;
        @%p1 bra $SMALL;
        mov.b32 %r3, 9;
        bra.uni $MEET;
        $SMALL:
        add.s32 %r3, %r3, %r1;
        $MEET:
        add.s32 %r3, %r3, 100;
        st.global.b32 [%rd3], %r3;
        """,
        out,
        zeros(),
    )
    np.testing.assert_array_equal(out, np.where(WORDS < 20, WORDS + 107, 109))


def test_each_thread_loops_as_often_as_it_wants():
    out = zeros()
    run(
        """
        mov.b32 %r3, 0;
        mov.b32 %r4, 0;
        $AGAIN:
        setp.ge.u32 %p1, %r3, %r1;
        @%p1 bra $DONE;
        add.s32 %r3, %r3, 1;
        add.s32 %r4, %r4, %r3;
        bra $AGAIN;
        $DONE:
        st.global.b32 [%rd3], %r4;
        """,
        out,
        zeros(),
    )
    np.testing.assert_array_equal(out, WORDS * (WORDS + 1) // 2)


def test_an_indexed_branch_goes_by_the_table():
    out = zeros()
    run(
        """
        and.b32 %r3, %r1, 1;
        $L_brx_0: .branchtargets
            $EVEN,
            $ODD;
        brx.idx %r3, $L_brx_0;
        $EVEN:
        mov.b32 %r4, 5;
        bra $OUT;
        $ODD:
        mov.b32 %r4, 6;
        $OUT:
        st.global.b32 [%rd3], %r4;
        """,
        out,
        zeros(),
    )
    np.testing.assert_array_equal(out, 5 + WORDS % 2)


EXCHANGE = (
    TO_SHARED
    + """
    st.shared.b32 [%r5], %r1;
    bar.sync 0;
    xor.b32 %r7, %r5, 128;  // the same lane of the other warp
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd3], %r8;
    """
)


def test_a_barrier_orders_warps():
    out = zeros()
    report = run(EXCHANGE, out, zeros())
    np.testing.assert_array_equal(out, WORDS ^ 32)
    assert not report.races
    assert report.longest[1] == 1
    assert report.instructions == report.longest[0] == 6 + 3 + 5 + 1


@pytest.mark.parametrize("order", ["read of what", "write over what"])
def test_a_missing_barrier_is_a_race(order):
    read = "xor.b32 %r7, %r5, 128;\n ld.shared.b32 %r8, [%r7];\n"
    write = "st.shared.b32 [%r5], %r1;\n"
    body = write + read if order == "read of what" else read + write
    races = run(TO_SHARED + body, zeros(), zeros()).races
    assert any(order in race for race in races), races


def test_a_warp_alone_does_not_race_and_neighbours_in_a_word_do_not():
    own = "st.shared.b32 [%r5], %r1;\n ld.shared.b32 %r8, [%r5];\n"
    assert not run(TO_SHARED + own, zeros(), zeros()).races
    octets = "add.s32 %r5, %r6, %r1;\n cvt.u16.u32 %rs1, %r1;\n st.shared.b8 [%r5], %rs1;\n"
    assert not run(TO_SHARED + octets, zeros(), zeros()).races


def test_a_copy_that_has_begun_is_a_write():
    body = "cp.async.ca.shared.global [%r5], [%rd3], 0x4;\n cp.async.commit_group;\n"
    reads = "xor.b32 %r7, %r5, 128;\n ld.shared.b32 %r8, [%r7];\n st.global.b32 [%rd4], %r8;\n"
    first, out = aligned(WORDS + 3), zeros()
    report = run(TO_SHARED + body + "cp.async.wait_group 0;\n bar.sync 0;\n" + reads, first, out)
    assert not report.races
    np.testing.assert_array_equal(out, (WORDS ^ 32) + 3)
    assert report.bytes_read[first.ctypes.data] == 256
    assert run(TO_SHARED + body + "bar.sync 0;\n cp.async.wait_group 0;\n" + reads, first, out).races


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.b32 %r3, [%rd3+4];", "4 bytes at .*, outside every tensor; near first"),
        ("st.global.b32 [%rd3+-4], %r1;", "outside every tensor"),
        ("ld.global.b16 %rs1, [%rd3+1];", "not aligned"),
        ("mov.b32 %r3, 4094;\n ld.shared.b32 %r4, [%r3];", "shared memory"),
        ("setp.lt.u32 %p1, %r1, 20;\n @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "only a part of 32 threads"),
    ],
)
def test_what_a_gpu_would_not_survive_is_a_fault(body, message):
    with pytest.raises(Fault, match=message):
        run(body, zeros(), zeros())


@pytest.mark.parametrize(
    "body, message",
    [
        ("frobnicate.b32 %r3, %r1;", r"frobnicate.b32: unknown instruction: `frobnicate.b32 %r3, %r1`"),
        ("add.sat.s32 %r3, %r1, %r1;", "add.sat.s32: unknown modifier sat"),
        ("tcgen05.wait::st.sync.aligned;", "tcgen05.* tensor memory .sm_100. is not emulated"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1;", "asynchronous barriers are not emulated"),
        ("cp.async.bulk.commit_group;", "TMA"),
        ("barrier.cluster.arrive.aligned;", "clusters|barrier of the whole block"),
        ("bar.sync 1, 32;", "a barrier of the whole block is wanted"),
    ],
)
def test_what_is_not_emulated_is_named(body, message):
    with pytest.raises(Unsupported, match=message):
        run(body, zeros(), zeros())


MESSAGE = """
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra $END;
    setp.ne.u32 %p2, %r2, 0;
    @%p2 bra $READER;
    mov.b32 %r3, 42;
    st.global.b32 [%rd1], %r3;
    mov.b32 %r4, 1;
    atom.global.gpu.release.exch.b32 %r5, [%rd2], %r4;
    bra $END;
    $READER:
    ld.global.b32 %r7, [%rd1];  // an old value is in L1 from here on
    $WAIT:
    ld.global.gpu.acquire.b32 %r6, [%rd2];
    setp.eq.u32 %p3, %r6, 0;
    @%p3 bra $WAIT;
    ld.global.b32 %r7, [%rd1];
    st.global.b32 [%rd2+4], %r7;
    $END:
"""


def passed_on(body: str, seed: int) -> int:
    """What block 1 reads after the flag of block 0."""
    flags = zeros()
    run(body, zeros(), flags, blocks=2, conditions=Conditions(seed, weak=True, patience=200))
    return int(flags[1])


def test_weak_memory_keeps_what_release_and_acquire_promise():
    assert {passed_on(MESSAGE, seed) for seed in range(20)} == {42}


@pytest.mark.parametrize("ordered, weaker", [("gpu.release.exch", "gpu.relaxed.exch"), ("gpu.acquire", "gpu.relaxed")])
def test_weak_memory_finds_a_missing_order(ordered, weaker):
    assert 0 in {passed_on(MESSAGE.replace(ordered, weaker), seed) for seed in range(20)}


def test_a_loop_without_end_is_a_fault():
    body = MESSAGE.replace("ld.global.gpu.acquire", "ld.global")  # may stay in L1 for ever, once it was read too early
    with pytest.raises(Fault, match="no end after"):
        assert not [passed_on(body, seed) for seed in range(20)]


def test_all_stores_are_there_at_the_end():
    out = zeros()
    run("st.global.b32 [%rd3], %r1;", out, zeros(), conditions=Conditions(weak=True))
    np.testing.assert_array_equal(out, WORDS)


def test_atomics_of_many_threads_add_up():
    out = zeros()
    run("mov.b32 %r3, 2;\n red.global.gpu.relaxed.add.u32 [%rd1], %r3;", out, zeros(), blocks=5)
    assert out[0] == 2 * 64 * 5
