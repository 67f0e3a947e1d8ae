// Scores of rows that fp32 cannot square: a warp reads such a row again, times a power of two, and all text with it.
//
// Squares leave fp32 at lengths of 1.8e19 and below 1e-23, and digits and products are lost before that. Such rows are
// rare, so this may be slow; it is called, not inlined, so that it takes no registers from the products of the others.
#pragma once

#include "text.cuh"

namespace asymvlm {

constexpr float EPSILON = 1e-12f;  // norms are clamped from below, so a zero row scores 0

// Whether a squared norm is that of a row to read again. A row of fp16 never is, unless it is zero.
DEVICE bool needs_lift(float square) { return square < 0x1p-79f || square > 0x1p80f; }

// The power of two that brings such a row, whose square may have overflowed or vanished, to lengths that fp32 holds.
DEVICE float lift_of(float square) {
  if (square > 0x1p80f) return 0x1p-80f;
  return square < 0x1p-100f ? 0x1p110f : square < 0x1p-79f ? 0x1p60f : 1.f;
}

template <class T>
DEVICE constexpr bool is_half(T) { return false; }
DEVICE constexpr bool is_half(Half) { return true; }

DEVICE float number_of(float value) { return value; }
template <class T>
DEVICE float number_of(T value) { return low_float(T{}, value.bits); }

DEVICE float sum_of_lanes(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += shuffle_xor(value, step);
  return value;
}

DEVICE float norm_of(float square) { return fmaxf(root(square), EPSILON); }

template <class T>
DEVICE const T* row_at(const AsymvlmPrune& call, int sample, int place) {
  return (const T*)call.embeds + sample * call.embeds_b + place * call.embeds_s;
}

// Squared norm of a row times `lift`, by a warp.
template <class T>
DEVICE float lifted_square(const AsymvlmPrune& call, const T* row, float lift) {
  float square = 0.f;
#pragma unroll 1
  for (int d = thread_index() % 32; d < call.D; d += 32) {
    const float x = number_of(row[d * call.embeds_d]) * lift;
    square += x * x;
  }
  return sum_of_lanes(square);
}

// Whether a text of the sample that is not zero needs a lift: then all rows are read again. By a warp.
template <class T>
DEVICE_CALL bool any_odd_text(const AsymvlmPrune& call, int sample) {
  const int lane = thread_index() % 32;
  bool found = false;
#pragma unroll 1
  for (int start = 0; start < call.S; start += 32) {
    uint32_t texts = ballot(start + lane < call.S && is_text(call, sample, start + lane));
    for (; texts; texts &= texts - 1) {
      const T* text = row_at<T>(call, sample, start + first_bit(texts));
      const float square = lifted_square(call, text, 1.f);
      if (needs_lift(square)) found |= lifted_square(call, text, lift_of(square)) > 0.f;
    }
  }
  return found;
}

// The score of one row with all text, by a warp; `score` where the row is zero.
template <class T>
DEVICE_CALL float score_again(const AsymvlmPrune& call, int sample, int place, float square, float score) {
  const int lane = thread_index() % 32;
  const T* row = row_at<T>(call, sample, place);
  const float lift = lift_of(square);
  square = lifted_square(call, row, lift);
  if (!(square > 0.f)) return score;
  float best = -INFINITY;
#pragma unroll 1
  for (int start = 0; start < call.S; start += 32) {
    uint32_t texts = ballot(start + lane < call.S && is_text(call, sample, start + lane));
    for (; texts; texts &= texts - 1) {
      const T* text = row_at<T>(call, sample, start + first_bit(texts));
      const float text_lift = lift_of(lifted_square(call, text, 1.f));
      float product = 0.f, text_square = 0.f;
#pragma unroll 1
      for (int d = lane; d < call.D; d += 32) {
        const float x = number_of(text[d * call.embeds_d]) * text_lift;
        text_square += x * x;
        product += number_of(row[d * call.embeds_d]) * lift * (call.weight ? x * call.weight[d * call.weight_d] : x);
      }
      const float similarity = divide(sum_of_lanes(product), norm_of(sum_of_lanes(text_square)));
      if (best == best && (similarity != similarity || similarity > best)) best = similarity;  // NaN stays
    }
  }
  return divide(best, norm_of(square));
}

}  // namespace asymvlm
