// Row groups of V in shared memory: asynchronous loads into the slots of a ring, one mbarrier each.
//
// Group q of a block lies in slot q % groups. Its barrier's phase q / groups ends when the rows are there; every thread
// waits for it before it reads them (`wait`). A slot is loaded again only after a block_sync behind its last reader.
// Rows come by the bulk engine (sm_90 and later), by 16-byte asynchronous copies (sm_80), or element by element where
// rows are not 16-byte aligned; the barrier expects one arrival in the first case, one of each thread in the others.
#pragma once

#include "plan.h"

namespace asymvlm {

template <class T>
struct Ring {
  unsigned char* rows;
  uint64_t* barriers;
  int stride;  // bytes from row to row
  int groups;  // slots
  int width;   // columns of this block that exist; up to the slice the others are zeros
  bool wide;

  DEVICE T* row(int q, int r) const { return (T*)(rows + (int64_t)(q % groups * GROUP + r) * stride); }
  DEVICE bool bulk() const { return HAS_BULK && wide; }

  DEVICE void init(int slice) {
    const int thread = thread_index(), missing = slice - width;
    if (thread < groups) barrier_init(barriers + thread, bulk() ? 1 : PRUNE_THREADS);
    for (int i = thread; i < groups * GROUP * missing; i += PRUNE_THREADS) {
      T* pad = (T*)(rows + (int64_t)(i / missing) * stride) + width + i % missing;
      *pad = T{};  // NaN times the zeros of t' would be NaN
    }
    barrier_init_done();
    block_sync();
  }

  // `number` rows from `source` on into the slot of group q; by all threads, also where there are none.
  DEVICE void load(int q, const T* source, int number, int64_t stride_s, int64_t stride_d) {
    const int thread = thread_index();
    uint64_t* barrier = barriers + q % groups;
    if (number < 0) number = 0;
    if (bulk()) {
      const int bytes = width * (int)sizeof(T);
      if (thread == 0) barrier_arrive_for_bytes(barrier, number * bytes);
      if (thread < number) load_bulk(row(q, thread), source + thread * stride_s, bytes, barrier);
    } else if (wide) {
      constexpr int ELEMENTS = 16 / (int)sizeof(T);
      const int pieces = width / ELEMENTS;
      for (int i = thread; i < number * pieces; i += PRUNE_THREADS) {
        const int r = i / pieces, column = i % pieces * ELEMENTS;
        load_async_16(row(q, r) + column, source + r * stride_s + column);
      }
      arrive_async(barrier);
    } else {
      for (int i = thread; i < number * width; i += PRUNE_THREADS) {
        const int r = i / width, column = i % width;
        row(q, r)[column] = source[r * stride_s + column * stride_d];
      }
      barrier_arrive(barrier);
    }
  }

  DEVICE void wait(int q) { barrier_wait(barriers + q % groups, q / groups & 1); }
};

}  // namespace asymvlm
