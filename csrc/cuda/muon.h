// Muon and NorMuon on a GPU. Nothing here allocates or synchronises, so all of it can be captured in a CUDA graph; a
// graph replays the arrays' addresses and whatever numbers came from the host.
//
// The table travels by value. Beside Newton-Schulz a step takes a launch for every 369 options, and for every wave of
// 2^26 elements (or one larger matrix) two of its own, four for NorMuon; more where dtypes differ, and for every 583
// matrices (292 where neighbours differ in shape, dtypes or options; of d strided dimensions, 4000 / (14 + 4 d)).
#pragma once
#include "common/muon.h"
#include "common/status.h"
#include "common/tensor_table.h"
#include "cuda/adam_scalars.h"
#include "cuda/device_number.h"
#include "math/muon.h"

namespace fusedopt::cuda {

struct MuonDeviceOptions {
  MuonOptions options;
  DeviceNumber lr, weight_decay, momentum;  // replace those of options, where there are any
};

// One step over the matrices of a table as the CPU's launcher takes it; row.scalars is an index into `options`. If
// found_inf holds anything but 0, all arrays stay as they are.
//   options, matrices, runs   host memory
//   workspace                 device memory of muon_workspace_bytes bytes, untouched until the end; its content does
//   not
//                             matter
int64_t muon_workspace_bytes(const MuonMatrix* matrices, const MuonRun* runs, int64_t count, int64_t options_size,
                             bool normuon);
Status launch_muon(const TensorTable& table, const MuonDeviceOptions* options, int64_t options_size,
                   const AdamWLossScale& loss_scale, const MuonMatrix* matrices, const MuonRun* runs, int64_t count,
                   void* workspace, cudaStream_t stream);

}  // namespace fusedopt::cuda
