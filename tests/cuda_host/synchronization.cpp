// What a thread does when it waits for others: barriers, warp operations, spinning; and its end.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "race.h"
#include "state.h"
#include "symbols.h"

namespace cuda_host {
namespace {

const char kSyncwarp[] = "__syncwarp()";
const char kReturnedBeforeBarrier[] = "divergent __syncthreads() at %s:%d: a thread of the block has returned";

void wait(State state, const char* operation, Site site) {
  current().operation = operation;
  current().site = site;
  machine.block->states[machine.thread] = state;
  current().fiber.suspend();
}

void wake(State waiting, int first_thread, uint32_t lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (lanes >> lane & 1 && machine.block->states[first_thread + lane] == waiting)
      machine.block->states[first_thread + lane] = State::kReady;
}

Meeting& meeting_of(Warp& warp, uint32_t mask) {
  for (Meeting& meeting : warp.meetings)
    if (meeting.mask == mask) return meeting;
  return warp.meetings.emplace_back(mask);
}

// Lanes that have returned are waited for no more, as on a GPU.
void end_meeting_if_complete(Meeting& meeting, int warp_number) {
  const Warp& warp = machine.block->warps[warp_number];
  const uint32_t expected = meeting.mask & warp.lanes & ~warp.returned;
  if (!meeting.arrived || (expected & ~meeting.arrived)) return;
  wake(State::kAtWarpOperation, warp_number * kWarpSize, meeting.arrived);
  if (meeting.operation == kSyncwarp) race::on_warp_barrier(warp_number, meeting.arrived);
  meeting.present[meeting.generation & 1] = meeting.arrived;
  meeting.arrived = 0;
  ++meeting.generation;
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!in_kernel) {
    std::fprintf(stderr, "cuda_host: device code called outside a kernel: %s\n", text);
    std::abort();
  }
  const uint3 b = machine.block->index, t = current().index;
  char where[128];
  std::snprintf(where, sizeof where, " [block (%u,%u,%u) thread (%u,%u,%u)]", b.x, b.y, b.z, t.x, t.y, t.z);
  machine.failure = std::string(text) + where;
  current().fiber.suspend_for_good();
}

int block_barrier(bool predicate, Site site) {
  Block& block = *machine.block;
  if (block.returned) fail(kReturnedBeforeBarrier, site.file, site.line);
  if (block.at_barrier &&
      (block.barrier_site.line != site.line || std::strcmp(block.barrier_site.file, site.file) != 0))
    fail("divergent __syncthreads(): this thread is at %s:%d, others of its block at %s:%d", site.file, site.line,
         block.barrier_site.file, block.barrier_site.line);
  block.barrier_site = site;
  block.predicates += predicate;
  if (++block.at_barrier < int(block.threads.size())) {
    wait(State::kAtBlockBarrier, "__syncthreads()", site);
    return block.barrier_result;
  }
  block.barrier_result = block.predicates;
  block.at_barrier = block.predicates = 0;
  for (State& state : block.states) state = State::kReady;
  race::on_block_barrier();
  return block.barrier_result;
}

Exchange warp_exchange(uint32_t mask, uint64_t value, const char* operation, Site site) {
  const int lane = lane_id(), warp_number = machine.thread / kWarpSize;
  if (!(mask >> lane & 1))
    fail("%s at %s:%d by a lane that its mask 0x%08x leaves out", operation, site.file, site.line, mask);
  Warp& warp = machine.block->warps[warp_number];
  Meeting& meeting = meeting_of(warp, mask);
  if (meeting.arrived && std::strcmp(meeting.operation, operation) != 0)
    fail("lanes of one warp meet in different operations: %s at %s:%d, others in %s", operation, site.file, site.line,
         meeting.operation);
  const unsigned set = meeting.generation & 1;
  meeting.operation = operation;
  meeting.value[set][lane] = value;
  meeting.arrived |= 1u << lane;
  end_meeting_if_complete(meeting, warp_number);
  if (meeting.arrived) wait(State::kAtWarpOperation, operation, site);
  const Meeting& over = meeting_of(warp, mask);  // other masks' meetings may have moved it
  return {over.value[set], over.present[set]};
}

void warp_barrier(uint32_t mask, Site site) { warp_exchange(mask, 0, kSyncwarp, site); }

void wait_while_equal(const uint32_t* word, uint32_t mask, uint32_t value, Site site) {
  while ((__atomic_load_n(word, __ATOMIC_RELAXED) & mask) == value) {
    current().spin_word = word;
    current().spin_mask = mask;
    current().spin_value = value;
    wait(State::kSpinning, "a spin on a word of memory", site);
  }
}

int thread_in_block() { return machine.thread; }

void fence() { race::on_fence(); }

void start_async_copy(void* to, const void* from, int bytes) {
  AsyncCopies& copies = current().async_copies;
  copies.in_flight.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, copies.committed_groups});
}

void commit_async_copies() { ++current().async_copies.committed_groups; }

void wait_for_async_copies(int pending_groups) {
  AsyncCopies& copies = current().async_copies;
  auto copy = copies.in_flight.begin();
  for (; copy != copies.in_flight.end(); ++copy) {
    if (copy->group >= copies.committed_groups - pending_groups) break;
    std::memcpy(copy->to, copy->from, copy->bytes);
    std::memset(copy->to + copy->bytes, 0, 16 - copy->bytes);
  }
  copies.in_flight.erase(copies.in_flight.begin(), copy);
}

char* dynamic_shared_memory() { return machine.block->dynamic_shared.get(); }

bool is_shared_memory(const void* address, size_t bytes) {
  const char* first = static_cast<const char*>(address);
  const char* dynamic = dynamic_shared_memory();
  if (first >= dynamic && first + bytes <= dynamic + machine.dynamic_shared_bytes) return true;
  for (const Variable& v : shared_variables()) {
    const char* start = machine.shared_segment + v.offset;
    if (first >= start && first + bytes <= start + v.bytes) return true;
  }
  return false;
}

void return_from_kernel() {
  Block& block = *machine.block;
  if (!current().async_copies.in_flight.empty()) fail("a thread returned without waiting for its cp.async copies");
  if (block.at_barrier) fail(kReturnedBeforeBarrier, block.barrier_site.file, block.barrier_site.line);
  block.states[machine.thread] = State::kReturned;
  ++block.returned;
  const int warp_number = machine.thread / kWarpSize;
  Warp& warp = block.warps[warp_number];
  warp.returned |= 1u << lane_id();
  for (Meeting& meeting : warp.meetings) end_meeting_if_complete(meeting, warp_number);
  current().fiber.suspend_for_good();
}

}  // namespace cuda_host
