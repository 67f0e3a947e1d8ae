// prune_sequence in one launch: V is read once from memory, kept rows leave from shared memory into the final buffer.
//
//   rows and masks -> ring in shared memory -> products with t' in registers -> parts of the team -> scores, keys in L2
//   -> (all blocks of a sample have arrived) -> every block ranks the sample -> kept rows, index, carried tensors
//
// What orders what: an mbarrier each row group behind its load (ring.cuh); block_sync the steps of a block; the team's
// sync the partial sums of a row, through the cluster or L2 (team.cuh); one counter a sample, waited for by every block
// that owns rows of it, the keys. A block arrives there behind its last read of a peer's shared memory, so nobody ends
// before its readers. All blocks are resident (cooperative launch), so every wait ends. Counters are zero before and
// after; nothing is summed in an order that depends on who comes first.
#include "launch.h"
#include "move.cuh"

namespace asymvlm {

struct PruneCall {
  AsymvlmPrune call;
  AsymvlmPlan plan;
};

template <class T>
KERNEL(PRUNE_THREADS) prune_kernel(GRID_CONSTANT PruneCall all) {
  const AsymvlmPrune& call = all.call;
  const AsymvlmPlan& plan = all.plan;
  const SharedMap map = shared_map(plan, call.S, sizeof(T));
  unsigned char* shared = shared_memory();
  PruneScratch& scratch = *(PruneScratch*)(shared + map.scratch);
  const int rank = block_index() % plan.team, number = block_index() / plan.team;
  const int items = call.B * plan.items, own_items = ceil_div(items - number, plan.teams);
  const int groups = own_items * plan.groups;

  const int left = call.D - rank * plan.slice;
  Ring<T> ring = {shared + map.ring, (uint64_t*)(shared + map.barriers), row_bytes(plan.slice, sizeof(T)), plan.ring,
                  left < plan.slice ? left : plan.slice, plan.wide != 0};
  float* workspace = (float*)call.workspace;
  uint32_t* keys = (uint32_t*)workspace;
  int32_t* has_text = (int32_t*)workspace + workspace_flags(call);
  const bool in_shared = USES_CLUSTERS(plan) || plan.team == 1;
  const int64_t stride = part_floats(plan);
  float* parts = in_shared ? (float*)(shared + map.parts) : workspace + workspace_parts(call) + block_index() * stride;
  Team team = {plan.team, rank, number, USES_CLUSTERS(plan) != 0, parts,
               in_shared ? scratch.norms : parts + stride - TEXT, stride, call.counters + 2 * (call.B + number), 0};
  Scorer<T> scorer = {call, plan, scratch, ring, team, (float*)(shared + map.best), (float*)(shared + map.squares),
                      shared + map.roles, keys, groups, false, false};
  ring.init(plan.slice);
  for (int q = 0; q < plan.ring; ++q) scorer.fetch(q);

  const int expected = plan.items * plan.team;  // blocks that score rows of a sample
  for (int i = 0; i < own_items; ++i) {
    const Item item = item_of(call, plan, number + i * plan.teams);
    const bool text = scorer.score(item, i * plan.groups);
    if (thread_index() == 0) {
      if (item.first == 0 && rank == 0) has_text[item.sample] = text;
      arrive(call.counters + 2 * item.sample);
    }
  }
  Mover<T> mover = {call, plan, scratch, ring, rank, groups, keys, has_text,
                    plan.keys_in_shared ? (uint32_t*)(shared + map.keys) : nullptr};
  for (int i = own_items - 1; i >= 0; --i) {  // the rows that came last are the likeliest to be near
    const Item item = item_of(call, plan, number + i * plan.teams);
    int32_t* counter = call.counters + 2 * item.sample;
    if (thread_index() == 0) {
      wait_for(counter, expected);
      if (arrive(counter + 1) == expected - 1) counter[0] = counter[1] = 0;  // all have seen it
    }
    block_sync();
    mover.select_and_move(item, i * plan.groups);
  }
  team.leave();
}

inline bool aligned(const void* pointer) { return (uintptr_t)pointer % 16 == 0; }

// Whether rows can be read and written 16 bytes at a time. Strides of an axis of one do not count.
inline bool rows_are_wide(const AsymvlmPrune& call, int itemsize) {
  const int elements = 16 / itemsize;
  return call.D % elements == 0 && call.embeds_d == 1 && aligned(call.embeds) && aligned(call.out) &&
         (call.S == 1 || call.embeds_s % elements == 0) && (call.B == 1 || call.embeds_b % elements == 0) &&
         (!call.weight || (call.weight_d == 1 && aligned(call.weight)));
}

inline int itemsize_of(const AsymvlmPrune& call) { return call.dtype == ASYMVLM_FLOAT32 ? 4 : 2; }

inline bool is_valid(const AsymvlmPrune& call) {
  return call.dtype >= ASYMVLM_FLOAT32 && call.dtype <= ASYMVLM_BFLOAT16 && call.B > 0 && call.S > 0 &&
         call.S <= ASYMVLM_LONGEST && call.D > 0 && call.D <= ASYMVLM_WIDEST && call.capacity >= 0 &&
         call.carries >= 0 && call.carries <= ASYMVLM_MOST_CARRIES;
}

template <class T>
int make_plan(const AsymvlmPrune& call, AsymvlmPlan* plan) {
  Device device;
  int code = describe_device<prune_kernel<T>>(&device);
  if (code) return code;
  *plan = {};
  plan->team = 1;
  while (plan->team * MOST_COLUMNS < call.D) plan->team *= 2;
  plan->slice = ceil_div(ceil_div(call.D, STEP), plan->team) * STEP;
  plan->wide = rows_are_wide(call, sizeof(T));
  plan->clusters = device.clusters;
  code = resident_blocks<prune_kernel<T>>(
      device, {0, PRUNE_THREADS, plan->clusters ? plan->team : 1, device.shared, true}, &plan->resident);
  if (code) return code;
  const int most = plan->resident / plan->team, groups = ceil_div(call.S, GROUP);
  if (most == 0) return TOO_LARGE;
  const int fair = most / call.B;
  plan->items = fair < 1 ? 1 : fair < groups ? fair : groups;
  plan->groups = ceil_div(groups, plan->items);
  plan->items = ceil_div(groups, plan->groups);
  const int64_t items = (int64_t)call.B * plan->items;
  plan->teams = items < most ? (int)items : most;
  const int64_t own = (items + plan->teams - 1) / plan->teams * plan->groups;  // groups of one team

  auto ring_beside_keys = [&](bool keys) {  // groups that fit, at most what the team needs; 0 if none does
    plan->keys_in_shared = keys;
    for (plan->ring = 1; shared_map(*plan, call.S, sizeof(T)).total <= device.shared; ++plan->ring) {
      if (plan->ring == MOST_GROUPS || plan->ring >= own) return plan->ring;
    }
    return --plan->ring;
  };
  const int without = ring_beside_keys(false), with = ring_beside_keys(true);
  if (without == 0) return INVALID_VALUE;
  // keys that are read again from L2 cost less than V read again from memory, or loads that nothing hides
  const bool keys = with == without || (with < own && without < own && with >= 4);
  plan->ring = ring_beside_keys(keys);
  plan->shared = shared_map(*plan, call.S, sizeof(T)).total;
  plan->workspace = 4 * workspace_floats(call, *plan);
  plan->counters = counter_count(call, *plan);
  return 0;
}

// A plan may be another than make_plan's, but not one that a kernel would read or write outside of.
inline bool fits(const AsymvlmPrune& call, const AsymvlmPlan& plan, const Device& device) {
  const int itemsize = itemsize_of(call);
  return plan.team >= 1 && plan.team <= 8 && plan.slice > 0 && plan.slice <= MOST_COLUMNS && plan.slice % STEP == 0 &&
         plan.slice * plan.team >= call.D && plan.slice * (plan.team - 1) < call.D && plan.teams >= 1 &&
         plan.items >= 1 && plan.groups >= 1 && plan.teams <= (int64_t)call.B * plan.items &&
         (int64_t)plan.items * plan.groups * GROUP >= call.S && plan.ring >= 1 && plan.ring <= MOST_GROUPS &&
         (!plan.wide || rows_are_wide(call, itemsize)) && plan.clusters == (int)device.clusters &&
         shared_map(plan, call.S, itemsize).total <= plan.shared && plan.shared <= device.shared &&
         plan.workspace >= 4 * workspace_floats(call, plan) && plan.counters >= counter_count(call, plan);
}

template <class T>
int launch_prune(const AsymvlmPrune& call, const AsymvlmPlan& plan, void* stream) {
  Device device;
  if (const int code = describe_device<prune_kernel<T>>(&device)) return code;
  if (!fits(call, plan, device)) return INVALID_VALUE;
  const Shape shape = {plan.team * plan.teams, PRUNE_THREADS, plan.clusters ? plan.team : 1, plan.shared, true};
  return launch<prune_kernel<T>>(PruneCall{call, plan}, shape, stream);
}

}  // namespace asymvlm

using namespace asymvlm;

ASYMVLM_API int asymvlm_prune_plan(const AsymvlmPrune* call, AsymvlmPlan* plan) {
  if (!is_valid(*call)) return INVALID_VALUE;
  switch (call->dtype) {
    case ASYMVLM_FLOAT32: return make_plan<float>(*call, plan);
    case ASYMVLM_FLOAT16: return make_plan<Half>(*call, plan);
    default: return make_plan<Bfloat>(*call, plan);
  }
}

ASYMVLM_API int asymvlm_prune(const AsymvlmPrune* call, const AsymvlmPlan* plan, void* stream) {
  if (!is_valid(*call)) return INVALID_VALUE;
  switch (call->dtype) {
    case ASYMVLM_FLOAT32: return launch_prune<float>(*call, *plan, stream);
    case ASYMVLM_FLOAT16: return launch_prune<Half>(*call, *plan, stream);
    default: return launch_prune<Bfloat>(*call, *plan, stream);
  }
}
