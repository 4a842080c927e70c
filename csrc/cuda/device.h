// What the CUDA runtime says of this machine, for the environment report. Needs no GPU and no driver.
#pragma once

namespace fusedopt::cuda {

int device_count(const char** error);  // 0 with the reason in *error if there is no usable device
int runtime_version();                 // 13000 for CUDA 13.0

}  // namespace fusedopt::cuda
