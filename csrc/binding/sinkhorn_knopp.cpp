// Sinkhorn-Knopp's side of the binding: contiguous batches that Python made or checked.
#include "cpu/sinkhorn_knopp.h"

#include "binding/arrays.h"
#include "binding/sinkhorn_knopp.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace fusedopt {
namespace {

ArrayView read_batch(ArrayReader& reader, const py::object& array, const char* prefix) {
  const ArgName name = {prefix, -1, ""};
  ArrayView view;
  reader.read(array.ptr(), name, &view);
  const auto refuse = [&](const char* why) { throw py::value_error(describe(name, array.ptr()) + why); };
  if (view.device.type != dlpack::kCpu) refuse(": expected an array on the CPU");
  if (view.complex || (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64))
    refuse(": expected float32 or float64");
  if (view.ndim != 3 || !view.contiguous()) refuse(": expected a contiguous array of three dimensions");
  if (view.shape[1] > kMostKnoppRows || view.shape[2] > kMostKnoppRows) refuse(": matrices are too large");
  return view;
}

// result = P of the logits, or, with `up`, the gradient with respect to them.
void run(const py::object& logits, const py::object& up, const py::object& result, int64_t iterations, int threads) {
  ArrayReader reader;
  const ArrayView in = read_batch(reader, logits, "logits"), out = read_batch(reader, result, "result");
  const ArrayView grad = up.is_none() ? in : read_batch(reader, up, "up");
  for (const ArrayView* other : {&out, &grad})
    if (other->dtype != in.dtype || !std::equal(in.shape, in.shape + 3, other->shape))
      throw py::value_error("logits, up and result differ in dtype or shape");
  if (out.read_only) throw py::value_error("result is read-only");
  if (iterations < 1 || iterations > kMostKnoppIterations) throw py::value_error("iterations out of range");
  if (in.numel() == 0) return;
  const KnoppTask task = {
      in.data,   up.is_none() ? nullptr : grad.data, out.data, in.dtype == DType::kFloat32, in.shape[1], in.shape[2],
      iterations};
  constexpr int64_t kMatrices = 512;  // of a chunk, a multiple of any pack's lanes
  const int64_t count = in.shape[0], chunks = (count + kMatrices - 1) / kMatrices;
  py::gil_scoped_release release;
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t end = (chunk + 1) * kMatrices;
    cpu_kernels().sinkhorn_knopp(task, chunk * kMatrices, end < count ? end : count);
  });
}

}  // namespace

void bind_sinkhorn_knopp(py::module_& module) {
  module.def("sinkhorn_knopp", &run, py::arg("logits"), py::arg("up"), py::arg("result"), py::arg("iterations"),
             py::arg("threads"));
}

}  // namespace fusedopt
