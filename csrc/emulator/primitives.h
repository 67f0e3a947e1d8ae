// The primitives on a CPU: every GPU thread is a fiber, every primitive that makes threads meet is a place to switch.
//
// Made to be stricter than a GPU. Shared memory starts as NaN. An asynchronous copy happens at the last moment that the
// program allows, when somebody waits for it. The order in which warps and blocks run is drawn from a seed. All lanes
// of a warp must meet at the same kind of collective. Threads that wait for each other for ever are an error, told as
// such. What it cannot show: the order in which a GPU makes writes visible, and anything about time.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define DEVICE inline
#define DEVICE_CALL inline
#define KERNEL(threads) void
#define GRID_CONSTANT

namespace asymvlm {

struct Half {
  static constexpr bool LIFTED = true;
  uint16_t bits;
};
struct Bfloat {
  static constexpr bool LIFTED = false;
  uint16_t bits;
};

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

enum Collective { SHUFFLE = 1, SHUFFLE_XOR, SHUFFLE_UP, BALLOT, MATCH, SUM, MULTIPLY };

int thread_index();
int block_index();
int block_count();
unsigned char* shared_memory();
void block_meet(int* any);     // `any`: or-reduced over the block where given
void cluster_meet();
const unsigned char* peer_memory(int rank);  // shared memory of block `rank` of this cluster
// Every lane gives `size` bytes and gets those of all 32 lanes, `size` apart.
const unsigned char* exchange(Collective kind, const void* mine, int size);
void pass();                   // others run; for loops that wait
void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier);
void bulk_store(void* to, const void* from, int bytes);
void bulk_store_wait();
void async_load(void* to, const void* from);
void async_arrive(uint64_t* barrier);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);
bool barrier_done(uint64_t* barrier, int parity);
bool has_bulk();
void check_shared(const void* address, int bytes);

}  // namespace emulator

#define HAS_BULK (emulator::has_bulk())

DEVICE int thread_index() { return emulator::thread_index(); }
DEVICE int block_index() { return emulator::block_index(); }
DEVICE int block_count() { return emulator::block_count(); }
DEVICE unsigned char* shared_memory() { return emulator::shared_memory(); }
DEVICE void block_sync() { emulator::block_meet(nullptr); }
DEVICE bool block_any(bool value) {
  int any = value;
  emulator::block_meet(&any);
  return any;
}

template <class V>
DEVICE V lane_value(const unsigned char* all, int lane) {
  V value;
  memcpy(&value, all + lane * sizeof(V), sizeof(V));
  return value;
}
template <class V>
DEVICE V shuffle(V value, int lane) {
  return lane_value<V>(emulator::exchange(emulator::SHUFFLE, &value, sizeof(V)), lane & 31);
}
template <class V>
DEVICE V shuffle_xor(V value, int lanes) {
  return lane_value<V>(emulator::exchange(emulator::SHUFFLE_XOR, &value, sizeof(V)), (thread_index() & 31) ^ lanes);
}
template <class V>
DEVICE V shuffle_up(V value, int lanes) {
  const int lane = thread_index() & 31;
  return lane_value<V>(emulator::exchange(emulator::SHUFFLE_UP, &value, sizeof(V)), lane < lanes ? lane : lane - lanes);
}
DEVICE uint32_t ballot(bool value) {
  const unsigned char* all = emulator::exchange(emulator::BALLOT, &value, sizeof(bool));
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (uint32_t)(all[lane] != 0) << lane;
  return bits;
}
DEVICE uint32_t match_any(uint32_t value) {
  const unsigned char* all = emulator::exchange(emulator::MATCH, &value, sizeof(value));
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (uint32_t)(lane_value<uint32_t>(all, lane) == value) << lane;
  return bits;
}
DEVICE int warp_sum(int value) {
  const unsigned char* all = emulator::exchange(emulator::SUM, &value, sizeof(value));
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += lane_value<int>(all, lane);
  return sum;
}
DEVICE int count_bits(uint32_t value) { return __builtin_popcount(value); }
DEVICE int first_bit(uint32_t value) { return __builtin_ffs((int)value) - 1; }

DEVICE int shared_add(int* address, int value) {
  emulator::check_shared(address, sizeof(int));
  const int before = *address;
  *address = before + value;
  return before;
}
template <class V>
DEVICE V load_l2(const V* address) { return *address; }

DEVICE int arrive(int* counter) { return (*counter)++; }
DEVICE void wait_for(const int* counter, int value) {
  while (*(const volatile int*)counter < value) emulator::pass();
}

DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float root(float value) { return sqrtf(value); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float power_2(float value) { return exp2f(value); }
DEVICE float logarithm_2(float value) { return log2f(value); }
DEVICE double multiply_f64(double a, double b) { return a * b; }
DEVICE double add_f64(double a, double b) { return a + b; }
DEVICE long long nearest_integer(double value) { return llrint(value); }

DEVICE float narrow_float(Bfloat, uint16_t bits) { return bits_float((uint32_t)bits << 16); }
DEVICE float narrow_float(Half, uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}
DEVICE uint32_t narrow_bits(Bfloat, float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
}
DEVICE uint32_t narrow_bits(Half, float value) {
  const _Float16 half = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
template <class T>
DEVICE float low_float(T type, uint32_t pair) { return narrow_float(type, (uint16_t)pair); }
template <class T>
DEVICE float high_float(T type, uint32_t pair) { return narrow_float(type, (uint16_t)(pair >> 16)); }
template <class T>
DEVICE uint32_t pack(T type, float low, float high) { return narrow_bits(type, low) | narrow_bits(type, high) << 16; }

// mma.m16n8k16, from the tables of the PTX manual. Lane l holds, with g = l / 4 and c = 2 * (l % 4): of A the pairs
// (row, column) (g, c) (g + 8, c) (g, c + 8) (g + 8, c + 8), of B the pairs (c, g) (c + 8, g) down a column, and of the
// sums (g, c) (g, c + 1) (g + 8, c) (g + 8, c + 1).
template <class T>
DEVICE void multiply_tile(T type, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* all = emulator::exchange(emulator::MULTIPLY, mine, sizeof(mine));
  const int lane = thread_index() & 31, g = lane / 4, c = 2 * (lane % 4);
  auto element = [&](int owner, int word, int half) {
    uint32_t pair;
    memcpy(&pair, all + owner * sizeof(mine) + word * 4, 4);
    return half ? high_float(type, pair) : low_float(type, pair);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = i & 2 ? g + 8 : g, column = c + (i & 1);
    float sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      const float x = element((row % 8) * 4 + k % 8 / 2, (row >= 8) + 2 * (k >= 8), k % 2);
      const float y = element(column * 4 + k % 8 / 2, 4 + (k >= 8), k % 2);
      sum += x * y;
    }
    sums[i] = sum;
  }
}

DEVICE void barrier_init(uint64_t* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
DEVICE void barrier_init_done() {}
DEVICE void barrier_arrive(uint64_t* barrier) { emulator::barrier_arrive(barrier, 0); }
DEVICE void barrier_arrive_for_bytes(uint64_t* barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  while (!emulator::barrier_done(barrier, parity)) emulator::pass();
}
DEVICE void load_async_16(void* to_shared, const void* from) { emulator::async_load(to_shared, from); }
DEVICE void arrive_async(uint64_t* barrier) { emulator::async_arrive(barrier); }
DEVICE void load_bulk(void* to_shared, const void* from, int bytes, uint64_t* barrier) {
  emulator::bulk_load(to_shared, from, bytes, barrier);
}
DEVICE void store_bulk(void* to, const void* from_shared, int bytes) { emulator::bulk_store(to, from_shared, bytes); }
DEVICE void store_bulk_wait() { emulator::bulk_store_wait(); }

DEVICE void cluster_sync() { emulator::cluster_meet(); }
template <class V>
DEVICE const V* cluster_address(const V* address, int rank) {
  return (const V*)(emulator::peer_memory(rank) + ((const unsigned char*)address - emulator::shared_memory()));
}

}  // namespace asymvlm
