// What tests may ask and change from outside, by ctypes. The environment decides the rest, at every
// launch: CUDA_HOST_SEED (0 and 1: threads and blocks in ascending and descending order; others
// shuffle), CUDA_HOST_SMS (default 4), CUDA_HOST_ARCH (default 90), CUDA_HOST_DEVICES (default 1),
// CUDA_HOST_FAIL (n: the n-th launch since they were taken has no image for the device), CUDA_HOST_KERNEL_LOG (a file
// to which each kernel's name is appended when it first runs; in a sanitised build a tab follows, and "address" or
// "race").
#pragma once

extern "C" {
// Names of the kernels that have run since the library was loaded, one per line.
const char* cuda_host_kernels();

// The launches since the last call, one per line, fields separated by tabs:
// kernel, grid "x,y,z", block "x,y,z", dynamic shared bytes, stream as an integer, "cooperative" or
// "", the current device. A launch that the driver would refuse is not among them.
const char* cuda_host_take_launches();
}
