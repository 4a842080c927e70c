// Lets test_elementwise.py look at what the element-wise driver decides, and run a piece of what is too large to run
// whole.
#define FUSEDOPT_TARGET cuda
#include "cuda/elementwise.cuh"

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

struct Add {  // x <- x + y
  static constexpr int kRoles = 2;
  static constexpr unsigned kOptional = 0, kWrites = 1;
  template <typename S>
  struct Scalars {};
  template <typename S>
  struct Record {
    size_t bytes() const { return 0; }
  };
  template <typename S>
  Record<S> record(const TensorRow&) const {
    return {};
  }
  bool shares(const TensorRow&, const TensorRow&) const { return true; }
  template <typename S>
  int own_bytes() const {
    return 0;
  }
  template <typename S>
  void write_own(const TensorRow&, void*) const {}
  template <typename S>
  __device__ static bool prepare(const uint64_t*, const Own&, Scalars<S>&) {
    return true;
  }
  template <typename S>
  __device__ static void update(S& x, S y, bool, const Scalars<S>&) {
    x += y;
  }
};

}  // namespace

extern "C" int row_head(void* const* data, const uint8_t* dtype, int roles, int64_t numel) {
  TensorRow row = {};
  row.numel = numel;
  for (int role = 0; role < roles; ++role) {
    row.data[role] = data[role];
    row.dtype[role] = DType(dtype[role]);
  }
  return head_of(row, roles);
}

// x <- x + y in bfloat16, in the row's last thread block alone. layout: as TensorTable has it, or null for a flat row.
extern "C" const char* add_last_chunk(void* x, void* y, int64_t numel, const int64_t* layout) {
  TensorRow row = {};
  row.data[0] = x, row.data[1] = y;
  row.dtype[0] = row.dtype[1] = DType::kBFloat16;
  row.numel = numel;
  row.layout = layout ? 0 : kFlat;
  RowPacker packer(Add::kRoles, 0);
  if (!packer.add<float>({&row, nullptr, layout, 0, 1, Add::kRoles}, row, layout ? 0 : head_of(row, Add::kRoles),
                         Add()))
    return "does not fit";
  RowTable rows = packer.rows();
  Place place = Place::unpack(rows.bits(rows.place_at(0), kPlaceUnits));
  place.first_thread_block -= rows.thread_blocks - 1;  // so that the grid's first thread block is the row's last
  const uint64_t moved = place.pack();
  memcpy(rows.units + rows.place_at(0), &moved, sizeof moved);
  rows.thread_blocks = 1;
  using Kernel = void (*)(const RowTable __grid_constant__);
  const Kernel kernel =
      layout ? Kernel(any_elementwise_kernel<Add, float>) : Kernel(elementwise_kernel<Add, Format<BFloat16, BFloat16>>);
  return launch_packed(kernel, rows, nullptr).error;
}
