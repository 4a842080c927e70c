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

}  // namespace fusedopt
