// Runs the threads of a grid, one at a time.
#include <algorithm>
#include <map>
#include <mutex>

#include "order.h"
#include "race.h"
#include "shim.h"
#include "state.h"
#include "symbols.h"

#if CUDA_HOST_SANITIZE_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

CUDA_HOST_HIDDEN uint3 threadIdx, blockIdx;
CUDA_HOST_HIDDEN dim3 blockDim, gridDim;

namespace cuda_host {

Machine machine;
thread_local bool in_kernel = false;

namespace {

constexpr int kUnwritten = 0xff;  // as a byte pattern: NaN in every floating-point format

// All thread blocks have their __shared__ variables at one place, and take turns in it.

void copy_shared(bool in, Block& block) {
  size_t position = 0;
  for (const Variable& v : shared_variables()) {
    char *here = machine.shared_segment + v.offset, *away = block.shared.data() + position;
    in ? std::memcpy(here, away, v.bytes) : std::memcpy(away, here, v.bytes);
    position += v.bytes;
  }
}

size_t shared_bytes() {
  size_t bytes = 0;
  for (const Variable& v : shared_variables()) bytes += v.bytes;
  return bytes;
}

void switch_to(Block& block) {
  if (machine.block == &block) return;
  if (machine.block) {
    machine.block->shared.resize(shared_bytes());
    copy_shared(false, *machine.block);
  }
  copy_shared(true, block);
  machine.block = &block;
  blockIdx = block.index;
}

void run_kernel_to_its_end() {
  machine.body.run(machine.body.call);
  return_from_kernel();
}

void start(Block& block, int64_t number) {
  if (machine.block == &block) machine.block = nullptr;  // what ran in this slot is over
  const int count = int(blockDim.x * blockDim.y * blockDim.z);
  block.number = number;
  block.index = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y),
                 unsigned(number / gridDim.x / gridDim.y)};
  block.returned = block.at_barrier = block.predicates = 0;
  block.threads.resize(count);
  block.states.assign(count, State::kReady);
  if (!block.stacks || int(block.stacks->size()) < count) block.stacks = std::make_unique<Stacks>(count);
  for (int t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.fiber.start((*block.stacks)[t], run_kernel_to_its_end);
    thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread.async_copies.in_flight.clear();
    thread.async_copies.committed_groups = 0;
  }
  block.warps.resize((count + kWarpSize - 1) / kWarpSize);
  for (int w = 0; w < int(block.warps.size()); ++w) {
    const int lanes = std::min(kWarpSize, count - w * kWarpSize);
    block.warps[w].lanes = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    block.warps[w].returned = 0;
    block.warps[w].meetings.clear();
  }
  block.shared.assign(shared_bytes(), char(kUnwritten));
  void* dynamic = nullptr;  // a fresh allocation: ASan watches both of its ends
  if (posix_memalign(&dynamic, 128, std::max<size_t>(machine.dynamic_shared_bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(dynamic, kUnwritten, machine.dynamic_shared_bytes);
  block.dynamic_shared.reset(static_cast<char*>(dynamic));
  race::on_block_start(number, count);
}

bool can_run(const Block& block, int t) {
  if (block.states[t] == State::kReady) return true;
  if (block.states[t] != State::kSpinning) return false;
  const Thread& thread = block.threads[t];
  return (*thread.spin_word & thread.spin_mask) != thread.spin_value;
}

void resume(Block& block, int t) {
  block.states[t] = State::kReady;
  machine.thread = t;
  threadIdx = block.threads[t].index;
  in_kernel = true;
  block.threads[t].fiber.resume();
  in_kernel = false;
}

// Runs a warp until it waits for others, or the order lets those go first. So one warp gets far
// ahead of its block: what it should have waited for, and did not, shows best. Returns whether any
// ran.
bool advance_warp(Block& block, int warp, Order& order) {
  bool any = false, progress;
  do {
    progress = false;
    for (int lane : order.next_round(order.lanes)) {
      const int t = warp * kWarpSize + lane;
      if (t >= int(block.threads.size()) || !can_run(block, t)) continue;
      any = progress = true;
      switch_to(block);
      resume(block, t);
      if (!machine.failure.empty()) return true;
    }
  } while (progress && !order.preempts());
  return any;
}

bool advance(Block& block, Order& order) {
  bool any = false, progress;
  do {
    progress = false;
    for (int warp : order.next_round(order.warps)) {
      progress |= advance_warp(block, warp, order);
      any |= progress;
      if (!machine.failure.empty() || (any && order.preempts())) return true;
    }
  } while (progress);
  return any;
}

std::string describe_deadlock(const std::vector<Block*>& resident) {
  std::map<std::string, int> waiting;
  for (const Block* block : resident)
    for (size_t t = 0; t < block->threads.size(); ++t) {
      const Thread& thread = block->threads[t];
      std::string where = "block (" + std::to_string(block->index.x) + "," + std::to_string(block->index.y) + "," +
                          std::to_string(block->index.z);
      where += block->states[t] == State::kReturned ? "): returned"
                                                    : "): wait in " + std::string(thread.operation) + " at " +
                                                          thread.site.file + ":" + std::to_string(thread.site.line);
      ++waiting[where];
    }
  std::string text = "deadlock: no thread can go on";
  if (resident.size() < size_t(gridDim.x) * gridDim.y * gridDim.z)
    text += " (blocks of a launch that is not cooperative run one after another)";
  int lines = 0;
  for (const auto& [where, count] : waiting)
    if (lines++ < 8) text += "\n  " + std::to_string(count) + " threads of " + where;
  return text;
}

// Redzones lie behind every __shared__ variable; each OS thread has a segment of its own.
void poison_redzones() {
#if CUDA_HOST_SANITIZE_ADDRESS
  for (const Variable& v : shared_variables())
    __asan_poison_memory_region(machine.shared_segment + v.offset + v.bytes, CUDA_HOST_REDZONE);
#endif
}

std::mutex launches;
std::vector<std::unique_ptr<Block>> slots;  // kept between launches, for their stacks

}  // namespace

std::string run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, int64_t resident, Body body) {
  const std::lock_guard<std::mutex> one_at_a_time(launches);
  machine = {};
  machine.body = body;
  machine.dynamic_shared_bytes = dynamic_shared_bytes;
  machine.shared_segment = shared_segment();
  gridDim = grid;
  blockDim = block;
  poison_redzones();
  race::on_grid_start();

  const int64_t count = int64_t(grid.x) * grid.y * grid.z;
  Order order(int(block.x * block.y * block.z + kWarpSize - 1) / kWarpSize);
  std::vector<int64_t> queue = order.first(count);
  order.next_round(queue);
  std::vector<Block*> idle, running;
  for (int64_t slot = 0; slot < std::min(resident, count); ++slot) {
    if (slot == int64_t(slots.size())) slots.push_back(std::make_unique<Block>());
    idle.push_back(slots[slot].get());
  }
  for (auto next = queue.begin(); machine.failure.empty();) {
    for (; next != queue.end() && !idle.empty(); ++next) {
      running.push_back(idle.back());
      idle.pop_back();
      start(*running.back(), *next);
    }
    if (running.empty()) return "";
    order.next_round(running);
    bool progress = false;
    for (Block* b : running) {
      progress |= advance(*b, order);
      if (!machine.failure.empty()) break;
      if (!b->done()) continue;
      idle.push_back(b);
      race::on_block_end(b->number);
    }
    if (!progress) machine.failure = describe_deadlock(running);
    running.erase(std::remove_if(running.begin(), running.end(), [](Block* b) { return b->done(); }), running.end());
  }
  slots.clear();  // the fibers left behind hold frames on their stacks
  return machine.failure;
}

}  // namespace cuda_host
