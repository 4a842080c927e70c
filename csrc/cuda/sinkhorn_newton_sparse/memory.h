// How a problem is cut, which follows from its shape alone so that every sum has one order on any grid, and how the
// caller's memory is divided: about 1.5 n m doubles and a strip of column sums for each chunk of rows.
#pragma once
#include <cstdint>

#include "math/target.h"

namespace fusedopt::cuda {

constexpr int kWarp = 32, kMostThreads = 512, kMostWarps = kMostThreads / kWarp;
constexpr int kLanesPerList = 8;         // threads that share a row or a column of kept entries
constexpr int64_t kMostChunks = 264;     // two for each multiprocessor of the largest GPUs
constexpr int64_t kSmallChunk = 512;     // elements; chunks are not made smaller
constexpr int64_t kAlwaysShared = 5888;  // columns whose row and sums fit in any GPU's shared memory
constexpr int64_t kKeepAll = 65536;      // elements up to which there is room to keep them all

HOST_DEVICE inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
HOST_DEVICE inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct TransportShape {
  int64_t n, m;
  bool wide;    // a thread block to a row, else a warp
  int threads;  // of a thread block
  int64_t chunk_rows, chunks;
  int64_t chunk_room;  // entries that a chunk may keep
  int64_t tiles;       // of 32 columns

  HOST_DEVICE static TransportShape of(int64_t n, int64_t m) {
    TransportShape shape = {n, m, m > 512, m <= 512 ? 128 : m <= 2048 ? 256 : kMostThreads,
                            0, 0, 0,       ceil_div(m, kWarp)};
    shape.chunk_rows = larger_of(ceil_div(n, kMostChunks), ceil_div(kSmallChunk, m));
    shape.chunks = ceil_div(n, shape.chunk_rows);
    const int64_t all = shape.chunk_rows * m;
    shape.chunk_room = n * m <= kKeepAll ? all : all / 2 + 1;
    return shape;
  }
  HOST_DEVICE int64_t partials() const { return (n > m ? n : m) / 4 + 64; }  // of one sum
  // Doubles of shared memory for rows and column sums of all groups of a thread block.
  HOST_DEVICE int64_t shared_doubles() const { return 2 * m * (wide ? 1 : threads / kWarp); }
};

struct TransportMemory {
  double *log_a, *inverse_a, *row_value;  // n
  double *log_b, *columns, *base, *best, *step, *residual, *image, *preconditioned, *direction, *diagonal,
      *jacobi;              // m
  double *partial, *slack;  // [chunks][m]; slack where rows do not fit in shared memory
  double* chunk_sums;       // [kChunkSums][chunks]
  double* partials[2];      // of sums over a grid, in turns
  // Kept entries: by rows, each chunk in its own room, and by columns, without gaps.
  double *value, *column_value;
  int32_t *column, *row;
  int64_t *row_begin, *column_begin;  // n, m + 1
  int32_t *row_count, *counts;        // n, [chunks][m]

  static constexpr int kChunkSums = 6;

  // Returns the bytes it takes.
  HOST_DEVICE int64_t carve(char* base_address, const TransportShape& shape) {
    char* at = base_address;
    const int64_t n = shape.n, m = shape.m, chunks = shape.chunks, room = chunks * shape.chunk_room;
    take(at, log_a, n), take(at, inverse_a, n), take(at, row_value, n);
    take(at, log_b, m), take(at, columns, m), take(at, base, m), take(at, best, m), take(at, step, m);
    take(at, residual, m), take(at, image, m), take(at, preconditioned, m), take(at, direction, m);
    take(at, diagonal, m), take(at, jacobi, m);
    take(at, partial, chunks * m), take(at, slack, m > kAlwaysShared ? chunks * m : 0);
    take(at, chunk_sums, kChunkSums * chunks);
    take(at, partials[0], shape.partials()), take(at, partials[1], shape.partials());
    take(at, value, room), take(at, column_value, room), take(at, column, room), take(at, row, room);
    take(at, row_begin, n), take(at, column_begin, m + 1), take(at, row_count, n), take(at, counts, chunks * m);
    return at - base_address;
  }

 private:
  template <typename T>
  HOST_DEVICE static void take(char*& at, T*& array, int64_t count) {
    array = reinterpret_cast<T*>(at);
    at += (count * int64_t(sizeof(T)) + 127) / 128 * 128;
  }
};

}  // namespace fusedopt::cuda
