// Exact order statistics of the keys of one sample, in one block: histogram, refinement, and a way out for ties.
//
// The histogram's bins are scores, quantised between the smallest and the largest finite one. That is monotone, so the
// k-th key lies in the bin where the counts from the top reach k; and it spreads scores that share their exponents,
// where leading bits would put all of them into a few bins. The handful of keys in that bin are compared all with all.
// Where they are more than a handful (ties, an outlier that stretches the range), four counts of eight bits each find
// the key. No order of arrival changes a result.
//
// Shared memory is ordered by block_sync alone; each function leaves its results visible to the whole block.
#pragma once

#include <float.h>

#include "order.cuh"

namespace asymvlm {

constexpr int BINS = 2048, CANDIDATES = 512;

template <int THREADS>
struct RankScratch {
  int above[BINS];  // counts, then how many keys lie in higher bins
  uint32_t candidates[CANDIDATES];  // of one bin, or 256 counts of a digit
  Sums<THREADS> sums;
  int bin, found;
  uint32_t key;
  int key_above;
};

struct Range {  // of the prunable keys of a sample
  int prunable, always;
  float low, scale;  // of the bins
};

struct Threshold {
  uint32_t key;  // the k-th largest; 2**32 - 1, which no token has, for k = 0
  int above;     // keys above it
};

// Halves: the difference of two finite scores may overflow.
DEVICE int bin_of(uint32_t key, const Range& range) {
  if (key == NAN_KEY) return 0;
  const float half = 0.5f * key_score(key) - range.low;
  return (int)fminf(fmaxf(half * range.scale, 0.f), (float)(BINS - 1));
}

template <int THREADS>
DEVICE Range fill_histogram(const Keys& keys, int S, RankScratch<THREADS>& scratch) {
  const int thread = thread_index();
  int prunable = 0, always = 0;
  uint32_t highest = 0, lowest_flipped = 0;  // of the finite ones; flipped, so that both are maxima
  for (int place = thread; place < S; place += THREADS) {
    const uint32_t key = keys[place];
    prunable += is_prunable(key);
    always += key >= PROTECTED_KEY;
    const float score = key_score(key);
    if (is_prunable(key) && fabsf(score) <= FLT_MAX) {  // false for NaN
      highest = highest > key ? highest : key;
      lowest_flipped = lowest_flipped > ~key ? lowest_flipped : ~key;
    }
  }
  prunable = warp_sum(prunable);
  always = warp_sum(always);
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const uint32_t high = shuffle_xor(highest, step), low = shuffle_xor(lowest_flipped, step);
    highest = highest > high ? highest : high;
    lowest_flipped = lowest_flipped > low ? lowest_flipped : low;
  }
  block_sync();  // nobody reads the scratch of an earlier search any more
  if (thread % 32 == 0) {
    scratch.sums.warp[0][thread / 32] = (int)highest;
    scratch.sums.warp[1][thread / 32] = (int)lowest_flipped;
    scratch.sums.warp[2][thread / 32] = prunable;
    scratch.sums.warp[3][thread / 32] = always;
  }
  for (int bin = thread; bin < BINS; bin += THREADS) scratch.above[bin] = 0;
  block_sync();
  prunable = always = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) {
    const uint32_t high = (uint32_t)scratch.sums.warp[0][warp], low = (uint32_t)scratch.sums.warp[1][warp];
    highest = highest > high ? highest : high;
    lowest_flipped = lowest_flipped > low ? lowest_flipped : low;
    prunable += scratch.sums.warp[2][warp];
    always += scratch.sums.warp[3][warp];
  }
  Range range = {prunable, always, 0.f, 0.f};
  if (highest) {
    range.low = 0.5f * key_score(~lowest_flipped);
    const float width = 0.5f * key_score(highest) - range.low;
    range.scale = width > 0.f ? fminf((BINS - 1) / width, FLT_MAX) : 0.f;
  }
  for (int place = thread; place < S; place += THREADS) {
    const uint32_t key = keys[place];
    if (is_prunable(key)) shared_add(&scratch.above[bin_of(key, range)], 1);
  }
  block_sync();
  constexpr int OWN = BINS / THREADS;  // neighbouring bins, from the top
  int counts[OWN], sum = 0, total;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    counts[i] = scratch.above[BINS - 1 - (thread * OWN + i)];
    sum += counts[i];
  }
  int before = block_scan(sum, total, scratch.sums);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    scratch.above[BINS - 1 - (thread * OWN + i)] = before;
    before += counts[i];
  }
  block_sync();
  return range;
}

// The rank-th largest of the keys of one bin, eight bits at a time.
template <int THREADS>
DEVICE Threshold rank_by_digits(const Keys& keys, int S, int bin, int rank, int above, const Range& range,
                                     RankScratch<THREADS>& scratch) {
  const int thread = thread_index(), lane = thread % 32;
  int* counts = (int*)scratch.candidates;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = thread; digit < 256; digit += THREADS) counts[digit] = 0;
    block_sync();
    for (int first = 0; first < S; first += THREADS) {  // whole warps: lanes of one digit count together
      const int place = first + thread;
      const uint32_t key = place < S ? keys[place] : NOBODY;
      const bool in = is_prunable(key) && bin_of(key, range) == bin && (uint64_t)key >> (shift + 8) == prefix;
      const uint32_t digit = in ? key >> shift & 0xff : 256;
      const uint32_t same = match_any(digit);
      if (in && lane == first_bit(same)) shared_add(&counts[digit], count_bits(same));
    }
    block_sync();
    int own[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      own[i] = thread < 32 ? counts[255 - (lane * 8 + i)] : 0;
      sum += own[i];
    }
    int before = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = shuffle_up(before, step);
      if (lane >= step) before += other;
    }
    before -= sum;
    if (thread < 32) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (before < rank && rank <= before + own[i]) {
          scratch.bin = 255 - (lane * 8 + i);
          scratch.found = before;
        }
        before += own[i];
      }
    }
    block_sync();
    prefix = prefix << 8 | (uint32_t)scratch.bin;
    rank -= scratch.found;
    above += scratch.found;
  }
  block_sync();
  return {prefix, above};
}

// The k-th largest prunable key, 0 <= k <= range.prunable, after fill_histogram.
template <int THREADS>
DEVICE_CALL Threshold kth_key(Keys keys, int S, int k, Range range, RankScratch<THREADS>& scratch) {
  if (k <= 0) return {0xffffffffu, 0};
  const int thread = thread_index();
  for (int bin = thread; bin < BINS; bin += THREADS) {
    const int above = scratch.above[bin], next = bin ? scratch.above[bin - 1] : range.prunable;
    if (above < k && k <= next) scratch.bin = bin;
  }
  if (thread == 0) scratch.found = 0;
  block_sync();
  const int bin = scratch.bin, above = scratch.above[bin];
  const int number = (bin ? scratch.above[bin - 1] : range.prunable) - above;
  if (number > CANDIDATES) {
    block_sync();  // all have read the bin
    return rank_by_digits(keys, S, bin, k - above, above, range, scratch);
  }
  for (int place = thread; place < S; place += THREADS) {
    const uint32_t key = keys[place];
    if (is_prunable(key) && bin_of(key, range) == bin) scratch.candidates[shared_add(&scratch.found, 1)] = key;
  }
  block_sync();
  for (int i = thread; i < number; i += THREADS) {
    const uint32_t key = scratch.candidates[i];
    int greater = 0, equal = 0, equal_before = 0;
    for (int j = 0; j < number; ++j) {
      const uint32_t other = scratch.candidates[j];
      greater += other > key;
      equal += other == key;
      equal_before += other == key && j < i;
    }
    if (greater < k - above && k - above <= greater + equal && equal_before == 0) {  // one thread of equal ones
      scratch.key = key;
      scratch.key_above = above + greater;
    }
  }
  block_sync();
  return {scratch.key, scratch.key_above};
}

// s^(k) - s^(N-k+1), k = max(1, N // 4), over the prunable keys; NaN without any.
template <int THREADS>
DEVICE float gap_of(const Keys& keys, int S, const Range& range, RankScratch<THREADS>& scratch) {
  if (range.prunable == 0) return key_score(NOBODY);
  const int k = range.prunable / 4 > 1 ? range.prunable / 4 : 1;
  const Threshold high = kth_key(keys, S, k, range, scratch);
  const Threshold low = kth_key(keys, S, range.prunable - k + 1, range, scratch);
  return key_score(high.key) - key_score(low.key);
}

// Whether a key is kept, packed for a scan: 1 for better than the threshold, 1 << 16 for equal to it.
DEVICE int flags_of(uint32_t key, const Threshold& threshold) {
  return (int)(key > threshold.key) + ((int)(key == threshold.key) << 16);
}

}  // namespace asymvlm
