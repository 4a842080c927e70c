// A batch of matrices of one shape: how it travels to the kernels, and where it lies in the workspace. Inside, every
// matrix has its short side as rows, n x m.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/newton_schulz.h"
#include "cuda/newton_schulz/product.h"
#include "math/newton_schulz.h"

namespace fusedopt::cuda {

constexpr int kMaxMatrices = 512;
constexpr int kThreads = 256;        // of all kernels but the products
constexpr int kTile = 64;            // loading and storing go by tiles of 64 x 64
constexpr int64_t kMaxChunks = 256;  // that a matrix is inspected in
constexpr int64_t kChunk = 4096;     // elements of one, about
constexpr int kRowAlignment = 8;     // rows begin at multiples of so many elements, so of 16 bytes
constexpr int64_t kNoDifference = int64_t(~uint64_t(0) >> 1);

struct OuterMatrix {  // the caller's, turned so that its short side lies in rows; strides in elements
  void* data;
  int64_t row, column;
  DType dtype;
};
struct OuterMatrices {  // by value in the kernels' arguments
  OuterMatrix items[kMaxMatrices];
};

// Square matrices are turned by what they hold, so that one and its transpose become the same: of the first two
// mirrored elements that differ, the larger comes to lie above the diagonal. A symmetric one has a symmetric result.
enum class Turn : int32_t { kNo, kTransposed, kSymmetric };

struct Finding {             // in a chunk of a matrix
  double largest;            // magnitude; NaN if there is one
  int64_t first_difference;  // i n + j of the first elements (i, j) and (j, i), i < j, that differ
};

HOST_DEVICE inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
HOST_DEVICE inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Codec: how the products' operands lie in memory. S: what they are added up in.
template <typename Codec>
struct Batch {
  using Stored = typename Codec::Stored;
  using S = decltype(Codec::decode({}));

  int64_t n, m, count;
  int64_t x_stride, square_stride;  // from row to row, in elements
  Stored* x[2];
  Stored* squares[5];    // n x n each; the standard form has two
  Scale<Codec>* scales;  // 1 / ||X||, by which X is to be multiplied until the first product that makes a new X
  Turn* turns;
  Finding* findings;  // [count][chunks]
  double* sums;       // of squares, [count][tiles]
  int64_t bytes = 0;

  Batch(int64_t rows, int64_t columns, int64_t matrices, bool gram, char* workspace)
      : n(rows),
        m(columns),
        count(matrices),
        x_stride(round_up(columns, kRowAlignment)),
        square_stride(round_up(rows, kRowAlignment)) {
    const auto take = [&](auto*& array, int64_t size) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(uintptr_t(workspace) + bytes);
      bytes += round_up(size * int64_t(sizeof(*array)), 256);
    };
    for (Stored*& matrix : x) take(matrix, count * x_size());
    for (int i = 0; i < (gram ? 5 : 2); ++i) take(squares[i], count * square_size());
    take(scales, count);
    take(turns, count);
    take(findings, count * chunks());
    take(sums, count * tiles());
  }

  HOST_DEVICE int64_t x_size() const { return n * x_stride; }
  HOST_DEVICE int64_t square_size() const { return n * square_stride; }
  HOST_DEVICE int64_t chunks() const {
    const int64_t wanted = (n * m + kChunk - 1) / kChunk;
    return wanted < kMaxChunks ? wanted : kMaxChunks;
  }
  HOST_DEVICE int64_t tiles() const { return tiles_of(n) * tiles_of(m); }
};

}  // namespace fusedopt::cuda
