// Which tokens of a sample are text. Each block lists them for itself from the masks, while its first rows fly in.
#pragma once

#include "plan.h"

namespace asymvlm {

DEVICE bool is_text(const AsymvlmPrune& call, int b, int place) {
  return call.text[b * call.text_b + place * call.text_s] && !call.vision[b * call.vision_b + place * call.vision_s];
}

// Role of a token: 1 may be dropped, 2 is protected, 3 is text, 0 is padding.
DEVICE int role_of(const AsymvlmPrune& call, int b, int place) {
  const bool vision = call.vision[b * call.vision_b + place * call.vision_s];
  const bool guarded = call.protect && call.protect[b * call.protect_b + place * call.protect_s];
  if (vision && !guarded) return 1;
  if (!vision && call.text[b * call.text_b + place * call.text_s]) return 3;
  return guarded ? 2 : 0;
}

// Write the places of the text tokens number `first` to `first` + WINDOW - 1 to scratch.text, and return how many text
// tokens the sample has. Each warp counts a part of the sequence, then writes its own; three block_syncs.
DEVICE int list_text(const AsymvlmPrune& call, int b, int first, PruneScratch& scratch) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int part = ceil_div(ceil_div(call.S, WARPS), 32) * 32;
  const int begin = warp * part, end = begin + part < call.S ? begin + part : call.S;
  int count = 0;
#pragma unroll 4
  for (int start = begin; start < end; start += 32) {
    count += count_bits(ballot(start + lane < end && is_text(call, b, start + lane)));
  }
  block_sync();
  if (lane == 0) scratch.sums.warp[0][warp] = count;
  block_sync();
  int before = 0, length = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    before += i < warp ? scratch.sums.warp[0][i] : 0;
    length += scratch.sums.warp[0][i];
  }
  if (count && before < first + WINDOW && before + count > first) {
    for (int start = begin; start < end; start += 32) {
      const bool text = start + lane < end && is_text(call, b, start + lane);
      const uint32_t all = ballot(text);
      const int slot = before + count_bits(all & ((1u << lane) - 1)) - first;
      if (text && slot >= 0 && slot < WINDOW) scratch.text[slot] = start + lane;
      before += count_bits(all);
    }
  }
  block_sync();
  return length;
}

}  // namespace asymvlm
