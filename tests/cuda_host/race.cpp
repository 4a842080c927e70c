// The race detector. g++ -fsanitize=thread puts a call before every load and store of a kernel;
// here they are answered by a happens-before check in CUDA's terms, so that a race is found
// whatever the schedule and the values:
//   - __syncthreads orders the threads of a block, __syncwarp the lanes of its mask; shuffles and
//     votes order no memory;
//   - between blocks, a fence before an atomic write releases, and a fence after an atomic read of
//     what was written acquires.
// Two accesses race if they touch the same byte, one writes, not both are atomic, and nothing
// orders them. A race ends the launch.
#if CUDA_HOST_SANITIZE_RACE
#include "race.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>

#include "state.h"
#include "symbols.h"

namespace cuda_host::race {
namespace {

struct Stamp {  // when an access happened
  int64_t block;
  int thread;
  uint32_t epoch;  // block barriers that its block had passed
  uint32_t clock;  // its thread's own
};

struct Access : Stamp {
  const void* code;
  uint8_t bytes;  // of an aligned word of 8, as a mask
  bool writes, atomic;
};

// What is known to have happened in a block: all before `epoch`, and more of single threads.
struct Progress {
  uint32_t epoch = 0;
  std::map<int, uint32_t> clock;

  bool covers(const Stamp& s) const {
    const auto found = clock.find(s.thread);
    return s.epoch < epoch || (found != clock.end() && s.clock <= found->second);
  }
  void merge(const Progress& other) {
    epoch = std::max(epoch, other.epoch);
    for (const auto& [thread, time] : other.clock) clock[thread] = std::max(clock[thread], time);
  }
};

struct Knowledge : std::map<int64_t, Progress> {  // by block
  bool covers(const Stamp& s) const {
    const auto found = find(s.block);
    return found != end() && found->second.covers(s);
  }
  void merge(const Knowledge& other) {
    for (const auto& [block, progress] : other) (*this)[block].merge(progress);
  }
};

struct ThreadHistory {
  uint32_t clock = 1;
  Knowledge known;       // beyond what its block knows
  Knowledge released;    // at its last fence, for the atomic writes after it
  Knowledge to_acquire;  // from its atomic reads, at its next fence
};

struct BlockHistory {
  uint32_t epoch = 1;
  Knowledge known;
  std::vector<ThreadHistory> threads;
};

// The latest accesses to an aligned word of 8 bytes. When it overflows, some are forgotten: a race
// may then be missed, none is invented.
struct Word {
  static constexpr int kSlots = 6;
  int count = 0, next_to_replace = 0;
  Access accesses[kSlots];
};

std::unordered_map<int64_t, BlockHistory> blocks;
std::unordered_map<uintptr_t, Word> words;
std::unordered_map<uintptr_t, Knowledge> released_at;  // by the address of an atomic

BlockHistory& this_block() { return blocks[machine.block->number]; }
ThreadHistory& this_thread() { return this_block().threads[machine.thread]; }

bool happened_before(const Stamp& s) {
  const BlockHistory& block = this_block();
  if (s.block == machine.block->number && (s.thread == machine.thread || s.epoch < block.epoch)) return true;
  return block.known.covers(s) || this_thread().known.covers(s);
}

// file:line of an access; of its caller, where the access is inlined from the shim.
std::string source_line(const void* code) {
  char command[512], line[512];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx", library_path(),
                library_offset(code) - 1);  // the call, not what it returns to
  const std::string file = __FILE__, shim = file.substr(0, file.rfind('/') + 1);
  std::string found = "?";
  FILE* pipe = popen(command, "r");
  while (pipe && std::fgets(line, sizeof line, pipe)) {
    found = std::string(line).substr(0, std::strcspn(line, " \n"));
    if (found.rfind('/') + 1 != shim.size() || found.compare(0, shim.size(), shim) != 0) break;
  }
  if (pipe) pclose(pipe);
  return found;
}

[[noreturn]] void report(const Access& earlier, const Access& now) {
  const auto verb = [](const Access& a) { return a.writes ? "write" : "read"; };
  fail("data race: %s at %s, and %s by thread %d of block %lld at %s", verb(now), source_line(now.code).c_str(),
       verb(earlier), earlier.thread, static_cast<long long>(earlier.block), source_line(earlier.code).c_str());
}

void check_word(uintptr_t address, const Access& now) {
  Word& word = words[address];
  int kept = 0;
  for (int i = 0; i < word.count; ++i) {
    const Access& earlier = word.accesses[i];
    const bool ordered = happened_before(earlier);
    const bool conflict =
        (earlier.bytes & now.bytes) && (earlier.writes || now.writes) && !(earlier.atomic && now.atomic);
    if (conflict && !ordered) report(earlier, now);
    // Whatever would race with a superseded access also races with this one.
    const bool superseded =
        ordered && !(earlier.bytes & ~now.bytes) && (now.writes || !earlier.writes) && (earlier.atomic || !now.atomic);
    if (!superseded) word.accesses[kept++] = earlier;
  }
  word.count = kept;
  if (word.count < Word::kSlots)
    word.accesses[word.count++] = now;
  else
    word.accesses[word.next_to_replace++ % Word::kSlots] = now;
}

void access(const volatile void* where, size_t size, bool writes, bool atomic, const void* code) {
  if (!in_kernel || machine.block->stacks->contains(const_cast<const void*>(where))) return;
  const auto first = reinterpret_cast<uintptr_t>(where);
  // Blocks have their shared memory at the same addresses, one after another.
  const uintptr_t space =
      is_shared_memory(const_cast<const void*>(where), size) ? uintptr_t(machine.block->number + 1) << 48 : 0;
  const Stamp stamp{machine.block->number, machine.thread, this_block().epoch, this_thread().clock};
  Access now{stamp, code, 0, writes, atomic};
  for (uintptr_t word = first / 8; word <= (first + size - 1) / 8; ++word) {
    now.bytes = 0;
    for (int i = 0; i < 8; ++i)
      if (word * 8 + i >= first && word * 8 + i < first + size) now.bytes |= 1 << i;
    check_word((word * 8) ^ space, now);
  }
}

void atomic_access(const volatile void* where, size_t size, bool writes, const void* code) {
  if (!in_kernel) return;
  access(where, size, writes, true, code);
  Knowledge& here = released_at[reinterpret_cast<uintptr_t>(where)];
  if (writes)
    here.merge(this_thread().released);
  else
    this_thread().to_acquire.merge(here);
}

}  // namespace

void on_grid_start() {
  blocks.clear();
  words.clear();
  released_at.clear();
}

void on_block_start(int64_t number, int threads) { blocks[number].threads.resize(threads); }

void on_block_end(int64_t number) { blocks.erase(number); }

void on_block_barrier() {
  BlockHistory& block = this_block();
  for (ThreadHistory& thread : block.threads) {
    block.known.merge(thread.known);
    thread.known.clear();
  }
  ++block.epoch;
}

void on_warp_barrier(int warp_number, uint32_t lanes) {
  BlockHistory& block = this_block();
  Knowledge together;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const int t = warp_number * kWarpSize + lane;
    together.merge(block.threads[t].known);
    together[machine.block->number].clock[t] = block.threads[t].clock++;
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (lanes >> lane & 1) block.threads[warp_number * kWarpSize + lane].known = together;
}

void on_fence() {
  if (!in_kernel) return;
  const BlockHistory& block = this_block();
  ThreadHistory& thread = this_thread();
  thread.known.merge(thread.to_acquire);
  thread.to_acquire.clear();
  thread.released = block.known;
  thread.released.merge(thread.known);
  Progress& own = thread.released[machine.block->number];
  own.epoch = std::max(own.epoch, block.epoch);
  own.clock[machine.thread] = thread.clock++;
}

}  // namespace cuda_host::race

// ---- what the instrumented code calls

#pragma GCC visibility push(default)
extern "C" {

#define ON_ACCESS(name, size, writes)                                                   \
  void __tsan_##name##size(void* address) {                                             \
    cuda_host::race::access(address, size, writes, false, __builtin_return_address(0)); \
  }
#define ON_ACCESSES(size)                \
  ON_ACCESS(read, size, false)           \
  ON_ACCESS(write, size, true)           \
  ON_ACCESS(unaligned_read, size, false) \
  ON_ACCESS(unaligned_write, size, true)
ON_ACCESSES(1)
ON_ACCESSES(2)
ON_ACCESSES(4)
ON_ACCESSES(8)
ON_ACCESSES(16)

void __tsan_read_range(void* address, size_t size) {
  cuda_host::race::access(address, size, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  cuda_host::race::access(address, size, true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}

#define ON_ATOMICS(bits)                                                                      \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int) {    \
    cuda_host::race::atomic_access(address, bits / 8, false, __builtin_return_address(0));    \
    return *address;                                                                          \
  }                                                                                           \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* address, uint##bits##_t v, int) { \
    cuda_host::race::atomic_access(address, bits / 8, true, __builtin_return_address(0));     \
    *address = v;                                                                             \
  }
ON_ATOMICS(8)
ON_ATOMICS(16)
ON_ATOMICS(32)
ON_ATOMICS(64)

}  // extern "C"
#pragma GCC visibility pop

#endif  // CUDA_HOST_SANITIZE_RACE
