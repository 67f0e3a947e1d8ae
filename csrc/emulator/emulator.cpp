// Fibers, barriers and asynchronous copies behind primitives.h, and the scheduler that runs a grid of blocks.
//
// All blocks of a grid are resident, as a cooperative launch guarantees; a fiber runs until it has to wait. A launch
// fails (cudaErrorLaunchFailure) on a deadlock, on lanes that meet at different collectives, on a copy that is not
// aligned or lies outside shared memory, on a read from a block that has ended, and when canaries behind shared memory
// have changed.
#include "emulator.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "primitives.h"

namespace asymvlm {
namespace emulator {

namespace {

constexpr int STACK = 128 << 10, CANARY = 256, LARGEST_EXCHANGE = 64;
constexpr int LAUNCH_FAILURE = 719, TOO_LARGE = 720, INVALID_VALUE = 1;

struct Block;

// What a fiber waits for: `*counter` to leave `value`. Warps, blocks and clusters count the times they have met.
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  Block* block;
  int thread;
  bool started, done, passing;
  const uint64_t* counter;
  uint64_t value;
  uint64_t collectives;
  bool runnable() const { return !done && !passing && (!counter || *counter != value); }
};

struct Warp {
  uint64_t met = 0;
  int waiting = 0, kind = 0, size = 0;
  unsigned char data[2][32 * LARGEST_EXCHANGE];  // in turns, so that one meeting is enough
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  uint64_t* barrier;  // none yet for a load of 16 bytes
  int thread;
  bool counts_bytes, into_shared;
};

struct Meeting {
  uint64_t met = 0;
  int waiting = 0, any = 0, result = 0;
};

struct Block {
  int index;
  std::vector<unsigned char> memory;
  std::vector<Warp> warps;
  std::vector<Copy> loads, stores;
  Meeting meeting;
  Meeting* cluster;
  int ended = 0;  // threads
  Fiber* fibers;
};

struct Barrier {  // lies in the 8 bytes of an mbarrier
  int32_t bytes;
  int16_t pending;
  uint16_t expected : 15, phase : 1;
};
static_assert(sizeof(Barrier) == 8, "an mbarrier has 8 bytes");

struct Grid {
  std::vector<Block> blocks;
  int threads, cluster, shared;
};

Settings settings;
Grid* grid;
Fiber* current;
jmp_buf scheduler;
std::string failure;
int64_t loaded, stored;  // bytes of asynchronous copies
void (*entry)(const void*);
const void* parameters;

void switch_away() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void fail(const std::string& what) {
  if (failure.empty()) {
    failure = what + " (block " + std::to_string(current->block->index) + ", thread " +
              std::to_string(current->thread) + ")";
  }
  for (;;) switch_away();  // never runs again
}

void meet(Meeting& meeting, int members, int* any) {
  if (any) meeting.any |= *any;
  if (++meeting.waiting == members) {
    meeting.waiting = 0;
    meeting.result = meeting.any;
    meeting.any = 0;
    ++meeting.met;
  } else {
    current->counter = &meeting.met;
    current->value = meeting.met;
    switch_away();
    current->counter = nullptr;
  }
  if (any) *any = meeting.result;  // nobody gets to the next meeting before all have read this
}

void run_fiber() {
  entry(parameters);
  current->done = true;
  ++current->block->ended;
  for (;;) _longjmp(scheduler, 1);
}

// Functions of their own: the compiler mistrusts every local beside a call that may return twice.
__attribute__((noinline)) void resume(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

__attribute__((noinline)) void prepare(Fiber* fiber, unsigned char* stack) {
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = stack;
  fiber->start.uc_stack.ss_size = STACK;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, run_fiber, 0);
}

unsigned char* stacks(size_t count) {  // kept for the next launch
  static unsigned char* memory = nullptr;
  static size_t held = 0;
  if (count > held) {
    if (memory) munmap(memory, held * STACK);
    memory = (unsigned char*)mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    held = memory == MAP_FAILED ? 0 : count;
    if (!held) memory = nullptr;
  }
  return memory;
}

void complete(Barrier* barrier) {
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->phase ^= 1;
    barrier->pending = barrier->expected;
  }
}

void perform(const Copy& copy) {
  (copy.into_shared ? loaded : stored) += copy.bytes;
  if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
  if (!copy.barrier) return;
  Barrier* barrier = (Barrier*)copy.barrier;
  if (copy.counts_bytes) barrier->bytes -= copy.bytes;
  if (!copy.bytes) --barrier->pending;  // the arrival behind a thread's loads
  complete(barrier);
}

void check_copy(const void* shared, const void* other, int bytes) {
  if (bytes % 16 || (uintptr_t)shared % 16 || (uintptr_t)other % 16) fail("an asynchronous copy is not aligned");
  check_shared(shared, bytes);
}

}  // namespace

void configure(const Settings& wanted) { settings = wanted; }
const Settings& configured() { return settings; }
int64_t bytes_copied(bool into_shared) { return into_shared ? loaded : stored; }
const char* last_failure() { return failure.c_str(); }

int thread_index() { return current->thread; }
int block_index() { return current->block->index; }
int block_count() { return (int)grid->blocks.size(); }
unsigned char* shared_memory() {
  unsigned char* raw = current->block->memory.data();
  return raw + (128 - (uintptr_t)raw % 128) % 128;
}
bool has_bulk() { return settings.bulk; }

void block_meet(int* any) { meet(current->block->meeting, grid->threads, any); }
void cluster_meet() { meet(*current->block->cluster, grid->threads * grid->cluster, nullptr); }

const unsigned char* peer_memory(int rank) {
  Block& peer = grid->blocks[current->block->index / grid->cluster * grid->cluster + rank];
  if (peer.ended == grid->threads) fail("a read of the shared memory of a block that has ended");
  unsigned char* raw = peer.memory.data();
  return raw + (128 - (uintptr_t)raw % 128) % 128;
}

const unsigned char* exchange(Collective kind, const void* mine, int size) {
  Warp& warp = current->block->warps[current->thread / 32];
  if (warp.waiting && (warp.kind != kind || warp.size != size)) fail("lanes of a warp meet at different collectives");
  warp.kind = kind;
  warp.size = size;
  unsigned char* data = warp.data[current->collectives++ % 2];
  memcpy(data + current->thread % 32 * size, mine, size);
  if (++warp.waiting == 32) {
    warp.waiting = 0;
    ++warp.met;
  } else {
    current->counter = &warp.met;
    current->value = warp.met;
    switch_away();
    current->counter = nullptr;
  }
  return data;
}

void pass() {
  current->passing = true;
  switch_away();
}

void check_shared(const void* address, int bytes) {
  const unsigned char* begin = shared_memory();
  if ((const unsigned char*)address < begin || (const unsigned char*)address + bytes > begin + grid->shared) {
    fail("an access outside of shared memory");
  }
}

void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  check_copy(to, from, bytes);
  current->block->loads.push_back({(unsigned char*)to, (const unsigned char*)from, bytes, barrier, -1, true, true});
}
void bulk_store(void* to, const void* from, int bytes) {
  check_copy(from, to, bytes);
  current->block->stores.push_back(
      {(unsigned char*)to, (const unsigned char*)from, bytes, nullptr, current->thread, false, false});
}
void bulk_store_wait() {
  std::vector<Copy>& stores = current->block->stores;
  std::vector<Copy> others;
  for (const Copy& copy : stores) {
    if (copy.thread == current->thread) perform(copy);
    else others.push_back(copy);
  }
  stores.swap(others);
}
void async_load(void* to, const void* from) {
  check_copy(to, from, 16);
  current->block->loads.push_back(
      {(unsigned char*)to, (const unsigned char*)from, 16, nullptr, current->thread, false, true});
}
void async_arrive(uint64_t* barrier) {
  std::vector<Copy>& loads = current->block->loads;
  for (Copy& copy : loads) {
    if (!copy.barrier && copy.thread == current->thread) {
      copy.barrier = barrier;
    }
  }
  loads.push_back({nullptr, nullptr, 0, barrier, current->thread, false, true});
}
void barrier_init(uint64_t* barrier, int arrivals) {
  check_shared(barrier, 8);
  Barrier fresh = {0, (int16_t)arrivals, (uint16_t)arrivals, 0};
  memcpy(barrier, &fresh, 8);
}
void barrier_arrive(uint64_t* barrier, int bytes) {
  Barrier* state = (Barrier*)barrier;
  if (state->pending <= 0) fail("an arrival at a barrier that expects no more");
  state->bytes += bytes;
  --state->pending;
  complete(state);
}
bool barrier_done(uint64_t* barrier, int parity) {
  Barrier* state = (Barrier*)barrier;
  if (state->phase != parity) return true;
  std::vector<Copy>& loads = current->block->loads;  // the last moment: now they are waited for
  std::vector<Copy> due, others;
  for (const Copy& copy : loads) (copy.barrier == barrier ? due : others).push_back(copy);
  loads.swap(others);
  for (const Copy& copy : due) perform(copy);
  return state->phase != parity;
}

int launch(void (*kernel)(const void*), const void* params, int blocks, int threads, int cluster, int shared,
           bool resident) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  failure.clear();
  loaded = stored = 0;
  if (blocks <= 0 || threads % 32 || blocks % cluster || shared > settings.shared_memory) return INVALID_VALUE;
  if (resident && blocks > settings.processors) return TOO_LARGE;
  Grid running;
  grid = &running;
  running.threads = threads, running.cluster = cluster, running.shared = shared;
  running.blocks.resize(blocks);
  std::vector<Meeting> clusters(blocks / cluster);
  std::vector<Fiber> fibers((size_t)blocks * threads);
  unsigned char* stack = stacks(fibers.size());
  if (!stack) return 2;  // cudaErrorMemoryAllocation
  entry = kernel;
  parameters = params;
  for (int index = 0; index < blocks; ++index) {
    Block& block = running.blocks[index];
    block.index = index;
    block.memory.assign(shared + 128 + CANARY, 0xff);  // NaN
    block.warps.resize(threads / 32);
    block.cluster = &clusters[index / cluster];
    block.fibers = &fibers[(size_t)index * threads];
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = block.fibers[thread];
      fiber.block = &block;
      fiber.thread = thread;
      fiber.started = fiber.done = fiber.passing = false;
      fiber.counter = nullptr;
      fiber.collectives = 0;
      prepare(&fiber, stack + ((size_t)index * threads + thread) * STACK);
    }
  }
  const int per_block = threads / 32;
  std::vector<int> order((size_t)blocks * per_block);
  for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
  std::mt19937 random(settings.seed);
  size_t left = fibers.size();
  for (int idle = 0; left && failure.empty();) {
    if (settings.seed) std::shuffle(order.begin(), order.end(), random);
    bool moved = false, passed = false;
    for (int warp : order) {
      Fiber* lanes = &fibers[(size_t)warp * 32];
      for (bool again = true; again && failure.empty();) {
        again = false;
        for (int lane = 0; lane < 32 && failure.empty(); ++lane) {
          if (!lanes[lane].runnable()) continue;
          resume(&lanes[lane]);
          again = true;
          if (lanes[lane].done) --left;
          if (lanes[lane].passing) passed = true;
          else moved = true;
        }
      }
    }
    if (passed) {
      for (Fiber& fiber : fibers) fiber.passing = false;
    }
    idle = moved ? 0 : idle + 1;
    if (!moved && (!passed || idle > 3) && left && failure.empty()) {
      current = &fibers[0];
      while (current->done) ++current;
      failure = "threads wait for each other for ever (block " + std::to_string(current->block->index) + ", thread " +
                std::to_string(current->thread) + " is one)";
    }
  }
  for (Block& block : running.blocks) {
    const unsigned char* end = block.memory.data() + block.memory.size();
    const unsigned char* raw = block.memory.data();
    const unsigned char* canary = raw + (128 - (uintptr_t)raw % 128) % 128 + shared;
    for (; canary < end && failure.empty(); ++canary) {
      if (*canary != 0xff) failure = "a write behind the end of shared memory";
    }
    if (failure.empty() && !block.stores.empty()) failure = "a kernel ends before its stores are done";
  }
  grid = nullptr;
  if (failure.empty()) return 0;
  fprintf(stderr, "asymvlm emulator: %s\n", failure.c_str());
  return LAUNCH_FAILURE;
}

}  // namespace emulator
}  // namespace asymvlm
