// The second launch of attention with scores: partial outputs become the output, logits become scores.
//
// Part i of a row has an output o_i and a logsumexp l_i, base 2. With l = log2 sum_i 2^l_i the output is
// sum_i 2^(l_i - l) o_i, and slot s scores mean_h 2^(logit[h, s] - l[h]), heads in a fixed order. A part that saw
// nothing has l_i = -inf, and its output was never written.
//
// Blocks of two kinds: one warp merges a row, its lanes share the width; or one thread scores a slot. The latter's
// block first forms the logsumexps of 256 rows in shared memory, a thread each; block_sync stands between that and
// their use.
#include "asymvlm.h"
#include "launch.h"
#include "order.cuh"

namespace asymvlm {

constexpr int MERGE_THREADS = 256, MERGE_WARPS = MERGE_THREADS / 32;

struct MergeCall {
  AsymvlmMerge call;
  int row_blocks, slot_blocks;  // of a sample
};

// Highest l_i of a row and the sum of 2^(l_i - it).
DEVICE float merged_sum(const float* sums, int parts, float& total) {
  float peak = -INFINITY;
  for (int i = 0; i < parts; ++i) peak = fmaxf(peak, sums[i]);
  const float base = peak == -INFINITY ? 0.f : peak;
  total = 0.f;
  for (int i = 0; i < parts; ++i) total += power_2(sums[i] - base);  // NaN passes through
  return base;
}

DEVICE void write_element(const AsymvlmMerge& call, int64_t at, float value) {
  if (call.dtype == ASYMVLM_FLOAT32) ((float*)call.out)[at] = value;
  else if (call.dtype == ASYMVLM_FLOAT16) ((uint16_t*)call.out)[at] = (uint16_t)pack(Half{}, value, 0.f);
  else ((uint16_t*)call.out)[at] = (uint16_t)pack(Bfloat{}, value, 0.f);
}

// Row (b, h, q): the warp's lanes take columns in turns.
DEVICE void merge_row(const AsymvlmMerge& call, int b, int row) {
  const int lane = thread_index() % 32, h = row / call.Q, q = row % call.Q;
  const int64_t at = (int64_t)b * call.H * call.Q + row;
  const float* sums = call.sums + at * call.parts;
  float total;
  const float base = merged_sum(sums, call.parts, total);
  const bool alive = total != 0.f;  // true for NaN
  for (int d = lane; d < call.D; d += 32) {
    float merged = 0.f;
    for (int i = 0; i < call.parts; ++i) {
      const float weight = power_2(sums[i] - base);
      if (weight != 0.f) merged += weight * call.partial[(at * call.parts + i) * call.D + d];
    }
    write_element(call, (((int64_t)b * call.Q + q) * call.H + h) * call.D + d, alive ? divide(merged, total) : 0.f);
  }
  if (lane == 0 && call.lse) call.lse[at] = alive ? (base + logarithm_2(total)) * 0.6931471805599453f : INFINITY;
}

DEVICE int64_t number_of(const void* numbers, int wide, int b) {
  return wide ? ((const int64_t*)numbers)[b] : ((const int32_t*)numbers)[b];
}

KERNEL(MERGE_THREADS) merge_kernel(GRID_CONSTANT MergeCall all) {
  const AsymvlmMerge& call = all.call;
  const int thread = thread_index(), per_sample = all.row_blocks + all.slot_blocks;
  const int b = block_index() / per_sample, number = block_index() % per_sample;
  if (number < all.row_blocks) {
    const int row = number * MERGE_WARPS + thread / 32;
    if (row < call.H * call.Q) merge_row(call, b, row);
    return;
  }
  float* lse = (float*)shared_memory();  // of 256 rows
  const int slot = (number - all.row_blocks) * MERGE_THREADS + thread;
  int64_t first = 0, end = call.S;
  if (call.seqlens) {
    const int64_t length = number_of(call.seqlens, call.wide_seqlens, b);
    end = length < end ? length : end;
  }
  if (call.leftpad) {
    const int64_t pad = number_of(call.leftpad, call.wide_leftpad, b);
    first = pad > first ? pad : first;
  }
  const int rows = call.H * call.scored;
  float score = 0.f;
  for (int start = 0; start < rows; start += MERGE_THREADS) {
    const int own = start + thread;
    block_sync();
    if (own < rows) {
      const int64_t at = ((int64_t)b * call.H + own / call.scored) * call.Q + call.Q - call.scored + own % call.scored;
      float total;
      const float base = merged_sum(call.sums + at * call.parts, call.parts, total);
      lse[thread] = base + logarithm_2(total == 0.f ? 1.f : total);
    }
    block_sync();
    const int count = rows - start < MERGE_THREADS ? rows - start : MERGE_THREADS;
    for (int i = 0; i < count; ++i) {
      const int64_t position = end - call.scored + (start + i) % call.scored;  // of the row, where windows are by slot
      // what lies outside was not visited: its logits were never written
      if (slot < first || slot >= end || slot < position - call.left || slot > position + call.right) continue;
      const float logit = call.logits[((int64_t)b * rows + start + i) * call.S + slot];
      if (logit != -INFINITY) score += power_2(logit - lse[i]);
    }
  }
  if (slot < call.S) call.scores[(int64_t)b * call.S + slot] = divide(score, (float)rows);
}

}  // namespace asymvlm

using namespace asymvlm;

ASYMVLM_API int asymvlm_merge(const AsymvlmMerge* call, void* stream) {
  if (call->B < 0 || call->H < 1 || call->Q < 1 || call->D < 1 || call->S < 0 || call->parts < 1 || call->scored < 0 ||
      call->scored > call->Q || call->dtype < ASYMVLM_FLOAT32 || call->dtype > ASYMVLM_BFLOAT16) {
    return INVALID_VALUE;
  }
  if (call->B == 0) return 0;
  Device device;
  if (const int code = describe_device<merge_kernel>(&device)) return code;
  MergeCall all = {*call, (call->H * call->Q + MERGE_WARPS - 1) / MERGE_WARPS, 0};
  if (call->scored) all.slot_blocks = (call->S + MERGE_THREADS - 1) / MERGE_THREADS;
  const int blocks = call->B * (all.row_blocks + all.slot_blocks);
  return launch<merge_kernel>(all, {blocks, MERGE_THREADS, 1, MERGE_THREADS * 4, false}, stream);
}
