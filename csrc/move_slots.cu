// move_slots_: rows of all layers' K and V move within their tensors, in one launch.
//
// A table names, for each entry, where rows of contiguous bytes lie (asymvlm_kernels/decode/address_table.py). A block
// owns one row of one entry in one sample; its warps take turns at the moves, some lanes of a warp to each, and stop at
// the first that is none: real moves come first. No slot is both read and written, so nothing has to be ordered.
#include "asymvlm.h"
#include "launch.h"

namespace asymvlm {

constexpr int MOVE_THREADS = 256, FIELDS = 6;

struct MoveCall {
  AsymvlmMoves call;
  int workers;  // blocks that share the moves of a row
};

template <class W>
DEVICE void move_row(const AsymvlmMoves& call, int entry, int r, int b, int worker, int workers) {
  const int64_t* fields = call.table + (int64_t)entry * FIELDS;
  if (r >= fields[4]) return;
  const int64_t word = call.word, stride_s = fields[2] * word;
  unsigned char* row = (unsigned char*)call.origin + (fields[0] + b * fields[1] + r * fields[3]) * word;
  const int pieces = (int)(fields[5] * word / (int)sizeof(W));
  int lanes = 1;  // to a move
  while (lanes < 32 && lanes < pieces) lanes *= 2;
  const int at_once = MOVE_THREADS / lanes, lane = thread_index() % lanes;
  for (int i = worker * at_once + thread_index() / lanes; i < call.M; i += workers * at_once) {
    const int64_t to = call.target[b * call.target_b + i * call.target_m];
    if (to < 0) return;
    const int64_t from = call.source[b * call.source_b + i * call.source_m];
    const W* source = (const W*)(row + from * stride_s);
    W* target = (W*)(row + to * stride_s);
    for (int piece = lane; piece < pieces; piece += lanes) target[piece] = source[piece];
  }
}

KERNEL(MOVE_THREADS) move_kernel(GRID_CONSTANT MoveCall all) {
  const AsymvlmMoves& call = all.call;
  int number = block_index();
  const int worker = number % all.workers;
  number /= all.workers;
  const int r = number % call.rows, entry = number / call.rows % call.entries, b = number / call.rows / call.entries;
  switch (call.access) {
    case 1: return move_row<uint8_t>(call, entry, r, b, worker, all.workers);
    case 2: return move_row<uint16_t>(call, entry, r, b, worker, all.workers);
    case 4: return move_row<uint32_t>(call, entry, r, b, worker, all.workers);
    case 8: return move_row<uint64_t>(call, entry, r, b, worker, all.workers);
    default: return move_row<uint4>(call, entry, r, b, worker, all.workers);
  }
}

inline bool is_size(int bytes, int most) { return bytes > 0 && bytes <= most && (bytes & (bytes - 1)) == 0; }

}  // namespace asymvlm

using namespace asymvlm;

ASYMVLM_API int asymvlm_move_slots(const AsymvlmMoves* call, void* stream) {
  if (call->B < 0 || call->M < 0 || call->entries < 0 || call->rows < 0 || !is_size(call->word, 8) ||
      !is_size(call->access, 16)) {
    return INVALID_VALUE;
  }
  const int64_t rows = (int64_t)call->B * call->entries * call->rows;
  if (rows == 0 || call->M == 0) return 0;
  Device device;
  if (const int code = describe_device<move_kernel>(&device)) return code;
  const int wanted = (call->M + 63) / 64;  // 16 lanes and 4 moves in turn to each row of 256 bytes
  const MoveCall all = {*call, wanted < 8 ? wanted : 8};
  if (rows * all.workers > 0x7fffffff) return INVALID_VALUE;
  return launch<move_kernel>(all, {(int)rows * all.workers, MOVE_THREADS, 1, 0, false}, stream);
}
