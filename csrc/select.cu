// select_tokens and importance_gap: one block ranks one row of scores.
//
// Data: scores and mask become keys, held in shared memory where they fit, else made again at each of the passes, which
// then read from L2. The histogram of rank.cuh gives the k-th key; a last pass in the order of the tokens scans who is
// kept and writes the places, so the index is ascending and the lowest place wins a tie.
#include "launch.h"
#include "rank.cuh"

namespace asymvlm {

constexpr int SELECT_THREADS = 512;  // 1024 leave 64 registers a thread, which spills

struct SelectCall {
  const float* scores;
  const uint8_t* mask;
  const void* counts;
  int64_t* index;
  float* gap;
  int wide_counts, N, capacity, keys_in_shared;
};

KERNEL(SELECT_THREADS) select_kernel(GRID_CONSTANT SelectCall call) {
  const int thread = thread_index(), N = call.N;
  const int64_t row = block_index();
  RankScratch<SELECT_THREADS>& scratch = *(RankScratch<SELECT_THREADS>*)shared_memory();
  uint32_t* held = (uint32_t*)(shared_memory() + sizeof(scratch));
  Keys keys = {nullptr, nullptr, call.scores + row * N, call.mask ? call.mask + row * N : nullptr};
  if (call.keys_in_shared) {
    for (int place = thread; place < N; place += SELECT_THREADS) held[place] = keys[place];
    keys.shared = held;
    block_sync();
  }
  const Range range = fill_histogram(keys, N, scratch);
  if (!call.counts) {
    const float gap = gap_of(keys, N, range, scratch);
    if (thread == 0) call.gap[row] = gap;
    return;
  }
  int64_t kept = call.wide_counts ? ((const int64_t*)call.counts)[row] : ((const int32_t*)call.counts)[row];
  kept = kept < range.prunable ? kept : range.prunable;
  kept = kept < call.capacity ? kept : call.capacity;
  kept = kept > 0 ? kept : 0;
  const Threshold threshold = kth_key(keys, N, (int)kept, range, scratch);
  const int wanted = (int)kept - threshold.above;  // of those equal to the threshold
  int64_t* index = call.index + row * call.capacity;
  int better = 0, equal = 0;
  for (int first = 0; first < N; first += SELECT_THREADS) {
    const int place = first + thread;
    const int flags = flags_of(place < N ? keys[place] : NOBODY, threshold);
    int total;
    const int before = block_scan(flags, total, scratch.sums);
    const int better_before = better + (before & 0xffff), equal_before = equal + (before >> 16);
    const bool keep = (flags & 1) || (flags && equal_before < wanted);
    if (keep) index[better_before + (equal_before < wanted ? equal_before : wanted)] = place;
    better += total & 0xffff;
    equal += total >> 16;
  }
  for (int slot = (int)kept + thread; slot < call.capacity; slot += SELECT_THREADS) index[slot] = -1;
}

}  // namespace asymvlm

using namespace asymvlm;

ASYMVLM_API int asymvlm_select(const float* scores, const uint8_t* mask, const void* counts, int wide_counts,
                               int64_t* index, float* gap, int B, int N, int capacity, void* stream) {
  if (B < 0 || N < 0 || N > ASYMVLM_LONGEST || capacity < 0) return INVALID_VALUE;
  if (B == 0 || (counts && capacity == 0)) return 0;
  Device device;
  if (const int code = describe_device<select_kernel>(&device)) return code;
  const int scratch = (int)sizeof(RankScratch<SELECT_THREADS>);
  const bool fits = scratch + 4 * N <= device.shared;
  const SelectCall call = {scores, mask, counts, index, gap, wide_counts, N, capacity, fits};
  return launch<select_kernel>(call, {B, SELECT_THREADS, 1, scratch + (fits ? 4 * N : 0), false}, stream);
}
