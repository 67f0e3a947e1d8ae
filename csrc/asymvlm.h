// The library's C interface: pointers, sizes, strides, a stream. Functions return a CUDA error code, 0 for success.
//
// Nothing here knows torch: one binary serves every torch and Python. Pointers are device pointers, strides count
// elements, masks are one byte a token. Launches go to the current device and wait for nothing. asymvlm_kernels/unproven/cuda/library.py
// mirrors the structs field by field; asymvlm_struct_size lets it check that it does.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define ASYMVLM_API extern "C" __attribute__((visibility("default")))
#else
#define ASYMVLM_API extern "C"
#endif

enum { ASYMVLM_INTERFACE = 1 };  // raised with every change of this file
enum { ASYMVLM_FLOAT32 = 0, ASYMVLM_FLOAT16 = 1, ASYMVLM_BFLOAT16 = 2 };
enum { ASYMVLM_MOST_CARRIES = 8, ASYMVLM_LONGEST = 65536, ASYMVLM_WIDEST = 8192 };

// A per-token tensor that moves along with the embeddings: (B, S, width), or (width, B, S) where stacked.
typedef struct {
  const void* in;
  void* out;  // (B, capacity, width) or (width, B, capacity), contiguous
  int64_t pad;  // bits of the value for padding
  int64_t stride_b, stride_s, stride_x;
  int32_t width, itemsize, stacked, unused;
} AsymvlmCarry;

// prune_sequence. With out == 0 it ends with the selection and writes `order` instead of the shortened sequence.
typedef struct {
  const void* embeds;      // (B, S, D)
  const float* weight;     // (D), 0 for ones
  const uint8_t* vision;   // (B, S)
  const uint8_t* text;     // (B, S)
  const uint8_t* protect;  // (B, S) or 0
  float* scores;           // (B, S)
  float* gap;              // (B)
  int32_t* counts;         // (B)
  int32_t* lengths;        // (B)
  int32_t* order;          // (B, S) or 0: kept places, ascending, padded with -1
  void* out;               // (B, capacity, D) or 0
  int64_t* index;          // (B, capacity) or 0
  void* workspace;         // AsymvlmPlan.workspace bytes, 16-byte aligned
  int32_t* counters;       // AsymvlmPlan.counters zeros, left zero
  int64_t embeds_b, embeds_s, embeds_d, weight_d, vision_b, vision_s, text_b, text_s, protect_b, protect_s;
  int64_t ratios[3];   // millionths: below numbers[0], below numbers[1], the rest
  double numbers[5];   // two gaps; where linear: target, slope, mean gap, minimum, maximum
  int32_t B, S, D, capacity, dtype, left, linear, carries;
  AsymvlmCarry carry[ASYMVLM_MOST_CARRIES];
} AsymvlmPrune;

// How prune_sequence is laid out on a device. Any plan that asymvlm_prune accepts gives the same result.
typedef struct {
  int64_t workspace;         // bytes
  int32_t counters;          // number of int32 zeros
  int32_t team;              // blocks that share the rows of one item, each with a slice of the width: from D alone
  int32_t teams;             // launched; the grid is team * teams blocks, all resident at once
  int32_t items;             // parts of each sample's rows
  int32_t groups;            // of 16 rows, in one item
  int32_t ring;              // groups that fit in a block's shared memory
  int32_t slice;             // columns of a block, a multiple of 32
  int32_t wide;              // rows move 16 bytes at a time
  int32_t keys_in_shared;    // the keys of a sample fit too
  int32_t clusters;          // teams are clusters, else they meet in L2
  int32_t shared;            // bytes of a block
  int32_t resident;          // blocks that the device holds at once: the most that may be launched
} AsymvlmPlan;

// The parts of split attention become output, logsumexp and scores. All fp32 and contiguous but for `out`.
typedef struct {
  const float* partial;  // (B, H, Q, parts, D)
  const float* sums;     // (B, H, Q, parts): logsumexps, base 2
  const float* logits;   // (B, H * scored, S), base 2; 0 without scores
  const void* seqlens;   // (B) or 0
  const void* leftpad;   // (B) or 0
  void* out;             // (B, Q, H, D)
  float* lse;            // (B, H, Q) or 0
  float* scores;         // (B, S) or 0
  int64_t left, right;   // window of a row, in slots
  int32_t B, H, Q, S, D, parts, scored, dtype, wide_seqlens, wide_leftpad;
} AsymvlmMerge;

// Rows that move within their tensors. `table` holds 6 numbers an entry, in words: offset from `origin`, strides of
// sample, slot and row, number of rows, length of a row.
typedef struct {
  const int64_t* table;
  void* origin;
  const int64_t* source;  // (B, M)
  const int64_t* target;  // (B, M), -1 behind the last move
  int64_t source_b, source_m, target_b, target_m;
  int32_t B, M, entries, rows, word, access;  // bytes of a word, and of what is moved at once
} AsymvlmMoves;

ASYMVLM_API int asymvlm_interface(void);
ASYMVLM_API int asymvlm_emulated(void);  // 1 in the build that runs on a CPU
ASYMVLM_API int asymvlm_struct_size(int which);  // of Prune, Plan, Merge, Moves
ASYMVLM_API const char* asymvlm_error_string(int code);
ASYMVLM_API int asymvlm_probe(void);  // 0 if a kernel of this library can run on the current device

ASYMVLM_API int asymvlm_prune_plan(const AsymvlmPrune* call, AsymvlmPlan* plan);
ASYMVLM_API int asymvlm_prune(const AsymvlmPrune* call, const AsymvlmPlan* plan, void* stream);

// index (B, capacity): the counts[b] best of each row of scores (B, N), ascending, padded with -1. mask (B, N) or 0.
// counts are int64 where wide_counts, else int32. counts == 0 writes gap (B) instead.
ASYMVLM_API int asymvlm_select(const float* scores, const uint8_t* mask, const void* counts, int wide_counts,
                               int64_t* index, float* gap, int B, int N, int capacity, void* stream);

ASYMVLM_API int asymvlm_merge(const AsymvlmMerge* call, void* stream);
ASYMVLM_API int asymvlm_move_slots(const AsymvlmMoves* call, void* stream);
