// A team of blocks shares the rows of an item, each with a slice of the width, and adds up what each has found.
//
// sm_90 and sm_100: the team is a cluster, partial sums stay in shared memory and are read through the cluster. sm_80,
// sm_89 and sm_120: partial sums go to L2 and the blocks meet at a counter; the launch is cooperative, so all of them
// are resident and waiting ends. Either way `sync` orders what each block wrote before against what all read behind it.
#pragma once

#include "plan.h"

namespace asymvlm {

#ifdef ASYMVLM_EMULATE
#define USES_CLUSTERS(plan) ((plan).clusters)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200  // as in launch.h
#define USES_CLUSTERS(plan) true
#else
#define USES_CLUSTERS(plan) false
#endif

struct Team {
  int size, rank, number;
  bool clusters;
  float* parts;     // of this block: [ring * 16][PART]
  float* norms;     // of this block: [32]
  int64_t stride;   // floats from the parts of one block to those of the next, in L2
  int* counters;    // arrivals and departures, in L2
  int meetings;

  DEVICE void sync() {
    if (size == 1) {
      block_sync();
    } else if (clusters) {
      cluster_sync();
    } else {
      ++meetings;
      block_sync();
      if (thread_index() == 0) {
        arrive(counters);
        wait_for(counters, size * meetings);
      }
      block_sync();
    }
  }

  // Floats of another block. Plain pointers within a cluster, L2 outside of one.
  DEVICE float part_of(int other, int offset) const { return read(parts, other, offset); }
  DEVICE float norm_of(int other, int offset) const { return read(norms, other, offset); }

  DEVICE float read(const float* mine, int other, int offset) const {
    if (size == 1) return mine[offset];
    if (clusters) return cluster_address(mine, other)[offset];
    return load_l2(mine + (other - rank) * stride + offset);
  }

  // The last to leave puts the counters back to zero: all have passed their last meeting.
  DEVICE void leave() {
    if (size == 1 || clusters || meetings == 0 || thread_index() != 0) return;
    if (arrive(counters + 1) == size - 1) counters[0] = counters[1] = 0;
  }
};

}  // namespace asymvlm
