// Newton–Schulz of one matrix on one instruction set, for ctypes.
#include <cstdlib>

#include "cpu/newton_schulz.h"
#include "cpu/operand.h"

namespace fusedopt::FUSEDOPT_TARGET {
void newton_schulz(const NewtonSchulzTask& task, void* workspace, int threads);
int64_t newton_schulz_bytes(int64_t rows, int64_t columns, DType arithmetic, bool gram);
}  // namespace fusedopt::FUSEDOPT_TARGET

// steps: a, b, c and whether to restart before, for each.
extern "C" void newton_schulz_of_bfloat16(const uint16_t* in, uint16_t* out, int64_t rows, int64_t columns,
                                          const double* steps, int64_t count, int gram, int threads) {
  using namespace fusedopt;
  namespace isa = FUSEDOPT_TARGET;
  NewtonSchulzMatrix matrix = {in, out, rows, columns, columns, columns};
  matrix.in_dtype = matrix.out_dtype = DType::kBFloat16;
  NewtonSchulzSchedule schedule = {{}, 0, DType::kBFloat16};
  for (int64_t t = 0; t < count; ++t, steps += 4)
    schedule.steps.push_back({steps[0], steps[1], steps[2], steps[3] != 0});
  const NewtonSchulzTask task = {&matrix, schedule.steps.data(), count, gram != 0, DType::kBFloat16, DType::kBFloat16};
  void* const workspace = aligned_alloc(64, isa::newton_schulz_bytes(rows, columns, DType::kBFloat16, gram != 0));
  isa::newton_schulz(task, workspace, threads);
  free(workspace);
}
