// Newton–Schulz on the CPU: launchers.
#pragma once
#include "common/newton_schulz.h"
#include "common/status.h"

namespace fusedopt {

struct NewtonSchulzTask {
  const NewtonSchulzMatrix* matrix;
  const NewtonSchulzStep* steps;
  int64_t count;  // of steps
  bool gram;
  DType dtype, arithmetic;  // as in the schedule
};

namespace cpu {

// The workspace is of this size, aligned to 64 bytes; its content does not matter. Its size depends on the number of
// threads, the result does not.
int64_t newton_schulz_workspace_bytes(const NewtonSchulzMatrix* matrices, int64_t count,
                                      const NewtonSchulzSchedule& schedule, int threads);
Status launch_newton_schulz(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule,
                            void* workspace, int threads);

}  // namespace cpu
}  // namespace fusedopt
