// Our own thread pool. OpenMP's runtime can't be linked privately, and hangs in a forked child; this one does neither.
#pragma once
#include <cstdint>

namespace fusedopt {

// Calls task(context, chunk) once for every chunk in [0, chunks), on at most `threads` threads, the caller among them.
// Chunks are handed out in order to whoever is free. A caller that finds the pool busy with another caller's work does
// its own alone. Returns when all chunks are done.
void parallel_for(int64_t chunks, int threads, void (*task)(const void* context, int64_t chunk), const void* context);

template <typename F>
void parallel_for(int64_t chunks, int threads, const F& body) {
  parallel_for(chunks, threads, [](const void* f, int64_t chunk) { (*static_cast<const F*>(f))(chunk); }, &body);
}

// Calls body(begin, end) on ranges of elements that together are [first, last). Ranges begin at multiples of 64 from
// the first; results must not depend on them.
template <typename F>
void parallel_elements(int64_t first, int64_t last, int threads, const F& body) {
  const int64_t total = last - first;
  constexpr int64_t kSmallest = 1 << 14;   // below this, waking a thread costs more than it saves
  constexpr int64_t kRangesPerThread = 8;  // so that a thread that lost its core does not hold up the others
  if (total < 2 * kSmallest || threads <= 1) return body(first, last);
  int64_t range = total / (threads * kRangesPerThread);
  range = (range < kSmallest ? kSmallest : range) / 64 * 64;
  parallel_for((total + range - 1) / range, threads,
               [&](int64_t i) { body(first + i * range, (i + 1) * range < total ? first + (i + 1) * range : last); });
}

}  // namespace fusedopt
