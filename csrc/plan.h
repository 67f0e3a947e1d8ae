// How prune_sequence is divided: over teams of blocks, over row groups, over shared memory. Read by host and device.
//
// A team of blocks owns 16 x groups rows of one sample (an item); each block has a slice of the width. The number of
// blocks in a team comes from the width alone, so that a row's score is summed in one order whatever else is in the
// batch. Shared memory holds a ring of row groups: where all groups of a team fit, V is read once from memory.
#pragma once

#include "asymvlm.h"
#include "primitives.cuh"
#include "rank.cuh"

namespace asymvlm {

#ifdef ASYMVLM_EMULATE
#define HOST_DEVICE inline
#else
#define HOST_DEVICE __host__ __device__ __forceinline__
#endif

constexpr int PRUNE_THREADS = 256, WARPS = PRUNE_THREADS / 32;
constexpr int GROUP = 16;         // rows of one matrix product
constexpr int TEXT = 32;          // text columns at a time
constexpr int STEP = 32;          // columns of the width that a warp multiplies at a time
constexpr int STEPS = 4;          // times that a warp does so: its part of t' stays in registers
constexpr int MOST_COLUMNS = STEP * STEPS * WARPS;  // 1024, of a block
constexpr int MOST_GROUPS = 64;   // in the ring
constexpr int WINDOW = 512;       // places of the text that are listed at once
constexpr int PART = TEXT + 1;    // partial sums of a row: its products, and its square
constexpr int WARP_PART = PART + 1;

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
HOST_DEVICE int align(int bytes, int to) { return ceil_div(bytes, to) * to; }

// Bytes from one row of a slice to the next: 64 more than a multiple of 128, so that the 8 rows x 4 lanes of a
// fragment read 16 bytes each without bank conflicts.
HOST_DEVICE int row_bytes(int slice, int itemsize) { return align(slice * itemsize, 128) + 64; }

struct PruneScratch {
  union {
    float warps[WARPS * GROUP * WARP_PART];  // products of each warp
    RankScratch<PRUNE_THREADS> rank;
  };
  Sums<PRUNE_THREADS> sums;
  int text[WINDOW];
  int slots[PRUNE_THREADS];
  float norms[TEXT];  // this block's share of the squares of the text
};

// Byte offsets in shared memory.
struct SharedMap {
  int barriers, scratch, parts, best, squares, roles, keys, ring, total;
};

HOST_DEVICE SharedMap shared_map(const AsymvlmPlan& plan, int S, int itemsize) {
  SharedMap map;
  const int rows = plan.ring * GROUP;
  int end = 0;
  map.barriers = end, end += align(plan.ring * 8, 16);
  map.scratch = end, end += align((int)sizeof(PruneScratch), 16);
  map.parts = end, end += plan.clusters || plan.team == 1 ? align(rows * PART * 4, 16) : 0;
  map.best = end, end += rows * 4;
  map.squares = end, end += rows * 4;
  map.roles = end, end += rows;
  map.keys = end, end += plan.keys_in_shared ? align(S * 4, 16) : 0;
  map.ring = align(end, 128);
  map.total = map.ring + rows * row_bytes(plan.slice, itemsize);
  return map;
}

// Workspace in device memory, in elements of 4 bytes: keys, whether a sample has text, and partial sums of the teams
// that meet in L2.
HOST_DEVICE int64_t part_floats(const AsymvlmPlan& plan) { return (int64_t)plan.ring * GROUP * PART + TEXT; }
HOST_DEVICE int64_t workspace_flags(const AsymvlmPrune& call) { return ((int64_t)call.B * call.S + 3) / 4 * 4; }
HOST_DEVICE int64_t workspace_parts(const AsymvlmPrune& call) { return workspace_flags(call) + align(call.B, 4); }
HOST_DEVICE int64_t workspace_floats(const AsymvlmPrune& call, const AsymvlmPlan& plan) {
  const bool shared = plan.clusters || plan.team == 1;
  return workspace_parts(call) + (shared ? 0 : part_floats(plan) * plan.team * plan.teams);
}

// Counters: arrivals and departures of each sample, then of each team that meets in L2.
HOST_DEVICE int counter_count(const AsymvlmPrune& call, const AsymvlmPlan& plan) { return 2 * (call.B + plan.teams); }

}  // namespace asymvlm
