// Compiles an unmodified .cu file as C++: g++ -x c++ -include shim.h, against the CUDA toolkit's
// own headers. What the language adds to C++ is defined here; build.py holds the command, README.md
// the limits.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define CUDA_HOST_SHIM 1

// A thread_local is storage that the runtime can find as a whole (the module's TLS segment), fill
// before a thread block starts and swap when several are resident, in templates too, where g++
// ignores a section attribute. build.py pads each variable, so that ASan has redzones to poison.
#undef __shared__
#define __shared__ static thread_local

#undef __constant__
#define __constant__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

// `const Table __grid_constant__ table` becomes a reference: on a GPU the threads share that
// parameter too, and a copy of a large table for each of them would dwarf the kernel's own work.
#undef __grid_constant__
#define __grid_constant__ &

// The runtime sets these whenever it hands the processor to another thread of the grid.
#define CUDA_HOST_HIDDEN __attribute__((visibility("hidden")))
extern CUDA_HOST_HIDDEN uint3 threadIdx, blockIdx;
extern CUDA_HOST_HIDDEN dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "device_functions.h"
#include "machine.h"
