// Scalars of Adam's family from numbers on the device: one thread for each tensor's options.
//
// A few hundred operations in double a thread, for the powers of beta; nothing beside an update's memory. Options
// travel by value: of each the numbers that mostly differ, one to three words, and the rest once for neighbours.
#define FUSEDOPT_TARGET cuda
#include "cuda/adam_scalars.h"
#include "cuda/device_number.cuh"

namespace fusedopt::cuda {
namespace {

struct OwnWords {  // which numbers each of the options brings itself, besides its step
  bool lr, weight_decay;
  HOST_DEVICE int count() const { return 1 + lr + weight_decay; }
};

struct OptionsKind {
  AdamWDeviceOptions options;  // but for the numbers that options bring themselves; those on the device are not null
  int64_t first;
};
constexpr int kKindWords = sizeof(OptionsKind) / sizeof(uint64_t);

struct OptionsTable {  // options fill `words` from the front, kinds from the back
  static constexpr int kWords = (kMaxKernelParameterBytes - 256) / sizeof(uint64_t);
  int32_t size, kinds;
  OwnWords own;
  bool counts;  // on the way, each step's counter is advanced
  uint64_t words[kWords];
};

// Puts an address or a number from the host in its place.
template <typename T>
__device__ void fill(DeviceNumber& number, T& otherwise, uint64_t word) {
  static_assert(sizeof otherwise == sizeof word && sizeof number.data == sizeof word);
  if (number.data)
    memcpy(&number.data, &word, sizeof word);
  else
    memcpy(&otherwise, &word, sizeof word);
}

__device__ AdamWDeviceOptions options_at(const OptionsTable& table, int i) {
  const auto kind_of = [&](int k) { return table.words + OptionsTable::kWords - (k + 1) * kKindWords; };
  int low = 0, high = table.kinds;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (int64_t(kind_of(middle)[kKindWords - 1]) <= i ? low : high) = middle;
  }
  AdamWDeviceOptions own;
  memcpy(&own, kind_of(low), sizeof own);
  const uint64_t* words = table.words + i * table.own.count();
  fill(own.step, own.host_step, *words++);
  if (table.own.lr) fill(own.lr, own.options.lr, *words++);
  if (table.own.weight_decay) fill(own.weight_decay, own.options.weight_decay, *words);
  return own;
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const OptionsTable __grid_constant__ table, AdamWLossScale loss_scale, PreparedScalars* prepared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.size) return;
  const AdamWDeviceOptions own = options_at(table, i);
  const bool skip = is_set(loss_scale.found_inf);
  if (table.counts && own.step.data && !skip) increment(own.step);
  AdamWOptions numbers = own.options;
  if (own.lr.data) numbers.lr = read(own.lr);
  if (own.weight_decay.data) numbers.weight_decay = read(own.weight_decay);
  const int64_t step = own.step.data ? int64_t(read(own.step)) : own.host_step;
  const bool scaled = loss_scale.grad_scale.data;
  const double inv_grad_scale = scaled ? 1.0 / read(loss_scale.grad_scale) : loss_scale.inv_grad_scale;
  prepared[i].scalars = adamw_scalars(numbers, step, inv_grad_scale);
  prepared[i].skip = skip;
}

// ---- host

uint64_t word_of(const DeviceNumber& number, double otherwise) {
  uint64_t word = reinterpret_cast<uintptr_t>(number.data);
  if (!number.data) memcpy(&word, &otherwise, sizeof word);
  return word;
}

bool same(const DeviceNumber& a, const DeviceNumber& b) { return a.data == b.data && (!a.data || a.dtype == b.dtype); }
bool same(const AdamWDeviceOptions& a, const AdamWDeviceOptions& b) {
  return same(a.step, b.step) && same(a.lr, b.lr) && same(a.weight_decay, b.weight_decay) && a.options == b.options &&
         a.host_step == b.host_step;
}

class OptionsPacker {
 public:
  OptionsPacker(OwnWords own, bool counts) {
    table_.own = own, table_.counts = counts;
    clear();
  }
  void clear() { table_.size = table_.kinds = 0; }
  const OptionsTable& table() const { return table_; }

  bool add(const AdamWDeviceOptions& options) {  // false, and nothing changed, if there is no room
    const AdamWDeviceOptions rest = without_own(options);
    const bool shares = table_.kinds > 0 && same(rest, last_);
    const int used = table_.size * table_.own.count(), kinds = table_.kinds + !shares;
    if (used + table_.own.count() + kinds * kKindWords > OptionsTable::kWords) return false;
    if (!shares) {
      const OptionsKind kind = {rest, table_.size};
      memcpy(table_.words + OptionsTable::kWords - kinds * kKindWords, &kind, sizeof kind);
      table_.kinds = kinds, last_ = rest;
    }
    uint64_t* to = table_.words + used;
    *to++ = options.step.data ? reinterpret_cast<uintptr_t>(options.step.data) : uint64_t(options.host_step);
    if (table_.own.lr) *to++ = word_of(options.lr, options.options.lr);
    if (table_.own.weight_decay) *to = word_of(options.weight_decay, options.options.weight_decay);
    ++table_.size;
    return true;
  }

 private:
  AdamWDeviceOptions without_own(AdamWDeviceOptions options) const {
    static int there;  // any address, but one for all
    if (options.step.data) options.step.data = &there;
    options.host_step = 0;
    if (table_.own.lr) clear_number(options.lr, options.options.lr, &there);
    if (table_.own.weight_decay) clear_number(options.weight_decay, options.options.weight_decay, &there);
    return options;
  }
  static void clear_number(DeviceNumber& number, double& otherwise, void* there) {
    if (number.data) number.data = there;
    otherwise = 0;
  }

  OptionsTable table_;
  AdamWDeviceOptions last_;
};

OwnWords own_words(const AdamWDeviceOptions* options, int64_t size) {
  constexpr int64_t kFewKinds = 8;
  int64_t rates = 0, decays = 0;  // options that differ from those before
  for (int64_t i = 1; i < size; ++i) {
    const AdamWDeviceOptions &a = options[i - 1], &b = options[i];
    rates += !same(a.lr, b.lr) || a.options.lr != b.options.lr;
    decays += !same(a.weight_decay, b.weight_decay) || a.options.weight_decay != b.options.weight_decay;
  }
  return {rates > kFewKinds, decays > kFewKinds};
}

// Whether the counters are those of the options in their order. Then no two options share one, and the thread that
// reads a counter can advance it.
bool each_counts_alone(const AdamWDeviceOptions* options, int64_t size, const DeviceNumber* counters,
                       int64_t counters_size) {
  int64_t next = 0;
  for (const AdamWDeviceOptions* own = options; own < options + size; ++own)
    if (own->step.data && (next == counters_size || counters[next++].data != own->step.data)) return false;
  return next == counters_size;
}

}  // namespace

Status launch_prepare_scalars(const AdamWDeviceOptions* options, int64_t options_size, const DeviceNumber* counters,
                              int64_t counters_size, const AdamWLossScale& loss_scale, PreparedScalars* prepared,
                              cudaStream_t stream) {
  const bool counts = each_counts_alone(options, options_size, counters, counters_size);
  Status status;
  if (!counts) status = launch_increment(counters, counters_size, loss_scale.found_inf, stream);
  OptionsPacker packer(own_words(options, options_size), counts);
  const auto launch_these = [&] {
    const OptionsTable& table = packer.table();
    const dim3 grid((table.size + kThreads - 1) / kThreads);
    if (table.size)
      status = status_of(launch(prepare_kernel, grid, dim3(kThreads), 0, stream, table, loss_scale, prepared));
    prepared += table.size;
    packer.clear();
  };
  for (const AdamWDeviceOptions* own = options; status && own < options + options_size; ++own) {
    if (packer.add(*own)) continue;
    launch_these();
    packer.add(*own);
  }
  if (status) launch_these();
  return status;
}

}  // namespace fusedopt::cuda
