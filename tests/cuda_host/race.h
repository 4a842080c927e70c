// Hooks of the race detector (race.cpp). They are empty unless the library is built to find races.
#pragma once
#include <cstdint>

namespace cuda_host::race {
#if CUDA_HOST_SANITIZE_RACE
void on_grid_start();
void on_block_start(int64_t number, int threads);
void on_block_end(int64_t number);
void on_block_barrier();  // in the context of a thread that took part
void on_warp_barrier(int warp_number, uint32_t lanes);
void on_fence();
#else
inline void on_grid_start() {}
inline void on_block_start(int64_t, int) {}
inline void on_block_end(int64_t) {}
inline void on_block_barrier() {}
inline void on_warp_barrier(int, uint32_t) {}
inline void on_fence() {}
#endif
}  // namespace cuda_host::race
