// Which instruction set the CPU kernels run on: the widest this machine has, or the one asked for.
#pragma once
#include "cpu/kernels.h"

namespace fusedopt {

const char* isa();                  // "avx512_bf16", "avx512", "avx2" or "portable"
bool select_isa(const char* name);  // false: unknown, not built for this architecture, or this CPU lacks it
bool isa_available(const char* name);
const CpuKernels& cpu_kernels();

}  // namespace fusedopt
