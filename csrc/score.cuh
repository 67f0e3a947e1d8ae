// First half of prune_sequence: scores of the rows of an item, and their keys in L2.
//
// The groups of an item are taken in chunks of as many as the ring holds. For each chunk, for each 32 text columns:
// t' goes to registers; each group is multiplied as soon as it has arrived; the 8 warps' products are added in a fixed
// order into the block's parts (block_sync before and after); the team meets, each block adds up the parts of all for
// its share of the rows, in the order of the ranks, and keeps the best; the team meets again before the parts are
// overwritten. In a chunk's last round a slot is loaded again as soon as its group is done. Who writes a row's best is
// the only one to read it, so no barrier guards it.
#pragma once

#include "lifted.cuh"
#include "product.cuh"
#include "team.cuh"
#include "text.cuh"

namespace asymvlm {

struct Item {
  int sample, first, rows;  // rows may be 0 behind the end of a sample
};

DEVICE Item item_of(const AsymvlmPrune& call, const AsymvlmPlan& plan, int number) {
  const int rows = plan.groups * GROUP, first = number % plan.items * rows;
  const int left = call.S - first;
  return {number / plan.items, first, left < rows ? left : rows};
}

template <class T>
struct Scorer {
  static constexpr bool ODD_ROWS = !is_half(T{});  // rows that fp32 cannot square
  const AsymvlmPrune& call;
  const AsymvlmPlan& plan;
  PruneScratch& scratch;
  Ring<T>& ring;
  Team& team;
  float* best;
  float* squares;
  uint8_t* roles;
  uint32_t* keys;  // (B, S) in the workspace
  int groups;      // of this block in all: those of its items, one after the other
  bool combined;   // parts of this block may still be read by others
  bool odd_text;   // a squared norm of the sample's text says that fp32 cannot square it; it may be zero

  DEVICE const T* rows_of(int sample) const {
    return (const T*)call.embeds + sample * call.embeds_b + team.rank * plan.slice * call.embeds_d;
  }

  DEVICE Item item_of_group(int q) const {
    return item_of(call, plan, team.number + q / plan.groups * plan.teams);
  }

  // Start the loads of group q, if there is one.
  DEVICE void fetch(int q) {
    if (q >= groups) return;
    const Item item = item_of_group(q);
    const int row = q % plan.groups * GROUP, left = item.rows - row;
    const T* source = rows_of(item.sample) + (int64_t)(item.first + row) * call.embeds_s;
    ring.load(q, source, left < GROUP ? left : GROUP, call.embeds_s, call.embeds_d);
  }

  // The best of 32 text columns for the rows of a chunk; `length` of the columns are real.
  DEVICE void combine(int rows, int length, bool first) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    float text = 0.f;
    for (int other = 0; other < team.size; ++other) text += team.norm_of(other, lane);
    odd_text |= ballot(lane < length && needs_lift(text)) != 0;
    text = norm_of(text);
    for (int r = team.rank * WARPS + warp; r < rows; r += team.size * WARPS) {
      float product = 0.f, square = 0.f;
      for (int other = 0; other < team.size; ++other) {
        product += team.part_of(other, r * PART + lane);
        square += team.part_of(other, r * PART + TEXT);
      }
      float similarity = lane < length ? divide(product, text) : -INFINITY;
      const bool unknown = ballot(similarity != similarity) != 0;  // a maximum would drop it
#pragma unroll
      for (int step = 16; step; step /= 2) similarity = fmaxf(similarity, shuffle_xor(similarity, step));
      if (unknown) similarity = NAN;
      if (lane == 0) {
        const float before = first ? -INFINITY : best[r];
        best[r] = before != before || unknown ? NAN : fmaxf(before, similarity);
        squares[r] = square;
      }
    }
  }

  // Returns whether the sample has text.
  DEVICE bool score(const Item& item, int first_group) {
    const int thread = thread_index(), warp = thread / 32;
    const int steps = ceil_div(ring.width, STEP);
    int window = 0;
    odd_text = false;
    const int length = list_text(call, item.sample, 0, scratch);
    // the groups behind the end of the sample are fetched, empty, and passed over: slots and phases stay in step
    for (int chunk = 0; chunk < plan.groups; chunk += plan.ring) {
      const int end = chunk + plan.ring < plan.groups ? chunk + plan.ring : plan.groups;
      int rows = item.rows - chunk * GROUP;
      rows = rows < 0 ? 0 : rows < (end - chunk) * GROUP ? rows : (end - chunk) * GROUP;
      bool prunable = false;
      for (int r = thread; r < rows; r += PRUNE_THREADS) {
        const int role = role_of(call, item.sample, item.first + chunk * GROUP + r);
        roles[r] = (uint8_t)role;
        prunable |= role == 1;
      }
      const bool scored = block_any(prunable) && length > 0;  // the same in all blocks of the team
      const int rounds = scored ? ceil_div(length, TEXT) : 1;
      for (int round = 0; round < rounds; ++round) {
        const int columns = length - round * TEXT < TEXT ? length - round * TEXT : TEXT;
        Product<T> product;
        if (scored) {
          if (combined) team.sync();  // all have read the parts of the round before
          const int wanted = round * TEXT / WINDOW * WINDOW;
          if (wanted != window) list_text(call, item.sample, window = wanted, scratch);
          const float* weight = call.weight ? call.weight + team.rank * plan.slice * call.weight_d : nullptr;
          product.load_text({rows_of(item.sample), weight, scratch.text + round * TEXT - window, columns, ring.width,
                             call.embeds_s, call.embeds_d, call.weight_d, plan.wide != 0},
                            scratch.warps);
          block_sync();
          if (thread < TEXT) {
            float square = 0.f;
            for (int i = 0; i < WARPS; ++i) square += scratch.warps[i * TEXT + thread];
            team.norms[thread] = square;
          }
          block_sync();  // before the first products overwrite them
        }
        for (int group = chunk; group < end; ++group) {
          const int q = first_group + group, number = rows - (group - chunk) * GROUP;
          ring.wait(q);
          if (scored && number > 0) {
            product.multiply(ring, q, number, steps, scratch.warps + warp * GROUP * WARP_PART);
            block_sync();
            for (int i = thread; i < GROUP * PART; i += PRUNE_THREADS) {
              const int r = i / PART, column = i % PART;
              float sum = 0.f;
#pragma unroll
              for (int other = 0; other < WARPS; ++other) {
                sum += scratch.warps[(other * GROUP + r) * WARP_PART + column];
              }
              team.parts[((group - chunk) * GROUP + r) * PART + column] = sum;
            }
          }
          block_sync();  // the products may be overwritten, and the slot
          if (round == rounds - 1 && q + plan.ring < groups) fetch(q + plan.ring);
        }
        if (scored) {
          team.sync();
          combine(rows, columns, round == 0);
          combined = true;
        }
      }
      finish(item, chunk, rows, scored);
    }
    return length > 0;
  }

  // Scores and keys of this block's share of the rows of a chunk.
  DEVICE void finish(const Item& item, int chunk, int rows, bool scored) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int64_t sample = (int64_t)item.sample * call.S + item.first + chunk * GROUP;
    bool all_again = false;
    if (ODD_ROWS && scored && odd_text) all_again = any_odd_text<T>(call, item.sample);
    // row r belongs to the warp that combined it; here its 32 lanes would do one row, so lane 0 does
    for (int r = team.rank * WARPS + warp; r < rows; r += team.size * WARPS) {
      const int role = roles[r];
      const float square = role == 1 && scored && lane == 0 ? squares[r] : 1.f;
      float score = role == 1 && scored && lane == 0 ? divide(best[r], norm_of(square)) : -INFINITY;
      if (ODD_ROWS && role == 1 && scored) {
        const float own = shuffle(square, 0);
        if (all_again || needs_lift(own)) {
          score = score_again<T>(call, item.sample, item.first + chunk * GROUP + r, own, score);
        }
      }
      if (lane) continue;
      call.scores[sample + r] = score;
      keys[sample + r] = role == 1 ? order_key(score) : role == 2 ? PROTECTED_KEY : role == 3 ? TEXT_KEY : NOBODY;
    }
    block_sync();  // roles are written anew
  }
};

}  // namespace asymvlm
