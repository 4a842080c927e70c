// The dtypes that kernels store. Complex arrays appear as their real view, so there is no complex here.
#pragma once
#include <cstdint>

namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt32, kInt64 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    default: return 2;
  }
}

constexpr bool is_floating(DType dtype) { return dtype <= DType::kFloat16; }

}  // namespace fusedopt
