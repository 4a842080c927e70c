// What the CUDA runtime says of this machine's devices, and which one is current. Needs no GPU and no driver.
#pragma once
#include "common/status.h"

namespace fusedopt::cuda {

int device_count(const char** error);  // 0 with the reason in *error if there is no usable device
int runtime_version();                 // 13000 for CUDA 13.0
int architecture(int device);          // 90 for sm_90; 0 if it can't be told

// Makes a device current for the calling thread until the end of its scope: a launch goes to the current device,
// whatever the stream.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int before_ = -1;  // -1: nothing to restore
  Status status_;
};

}  // namespace fusedopt::cuda
