// The twins of csrc/cuda/ptx.cuh: what its instructions do, on the host. Each checks what the
// instruction demands (alignment, shared memory, all lanes present) and ends the launch otherwise.
#pragma once
#include "device_functions.h"
#include "math/storage.h"

namespace cuda_host {

inline void check_shared(const void* address, const char* what) {
  check_alignment(static_cast<const char*>(address), 16);
  if (!is_shared_memory(address, 16)) fail("%s: %p is not in shared memory", what, address);
}

inline double bf16_value(uint32_t bits) { return double(from_bits<float>(bits << 16)); }
inline double fp16_value(uint32_t bits) { return fusedopt::FUSEDOPT_TARGET::fp16_to_float(uint16_t(bits)); }

// Tensor cores add exact products in fp32 and truncate (Fasi et al., PeerJ CS 2021). Here the sum
// is exact too: a GPU's may differ in the last bits, so tests of it need a tolerance.
inline float round_toward_zero(double sum) {
  const float nearest = float(sum);
  const bool grew = std::fabs(double(nearest)) > std::fabs(sum) && !std::isinf(nearest);
  return grew ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <typename Decode>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Decode decode, Site site) {
  constexpr uint32_t kAll = ~0u;
  uint32_t a_of[4][kWarpSize], b_of[2][kWarpSize];  // by register and lane
  const auto gather = [&](uint32_t(*of)[kWarpSize], const uint32_t* registers) {
    const uint64_t two = uint64_t(registers[1]) << 32 | registers[0];
    const Exchange lanes = warp_exchange(kAll, two, "mma", site);
    if (lanes.present != kAll) fail("mma at %s:%d needs all lanes", site.file, site.line);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      of[0][lane] = uint32_t(lanes.value[lane]);
      of[1][lane] = uint32_t(lanes.value[lane] >> 32);
    }
  };
  gather(a_of, a);
  gather(a_of + 2, a + 2);
  gather(b_of, b);
  const auto half = [&](uint32_t two, int k) { return decode(k % 2 ? two >> 16 : two & 0xffff); };
  const int g = lane_id() / 4, t = lane_id() % 4;
  double row[2][16], column[2][16];  // g and g + 8 of a, 2 t and 2 t + 1 of b
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 16; ++k) {
      const int lane_of_k = k % 8 / 2;
      row[i][k] = half(a_of[i + 2 * (k / 8)][4 * g + lane_of_k], k);
      column[i][k] = half(b_of[k / 8][4 * (2 * t + i) + lane_of_k], k);
    }
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += row[i / 2][k] * column[i % 2][k];
    d[i] = round_toward_zero(sum);
  }
}

struct MatrixRow {  // 8 numbers of 16 bits
  uint16_t number[8];
};

inline void gather_rows(MatrixRow (&rows)[kWarpSize], const void* row, Site site) {
  check_shared(row, "ldmatrix");
  const uint4 mine = *static_cast<const uint4*>(row);  // read here, where the sanitizers look on
  const uint64_t halves[2] = {uint64_t(mine.y) << 32 | mine.x, uint64_t(mine.w) << 32 | mine.z};
  for (int h = 0; h < 2; ++h) {
    const Exchange lanes = warp_exchange(~0u, halves[h], "ldmatrix", site);
    if (lanes.present != ~0u) fail("ldmatrix at %s:%d needs all lanes", site.file, site.line);
    for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(rows[lane].number + 4 * h, &lanes.value[lane], 8);
  }
}

}  // namespace cuda_host

namespace fusedopt {

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              cuda_host::Site site = cuda_host::Site::here()) {
  cuda_host::mma_m16n8k16(d, a, b, cuda_host::bf16_value, site);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             cuda_host::Site site = cuda_host::Site::here()) {
  cuda_host::mma_m16n8k16(d, a, b, cuda_host::fp16_value, site);
}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(FUSEDOPT_TARGET::float_to_bf16(high)) << 16 | FUSEDOPT_TARGET::float_to_bf16(low);
}
inline uint32_t pack_f16(float low, float high) {
  return uint32_t(FUSEDOPT_TARGET::float_to_fp16(high)) << 16 | FUSEDOPT_TARGET::float_to_fp16(low);
}

inline float unpack_f16(uint16_t bits) { return FUSEDOPT_TARGET::fp16_to_float(bits); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, cuda_host::Site site = cuda_host::Site::here()) {
  cuda_host::MatrixRow rows[32];
  cuda_host::gather_rows(rows, row, site);
  const int g = cuda_host::lane_id() / 4, t = cuda_host::lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    const uint16_t* numbers = rows[8 * i + g].number;
    r[i] = uint32_t(numbers[2 * t + 1]) << 16 | numbers[2 * t];
  }
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, cuda_host::Site site = cuda_host::Site::here()) {
  cuda_host::MatrixRow rows[32];
  cuda_host::gather_rows(rows, row, site);
  const int g = cuda_host::lane_id() / 4, t = cuda_host::lane_id() % 4;
  for (int i = 0; i < 4; ++i) r[i] = uint32_t(rows[8 * i + 2 * t + 1].number[g]) << 16 | rows[8 * i + 2 * t].number[g];
}

// The copy lands as late as it may, at the wait. Until then the destination holds NaN bytes, so one
// who reads too early, or overwrites what others still read, is found out.
inline void cp_async_16(void* to, const void* from, int bytes = 16) {
  cuda_host::check_shared(to, "cp.async");
  cuda_host::check_alignment(static_cast<const char*>(from), 16);
  const volatile char* source = static_cast<const char*>(from);
  for (int i = 0; i < bytes; ++i) (void)source[i];  // read here, where the sanitizers look on
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
  cuda_host::start_async_copy(to, from, bytes);
}
inline void cp_async_commit() { cuda_host::commit_async_copies(); }
template <int kPending>
void cp_async_wait() {
  cuda_host::wait_for_async_copies(kPending);
}

inline uint4 ld_global_nc_16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
inline uint4 ld_global_cs_16(const void* from) { return __ldcs(static_cast<const uint4*>(from)); }
inline void st_global_cs_16(void* to, uint4 v) { __stcs(static_cast<uint4*>(to), v); }
inline void prefetch_l2(const void* from) { (void)*static_cast<const volatile char*>(from); }  // sanitizers look on

inline void fence_acq_rel() { cuda_host::fence(); }
inline uint32_t atomic_add_release(uint32_t* word, uint32_t value) {
  cuda_host::fence();
  return atomicAdd(word, value);
}
inline void store_release(uint32_t* word, uint32_t value) {
  cuda_host::fence();
  atomicExch(word, value);
}
inline uint32_t load_acquire(const uint32_t* word) {
  const uint32_t value = __atomic_load_n(word, __ATOMIC_RELAXED);
  cuda_host::fence();
  return value;
}
inline uint32_t wait_while_equal(const uint32_t* word, uint32_t mask, uint32_t value,
                                 cuda_host::Site site = cuda_host::Site::here()) {
  cuda_host::wait_while_equal(word, mask, value, site);
  return load_acquire(word);
}

}  // namespace fusedopt
