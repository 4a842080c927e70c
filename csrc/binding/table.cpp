#include "binding/table.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "binding/numbers.h"

namespace fusedopt {
namespace {

[[noreturn]] void refuse(const Operand& operand, const ArgName& name, const std::string& why) {
  throw py::value_error(describe(name, operand.object) + ": " + why);
}

bool same_shape(const ArrayView& a, const ArrayView& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

std::vector<int64_t> strides_of(const ArrayView& view) {
  if (view.strides) return std::vector<int64_t>(view.strides, view.strides + view.ndim);
  std::vector<int64_t> strides(view.ndim);
  int64_t stride = 1;
  for (int32_t d = view.ndim - 1; d >= 0; stride *= view.shape[d--]) strides[d] = stride;
  return strides;
}

// Axes of more than one element, the one with the widest stride first.
std::vector<int32_t> axes_by_stride(const ArrayView& view, const std::vector<int64_t>& strides) {
  std::vector<int32_t> axes;
  for (int32_t d = 0; d < view.ndim; ++d)
    if (view.shape[d] != 1) axes.push_back(d);
  std::stable_sort(axes.begin(), axes.end(),
                   [&](int32_t a, int32_t b) { return std::abs(strides[a]) > std::abs(strides[b]); });
  return axes;
}

enum class Memory { kDense, kGaps, kOverlapping };

Memory memory_of(const ArrayView& view, const std::vector<int64_t>& strides, const std::vector<int32_t>& axes) {
  int64_t span = 1;  // of the axes so far, from the narrowest
  bool dense = true;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    if (std::abs(strides[*axis]) < span) return Memory::kOverlapping;
    dense &= strides[*axis] == span;  // and not -span: a flat row runs upwards
    span += (view.shape[*axis] - 1) * std::abs(strides[*axis]);
  }
  return dense ? Memory::kDense : Memory::kGaps;
}

}  // namespace

void TableBuilder::clear() {
  rows_.clear();
  starts_.assign(1, 0);
  layouts_.clear();
  blocks_.clear();
  regions_.clear();
  counters_.clear();
  row_sources_.clear();
  counter_sources_.clear();
}

TensorTable TableBuilder::table() const {
  TensorTable table = {rows_.data(),          starts_.data(), layouts_.data(), int64_t(layouts_.size()),
                       int64_t(rows_.size()), roles_};
  if (per_block_ >= 0) table.blocks = blocks_.data(), table.regions = regions_.data();
  return table;
}

void TableBuilder::check(const Operand* operands, const ArgNames& names, int64_t index) const {
  const ArrayView& param = operands[0].view;
  for (int role = 0; role < roles_; ++role) {
    const Operand& operand = operands[role];
    if (!operand.object) continue;
    const ArrayView& view = operand.view;
    if (view.device.type != param.device.type || view.device.id != param.device.id)
      refuse(operand, names.of(role, index),
             "is on " + device_string(view.device) + ", but " + names.of(0, index).str() + " is on " +
                 device_string(param.device));
    if (role != per_block_ && !same_shape(view, param))
      refuse(operand, names.of(role, index), "shape differs from " + describe(names.of(0, index), operands[0].object));
    if (view.read_only && (writes_ >> role & 1)) refuse(operand, names.of(role, index), "is read-only");
  }
}

void TableBuilder::check_block_values(const Operand* operands, const ArgNames& names, int64_t index,
                                      const Blocks& blocks) const {
  const Operand& values = operands[per_block_];
  if (values.view.numel() != blocks.count)
    refuse(values, names.of(per_block_, index),
           "has " + std::to_string(values.view.numel()) + " elements, but its partition makes " +
               std::to_string(blocks.count) + " blocks of " + describe(names.of(0, index), operands[0].object));
  if (!values.view.contiguous())
    refuse(values, names.of(per_block_, index), "has gaps or permuted axes, expected a contiguous array");
}

void TableBuilder::add(const Operand* operands, const ArgNames* names, int64_t index, int32_t scalars,
                       const Blocks* blocks, int64_t shared) {
  check(operands, *names, index);
  TensorRow row = {};
  row.numel = operands[0].view.numel();
  if (row.numel == 0) return;
  if (blocks) check_block_values(operands, *names, index, *blocks);
  bool contiguous = true;
  for (int role = 0; role < roles_; ++role) {
    if (!operands[role].object) continue;
    row.data[role] = operands[role].view.data;
    row.dtype[role] = operands[role].view.dtype;
    contiguous &= operands[role].view.contiguous();
  }
  for (int role = 0; role < roles_; ++role)
    if (operands[role].object && (!contiguous || row.numel == 1) && operands[role].view.may_be_lazy())
      refuse_lazy(operands[role].object, names->of(role, index));
  const std::vector<BlockRegion>* regions = blocks ? &blocks->regions : nullptr;
  row.layout = kFlat;
  if (!contiguous) {
    own_regions_.clear();
    row.layout = add_layout(operands, *names, index, blocks, &own_regions_);
    if (!own_regions_.empty()) regions = &own_regions_;
  }
  if (blocks) {
    const int64_t begin = int64_t(regions_.size());
    regions_.insert(regions_.end(), regions->begin(), regions->end());
    if (blocks->global) regions_.back().shared = shared;
    blocks_.push_back({begin, int64_t(regions_.size()), blocks->count});
  }
  row.scalars = scalars;
  rows_.push_back(row);
  starts_.push_back(starts_.back() + row.numel);
  row_sources_.push_back({names, index});
}

// The row's strides, its axes sorted by the parameter's and merged where every role steps through both as through one.
// Blocks: flat, with their regions in memory order, if they have such; else the axes stay in row-major order.
int64_t TableBuilder::add_layout(const Operand* operands, const ArgNames& names, int64_t index, const Blocks* blocks,
                                 std::vector<BlockRegion>* regions) {
  const ArrayView& param = operands[0].view;
  std::vector<std::vector<int64_t>> strides(roles_, std::vector<int64_t>(param.ndim, 0));
  bool flat = true;
  std::vector<int32_t> order;
  for (int role = 0; role < roles_; ++role) {
    if (!operands[role].object || role == per_block_) continue;
    strides[role] = strides_of(operands[role].view);
    const std::vector<int32_t> axes = axes_by_stride(param, strides[role]);
    const Memory memory = memory_of(param, strides[role], axes);
    if (memory == Memory::kOverlapping && (writes_ >> role & 1))
      refuse(operands[role], names.of(role, index),
             "its elements share memory (strides " + shape_string(strides[role].data(), param.ndim) +
                 "), so it can't be updated in place; pass a copy");
    if (role == 0) order = axes;
    flat &= memory == Memory::kDense;
    for (const int32_t d : order) flat &= strides[role][d] == strides[0][d];
  }
  if (flat && !row_major_ && (!blocks || in_memory_order(*blocks, param.shape, order, regions))) return kFlat;
  if (row_major_ || blocks) {
    if (regions) regions->clear();
    std::sort(order.begin(), order.end());
  }

  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> merged(roles_);
  for (const int32_t d : order) {
    bool joins = !sizes.empty();
    for (int role = 0; role < roles_ && joins; ++role) joins = merged[role].back() == strides[role][d] * param.shape[d];
    if (joins) sizes.back() *= param.shape[d];
    if (!joins) sizes.push_back(param.shape[d]);
    for (int role = 0; role < roles_; ++role) {
      if (joins) merged[role].pop_back();
      merged[role].push_back(strides[role][d]);
    }
  }
  if (sizes.empty()) return kFlat;  // one element
  const int64_t at = layouts_.size();
  layouts_.push_back(sizes.size());
  layouts_.insert(layouts_.end(), sizes.begin(), sizes.end());
  for (const auto& role : merged) layouts_.insert(layouts_.end(), role.begin(), role.end());
  return at;
}

void TableBuilder::add_counter(const ArrayView& counter, const ArgNames* names, int64_t index) {
  counters_.push_back({counter.data, size_of(counter.dtype)});
  counter_sources_.push_back({names, index});
}

void TableBuilder::add_value(const ArrayView& value, const ArgNames* names, int64_t index, int role) {
  add_counter(value, names, index);
  counter_sources_.back().role = role;
}

std::string TableBuilder::name_of(const Extent& extent) const {
  const bool beside = extent.role == kCounter;
  const Source& source = beside ? counter_sources_[extent.row] : row_sources_[extent.row];
  return source.names->of(beside ? source.role : extent.role, source.index).str();
}

void TableBuilder::check_overlap() {
  const TableBuilder* const builders[] = {this};
  const TensorTable own = table();
  throw_if_found(guard_.check({own, writes_, counters_}), builders);
}

void TableBuilder::check_overlap(const TableBuilder& other) {
  if (rows_.empty() || other.rows_.empty()) return;
  const TableBuilder* const builders[] = {this, &other};
  const TensorTable own = table(), theirs = other.table();
  throw_if_found(guard_.check_beside({own, writes_, counters_}, other.guard_, {theirs, other.writes_, other.counters_}),
                 builders);
}

void TableBuilder::throw_if_found(const Overlap& overlap, const TableBuilder* const* builders) {
  if (!overlap.found) return;
  const auto name = [&](const Extent& extent) { return builders[extent.table]->name_of(extent); };
  const bool second = overlap.second.written;
  throw py::value_error(name(second ? overlap.second : overlap.first) + " is written, but shares memory with " +
                        name(second ? overlap.first : overlap.second));
}

}  // namespace fusedopt
