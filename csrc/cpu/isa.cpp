#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace fusedopt {
namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*available)();
};

#if defined(__x86_64__)
// All of AVX-512, but for the products of bfloat16.
const CpuKernels kAvx512Bf16 = [] {
  CpuKernels kernels = avx512::kernels;
  kernels.newton_schulz = avx512_bf16::newton_schulz;
  kernels.newton_schulz_bytes = avx512_bf16::newton_schulz_bytes;
  return kernels;
}();

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

constexpr Isa kIsas[] = {
// widest first
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512Bf16, has_avx512_bf16},
    {"avx512", &avx512::kernels, has_avx512},
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"portable", &portable::kernels, [] { return true; }},
};

const Isa* widest() {
  for (const Isa& isa : kIsas)
    if (isa.available()) return &isa;
  return nullptr;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{widest()};
  return isa;
}

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas)
    if (strcmp(isa.name, name) == 0 && isa.available()) return &isa;
  return nullptr;
}

}  // namespace

const char* isa() { return selected().load()->name; }
bool isa_available(const char* name) { return find(name) != nullptr; }
bool select_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) selected().store(isa);
  return isa != nullptr;
}
const CpuKernels& cpu_kernels() { return *selected().load()->kernels; }

}  // namespace fusedopt
