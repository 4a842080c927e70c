// How the caller's memory is divided: about 1.2 n m doubles (0.6 with low_memory), of which a solve touches what its
// plan needs.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "cpu/pack_bits.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kMaxLanes = 8;    // of doubles, in any instruction set: sizes are the same in all
constexpr int64_t kAlign = 16;  // padded columns are whole groups of two packs

inline int64_t padded(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

// Rows are split into the same chunks whatever the number of threads, so that sums have a fixed tree.
inline int64_t chunk_count(int64_t n, int64_t m) {
  const int64_t by_size = n * m / 16384 + 1, most = by_size < 16 ? by_size : 16;
  return n < most ? (n > 1 ? n : 1) : most;
}

// Edges of the graph that the tree-like preconditioner takes on.
inline int64_t max_edges(int64_t n, int64_t m, bool low_memory) {
  const int64_t sparse = (low_memory ? 6 : 12) * (n + m);
  return n * m < sparse ? n * m : sparse;
}

class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Workspace {
  int64_t mp, chunks, edge_room, factor_room;
  // The pass.
  double *log_a, *log_b, *b, *f, *g, *columns, *row_error;
  double *slack, *partial;  // per chunk: a row, and its column sums
  int32_t* live;            // per chunk: the groups of a row above the cut
  // The plan's larger entries: blocks of one pack, up to row_room of them in a row.
  int64_t row_room;
  double* blocks;
  int32_t *block_column, *block_count;
  // Newton.
  double *base, *best, *old_f, *step, *residual, *image, *preconditioned, *direction, *diagonal, *jacobi;
  // The approximate factor.
  double *node, *ground, *pivot, *edge_weight, *factor_weight, *near_weight;
  int32_t *head, *order, *place, *edge_next, *edge_other, *factor_other, *near_node, *mark, *adjacent;
  int64_t *factor_begin, *adjacent_begin;
  int64_t bytes;

  double* row_blocks(int64_t i) const { return blocks + i * row_room * Pack<double>::kLanes; }
  int32_t* row_columns(int64_t i) const { return block_column + i * row_room; }

  Workspace(void* memory, int64_t n, int64_t m, bool low_memory)
      : mp(padded(m)), chunks(chunk_count(n, m)), edge_room(max_edges(n, m, low_memory)), factor_room(4 * edge_room) {
    Carver carver(memory);
    row_room = mp / Pack<double>::kLanes / (low_memory ? 2 : 1);
    for (double** at : {&log_a, &f, &row_error, &old_f}) *at = carver.take<double>(n);
    for (double** at : {&log_b, &b, &g, &columns, &base, &best, &step, &residual, &image, &preconditioned, &direction,
                        &diagonal, &jacobi})
      *at = carver.take<double>(mp);
    slack = carver.take<double>(chunks * mp);
    partial = carver.take<double>(chunks * mp);
    live = carver.take<int32_t>(chunks * mp);
    blocks = carver.take<double>(n * row_room * Pack<double>::kLanes);
    block_column = carver.take<int32_t>(n * row_room);
    block_count = carver.take<int32_t>(n);
    const int64_t nodes = n + m, edges = edge_room, factor = factor_room;
    for (double** at : {&node, &ground, &pivot, &near_weight}) *at = carver.take<double>(nodes);
    for (int32_t** at : {&head, &order, &place, &near_node, &mark}) *at = carver.take<int32_t>(nodes + 1);
    edge_weight = carver.take<double>(edges);
    edge_next = carver.take<int32_t>(edges);
    edge_other = carver.take<int32_t>(edges);
    adjacent = carver.take<int32_t>(2 * edges);
    factor_weight = carver.take<double>(factor);
    factor_other = carver.take<int32_t>(factor);
    factor_begin = carver.take<int64_t>(nodes + 1);
    adjacent_begin = carver.take<int64_t>(nodes + 2);
    bytes = carver.used() + 64;
  }
};

}  // namespace fusedopt::FUSEDOPT_TARGET
