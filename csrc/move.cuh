// Second half of prune_sequence: every block ranks the samples of its items for itself, and moves its rows.
//
// A sample's counter tells that all its keys are in L2; that wait is the only meeting of the whole grid. Ranking 10 KB
// of keys again in each block costs less than a second meeting would. Each block then counts who is kept before its
// rows, so it knows the slot of each, and copies its slice of the kept ones: from the ring where they are still there,
// else from L2 or memory. Slot numbers go through scratch.slots between two block_syncs.
#pragma once

#include "score.cuh"

namespace asymvlm {

template <class W>
DEVICE void move_words(const AsymvlmCarry& carry, int b, int B, int capacity, int position, int place) {
  const W* in = (const W*)carry.in + b * carry.stride_b + place * carry.stride_s;
  W* out = (W*)carry.out;
  for (int x = 0; x < carry.width; ++x) {
    const int64_t to = carry.stacked ? ((int64_t)x * B + b) * capacity + position
                                     : ((int64_t)b * capacity + position) * carry.width + x;
    out[to] = place < 0 ? (W)carry.pad : in[x * carry.stride_x];
  }
}

// The numbers of one token, or of padding where `place` is negative.
DEVICE void move_carry(const AsymvlmPrune& call, const AsymvlmCarry& carry, int b, int position, int place) {
  switch (carry.itemsize) {
    case 1: return move_words<uint8_t>(carry, b, call.B, call.capacity, position, place);
    case 2: return move_words<uint16_t>(carry, b, call.B, call.capacity, position, place);
    case 4: return move_words<uint32_t>(carry, b, call.B, call.capacity, position, place);
    default: return move_words<uint64_t>(carry, b, call.B, call.capacity, position, place);
  }
}

template <class T>
struct Mover {
  const AsymvlmPrune& call;
  const AsymvlmPlan& plan;
  PruneScratch& scratch;
  Ring<T>& ring;
  int rank;             // of this block in its team
  int groups;           // of this block in all
  const uint32_t* stored;   // keys of all samples
  const int32_t* has_text;  // of all samples
  uint32_t* held;       // the keys of one sample in shared memory, or 0

  DEVICE T* out_row(int b, int position) const {
    return (T*)call.out + ((int64_t)b * call.capacity + position) * call.D + rank * plan.slice;
  }

  // One warp writes a row of this block's slice; `source` 0 means zeros.
  DEVICE void write_row(T* to, const T* source, int64_t stride_d) const {
    const int lane = thread_index() % 32;
    if (plan.wide) {
      constexpr int ELEMENTS = 16 / (int)sizeof(T);
      for (int i = lane; i < ring.width / ELEMENTS; i += 32) {
        ((uint4*)to)[i] = source ? ((const uint4*)source)[i] : make_uint4(0, 0, 0, 0);
      }
    } else {
      for (int i = lane; i < ring.width; i += 32) to[i] = source ? source[i * stride_d] : T{};
    }
  }

  DEVICE void select_and_move(const Item& item, int first_group) {
    const int thread = thread_index(), b = item.sample;
    const int64_t sample = (int64_t)b * call.S;
    Keys keys = {nullptr, stored + sample, nullptr, nullptr};
    if (held) {
      for (int place = thread; place < call.S; place += PRUNE_THREADS) held[place] = keys[place];
      keys.shared = held;
      block_sync();
    }
    const Range range = fill_histogram(keys, call.S, scratch.rank);
    const bool uniform = !call.linear && call.ratios[0] == call.ratios[1] && call.ratios[1] == call.ratios[2];
    const bool leads = item.first == 0 && rank == 0;
    float gap = uniform ? 0.f : gap_of(keys, call.S, range, scratch.rank);  // not needed to select: see below
    const int64_t share = range.prunable * keep_millionths(gap, call.linear, call.ratios, call.numbers) / 1000000;
    int count = share > 1 ? (int)share : 1;
    count = count < range.prunable && load_l2(has_text + b) ? count : range.prunable;
    const int room = call.capacity > range.always ? call.capacity - range.always : 0;
    count = count < room ? count : room;
    const int length = range.always + count < call.capacity ? range.always + count : call.capacity;
    Threshold threshold = {TEXT_KEY, 0};
    if (length > range.always) {
      threshold = kth_key(keys, call.S, count, range, scratch.rank);
      threshold.above += range.always;
    } else if (call.protect) {  // no room for a token that may be dropped, and perhaps none for all protected ones
      int text = 0;
      for (int place = thread; place < call.S; place += PRUNE_THREADS) text += keys[place] == TEXT_KEY;
      text = block_sum(text, scratch.sums);
      if (length > text) threshold = {PROTECTED_KEY, text};
    }
    if (leads && thread == 0) {
      call.counts[b] = count;
      call.lengths[b] = length;
    }
    move_item(item, first_group, keys, threshold, length);
    pad_item(item, length);
    if (leads) {
      if (uniform) gap = gap_of(keys, call.S, range, scratch.rank);  // while rows leave, in one block of the sample
      if (thread == 0) call.gap[b] = gap;
    }
    store_bulk_wait();
    block_sync();  // the next item writes keys and scratch
  }

  DEVICE void move_item(const Item& item, int first_group, const Keys& keys, const Threshold& threshold, int length) {
    const int thread = thread_index(), warp = thread / 32, b = item.sample;
    const int shift = call.left ? call.capacity - length : 0, wanted = length - threshold.above;
    int better = 0, equal = 0;
    for (int place = thread; place < item.first; place += PRUNE_THREADS) {
      const int flags = flags_of(keys[place], threshold);
      better += flags & 1;
      equal += flags >> 16;
    }
    better = block_sum(better, scratch.sums);
    equal = block_sum(equal, scratch.sums);
    for (int first = 0; first < item.rows; first += PRUNE_THREADS) {
      const int row = first + thread, place = item.first + row;
      const int flags = row < item.rows ? flags_of(keys[place], threshold) : 0;
      int total;
      const int before = block_scan(flags, total, scratch.sums);
      const int equal_before = equal + (before >> 16);
      const bool keep = (flags & 1) || (flags && equal_before < wanted);  // the lowest place wins a tie
      const int slot = better + (before & 0xffff) + (equal_before < wanted ? equal_before : wanted);
      better += total & 0xffff;
      equal += total >> 16;
      if (keep && call.order && rank == 0) call.order[(int64_t)b * call.S + slot] = place;
      if (!call.out) continue;
      const int position = slot + shift;
      const bool from_ring = first_group + row / GROUP >= groups - plan.ring;
      const bool alone = keep && from_ring && ring.bulk();
      if (alone) store_bulk(out_row(b, position), ring.row(first_group + row / GROUP, row % GROUP),
                            ring.width * (int)sizeof(T));
      scratch.slots[thread] = keep && !alone ? position : -1;
      if (keep) {
        if (rank == 0) call.index[(int64_t)b * call.capacity + position] = place;
        for (int i = rank; i < call.carries; i += plan.team) move_carry(call, call.carry[i], b, position, place);
      }
      block_sync();
      for (int i = warp; i < PRUNE_THREADS; i += WARPS) {
        if (scratch.slots[i] < 0) continue;
        const int group = first_group + (first + i) / GROUP;
        const bool held_row = group >= groups - plan.ring;
        const T* source = held_row ? ring.row(group, (first + i) % GROUP)
                                   : (const T*)call.embeds + b * call.embeds_b + rank * plan.slice * call.embeds_d +
                                         (item.first + first + i) * call.embeds_s;
        write_row(out_row(b, scratch.slots[i]), source, held_row ? 1 : call.embeds_d);
      }
      block_sync();
    }
  }

  // Slots without a token, shared among the items of the sample.
  DEVICE void pad_item(const Item& item, int length) {
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32, b = item.sample;
    const int part = item.first / (plan.groups * GROUP);
    if (call.order && rank == 0) {
      for (int slot = length + part * PRUNE_THREADS + thread; slot < call.S; slot += plan.items * PRUNE_THREADS) {
        call.order[(int64_t)b * call.S + slot] = -1;
      }
    }
    if (!call.out) return;
    const int first = call.left ? 0 : length;
    for (int i = part * WARPS + warp; i < call.capacity - length; i += plan.items * WARPS) {
      const int position = first + i;
      write_row(out_row(b, position), nullptr, 1);
      if (lane == 0 && rank == 0) call.index[(int64_t)b * call.capacity + position] = -1;
      const int number = rank + lane * plan.team;
      if (number < call.carries) move_carry(call, call.carry[number], b, position, -1);
    }
  }
};

}  // namespace asymvlm
