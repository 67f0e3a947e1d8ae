// Products of 16 rows with 32 text columns over one block's slice of the width, and the squares of both.
//
// The 8 warps take turns at steps of 32 columns. Lane l of a warp owns, with g = l / 4 and c = l % 4, the 8 columns
// from 8 c on of the rows g and g + 8 and of the text columns g, g + 8, g + 16, g + 24: 16 bytes of each. A step is two
// matrix products of 16 columns; the first takes elements 0 to 3 of each lane's 8, the second 4 to 7. That is another
// order of the columns than in memory, but the same one on both sides.
//
// t * w is split into high + low, two numbers of the rows' own type, and stays in registers for all row groups. In fp16
// `low` would underflow: each text column is lifted by a power of two first, by each warp for its own columns. V is
// never converted; its squares come from the fragments that the products read. fp32 takes fused multiply-adds.
#pragma once

#include "plan.h"
#include "ring.cuh"

namespace asymvlm {

// What a product needs to know of the text of a sample.
template <class T>
struct TextSource {
  const T* embeds;      // of the sample, at the first column of this block
  const float* weight;  // at that column, or 0
  const int* places;
  int number;           // text columns, at most 32
  int width;
  int64_t stride_s, stride_d, stride_w;
  bool wide;

  DEVICE float weight_of(int column) const { return weight ? weight[column * stride_w] : 1.f; }
};

DEVICE float without_infinity(float whole, float high) { return fabsf(whole) == INFINITY ? 0.f : whole - high; }

template <class T>
struct Product {
  static constexpr bool LIFTED = T::LIFTED;
  uint32_t high[STEPS][4][4], low[STEPS][4][4];
  int lift[4];

  // 8 elements from `column` on, those outside the width zero.
  DEVICE static void load_8(const TextSource<T>& text, const T* row, int column, uint32_t (&words)[4]) {
    if (text.wide) {  // the width is a multiple of 8
      const uint4 all = column < text.width ? *(const uint4*)(row + column) : make_uint4(0, 0, 0, 0);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
      return;
    }
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {  // a shift register: unrolled, the narrow loads would be most of the kernel
      const uint32_t next = column + i < text.width ? row[(column + i) * text.stride_d].bits : 0;
      words[0] = words[0] >> 16 | words[1] << 16, words[1] = words[1] >> 16 | words[2] << 16;
      words[2] = words[2] >> 16 | words[3] << 16, words[3] = words[3] >> 16 | next << 16;
    }
  }

  DEVICE static void load_weights(const TextSource<T>& text, int column, float (&weights)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) weights[i] = 1.f;
    if (!text.weight || column >= text.width) return;
    if (text.wide) {
      const float4 a = *(const float4*)(text.weight + column), b = *(const float4*)(text.weight + column + 4);
      weights[0] = a.x, weights[1] = a.y, weights[2] = a.z, weights[3] = a.w;
      weights[4] = b.x, weights[5] = b.y, weights[6] = b.z, weights[7] = b.w;
    } else {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 7; ++j) weights[j] = weights[j + 1];
        weights[7] = column + i < text.width ? text.weight_of(column + i) : 1.f;
      }
    }
  }

  DEVICE void split(int step, int n, const float (&weights)[8], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = high[step][n][i];
      const float x = low_float(T{}, pair) * weights[2 * i] * scale;
      const float y = high_float(T{}, pair) * weights[2 * i + 1] * scale;
      const uint32_t both = pack(T{}, x, y);
      high[step][n][i] = both;
      low[step][n][i] =
          pack(T{}, without_infinity(x, low_float(T{}, both)), without_infinity(y, high_float(T{}, both)));
    }
  }

  // Fetch this warp's part of t * w; the squares of each text column go to squares[warp][32].
  DEVICE void load_text(const TextSource<T>& text, float* squares) {
    const int thread = thread_index(), warp = thread / 32, g = thread % 32 / 4, c = thread % 4;
    float square[4] = {}, peak[4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int column = (step * WARPS + warp) * STEP + c * 8;
      float weights[8];
      load_weights(text, column, weights);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int number = n * 8 + g;
        uint32_t words[4] = {};
        if (number < text.number) load_8(text, text.embeds + text.places[number] * text.stride_s, column, words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = low_float(T{}, words[i]), y = high_float(T{}, words[i]);
          square[n] += x * x + y * y;
          high[step][n][i] = words[i];
          if (LIFTED) peak[n] = fmaxf(peak[n], fmaxf(fabsf(x * weights[2 * i]), fabsf(y * weights[2 * i + 1])));
        }
        if (!LIFTED) split(step, n, weights, 1.f);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      square[n] += shuffle_xor(square[n], 1);
      square[n] += shuffle_xor(square[n], 2);
      if (c == 0) squares[warp * TEXT + n * 8 + g] = square[n];
      if (LIFTED) {
        peak[n] = fmaxf(peak[n], shuffle_xor(peak[n], 1));
        peak[n] = fmaxf(peak[n], shuffle_xor(peak[n], 2));
        const int exponent = 127 + 13 + 127 - (int)(float_bits(peak[n]) >> 23 & 0xff);  // lifts it to [2^13, 2^14)
        lift[n] = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;  // its inverse is a normal number too
      }
    }
    if (LIFTED) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        float weights[8];
        load_weights(text, (step * WARPS + warp) * STEP + c * 8, weights);
#pragma unroll
        for (int n = 0; n < 4; ++n) split(step, n, weights, bits_float((uint32_t)lift[n] << 23));
      }
    }
  }

  // This warp's share of the products of rows 0 to `number` - 1 of a group, to part[16][WARP_PART].
  DEVICE void multiply(const Ring<T>& ring, int q, int number, int steps, float* part) const {
    const int thread = thread_index(), warp = thread / 32, g = thread % 32 / 4, c = thread % 4;
    float sums[4][4] = {}, square_a = 0.f, square_b = 0.f;
    const T* a = ring.row(q, g < number ? g : number - 1);  // what lies behind the last row is never read
    const T* b = ring.row(q, g + 8 < number ? g + 8 : number - 1);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step * WARPS + warp >= steps) continue;
      const int column = (step * WARPS + warp) * STEP + c * 8;
      const uint4 x = *(const uint4*)(a + column), y = *(const uint4*)(b + column);
      square_a += square(x.x) + square(x.y) + square(x.z) + square(x.w);
      square_b += square(y.x) + square(y.y) + square(y.z) + square(y.w);
      const uint32_t first[4] = {x.x, y.x, x.y, y.y}, second[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        multiply_tile(T{}, sums[n], first, high[step][n][0], high[step][n][1]);
        multiply_tile(T{}, sums[n], second, high[step][n][2], high[step][n][3]);
        multiply_tile(T{}, sums[n], first, low[step][n][0], low[step][n][1]);
        multiply_tile(T{}, sums[n], second, low[step][n][2], low[step][n][3]);
      }
    }
    square_a += shuffle_xor(square_a, 1);
    square_a += shuffle_xor(square_a, 2);
    square_b += shuffle_xor(square_b, 1);
    square_b += shuffle_xor(square_b, 2);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float even = 1.f, odd = 1.f;  // the sums of this lane belong to the text columns 8 n + 2 c and the next
      if (LIFTED) {
        even = bits_float((uint32_t)(254 - shuffle(lift[n], 8 * c)) << 23);
        odd = bits_float((uint32_t)(254 - shuffle(lift[n], 8 * c + 4)) << 23);
      }
      float* row = part + g * WARP_PART + n * 8 + 2 * c;
      *(float2*)row = make_float2(sums[n][0] * even, sums[n][1] * odd);
      *(float2*)(row + 8 * WARP_PART) = make_float2(sums[n][2] * even, sums[n][3] * odd);
    }
    if (c == 0) {
      part[g * WARP_PART + TEXT] = square_a;
      part[(g + 8) * WARP_PART + TEXT] = square_b;
    }
  }

  DEVICE static float square(uint32_t pair) {
    const float x = low_float(T{}, pair), y = high_float(T{}, pair);
    return x * x + y * y;
  }
};

// fp32: lane l owns text column l, and every warp multiplies it with all 16 rows.
template <>
struct Product<float> {
  TextSource<float> text;

  DEVICE float element(int column) const {
    const int lane = thread_index() % 32;
    if (lane >= text.number || column >= text.width) return 0.f;
    return text.embeds[text.places[lane] * text.stride_s + column * text.stride_d];
  }

  DEVICE void load_text(const TextSource<float>& source, float* squares) {
    text = source;
    const int warp = thread_index() / 32;
    float square = 0.f;
    for (int step = 0; step < STEPS; ++step) {
      for (int i = 0; i < STEP; ++i) {
        const float x = element((step * WARPS + warp) * STEP + i);
        square += x * x;
      }
    }
    squares[warp * TEXT + thread_index() % 32] = square;
  }

  DEVICE void multiply(const Ring<float>& ring, int q, int number, int steps, float* part) const {
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    float sums[GROUP] = {}, square = 0.f;
    const float* own = ring.row(q, lane % GROUP < number ? lane % GROUP : number - 1);
    for (int step = warp; step < steps; step += WARPS) {
      for (int i = 0; i < STEP; i += 4) {
        const int column = step * STEP + i;
        float t[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          t[j] = element(column + j);
          if (column + j < text.width) t[j] *= text.weight_of(column + j);
        }
#pragma unroll
        for (int r = 0; r < GROUP; ++r) {
          const float4 v = *(const float4*)(ring.row(q, r < number ? r : number - 1) + column);
          sums[r] += v.x * t[0] + v.y * t[1] + v.z * t[2] + v.w * t[3];
        }
        if (lane / GROUP == i / 4 % 2) {  // the two halves of a warp take turns at the squares
          const float4 v = *(const float4*)(own + column);
          square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
      }
    }
    square += shuffle_xor(square, GROUP);
#pragma unroll
    for (int r = 0; r < GROUP; ++r) part[r * WARP_PART + lane] = sums[r];
    if (lane < GROUP) part[lane * WARP_PART + TEXT] = square;
  }
};

}  // namespace asymvlm
