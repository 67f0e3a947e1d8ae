// Scores as integers that sort as the method ranks, sums over a block, and the budget: bit for bit those of the
// reference.
#pragma once

#include "asymvlm.h"
#include "primitives.cuh"

namespace asymvlm {

// A key is larger where a token is better: -0 equals +0, NaN (1) ranks below -inf, 0 is no token at all. Above the
// key of +inf are the tokens that must stay: protected ones, and text, which is cut last.
constexpr uint32_t NOBODY = 0, NAN_KEY = 1, PROTECTED_KEY = 0xfffffffdu, TEXT_KEY = 0xfffffffeu;

DEVICE uint32_t order_key(float score) {
  const uint32_t bits = float_bits(score == 0.f ? 0.f : score);
  return score != score ? NAN_KEY : bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float key_score(uint32_t key) {  // NaN for NOBODY and NAN_KEY
  return bits_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

DEVICE bool is_prunable(uint32_t key) { return key != NOBODY && key < PROTECTED_KEY; }

// Where the keys of a sample are read: from shared memory, from L2 where other blocks wrote them, or from scores.
struct Keys {
  const uint32_t* shared;
  const uint32_t* stored;
  const float* scores;
  const uint8_t* mask;

  DEVICE uint32_t operator[](int place) const {
    if (shared) return shared[place];
    if (stored) return load_l2(stored + place);
    return mask && !mask[place] ? NOBODY : order_key(scores[place]);
  }
};

template <int THREADS>
struct Sums {  // scratch of the reductions below
  int warp[4][32];
};

// Sum over the block; every thread gets it.
template <int THREADS>
DEVICE int block_sum(int value, Sums<THREADS>& scratch) {
  const int thread = thread_index();
  value = warp_sum(value);
  block_sync();
  if (thread % 32 == 0) scratch.warp[0][thread / 32] = value;
  block_sync();
  int sum = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += scratch.warp[0][warp];
  return sum;
}

// Sum of the values of the threads before this one, and of all. Two packed counts of 16 bits fit in a value.
template <int THREADS>
DEVICE int block_scan(int value, int& total, Sums<THREADS>& scratch) {
  const int thread = thread_index(), lane = thread % 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = shuffle_up(sum, step);
    if (lane >= step) sum += other;
  }
  block_sync();
  if (lane == 31) scratch.warp[0][thread / 32] = sum;
  block_sync();
  int before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) {
    const int part = scratch.warp[0][warp];
    before += warp < thread / 32 ? part : 0;
    total += part;
  }
  return before + sum - value;
}

// Keep ratio in millionths: bit for bit what `budget.millionths(gap)` answers, NaN included.
DEVICE int64_t keep_millionths(float gap, int linear, const int64_t (&ratios)[3], const double (&numbers)[5]) {
  const double wide = gap;
  if (!linear) return wide >= numbers[1] ? ratios[2] : wide >= numbers[0] ? ratios[1] : ratios[0];
  double ratio = add_f64(numbers[0], multiply_f64(numbers[1], add_f64(wide, -numbers[2])));
  if (ratio != ratio) ratio = numbers[4];
  ratio = ratio < numbers[3] ? numbers[3] : ratio > numbers[4] ? numbers[4] : ratio;
  return nearest_integer(multiply_f64(ratio, 1e6));
}

}  // namespace asymvlm
