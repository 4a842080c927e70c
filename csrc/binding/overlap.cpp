#include "binding/overlap.h"

#include <algorithm>

namespace fusedopt {
namespace {

// Calls f(address) for every element of one role of a strided row.
template <typename F>
void for_each_element(const TensorTable& table, const TensorRow& row, int role, F f) {
  const RowLayout layout(table.layouts + row.layout);
  const int64_t* strides = layout.strides_of(role);
  const int64_t bytes = size_of(row.dtype[role]);
  for (int64_t i = 0; i < row.numel; ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = layout.ndim - 1; d >= 0; --d) {
      offset += rest % layout.sizes[d] * strides[d];
      rest /= layout.sizes[d];
    }
    f(reinterpret_cast<uintptr_t>(row.data[role]) + offset * bytes);
  }
}

Extent extent_of(const TensorTable& table, int64_t r, int role, bool written, int number) {
  const TensorRow& row = table.rows[r];
  const auto base = reinterpret_cast<uintptr_t>(row.data[role]);
  const int64_t bytes = size_of(row.dtype[role]);
  if (table.per_block(role)) return {base, base + table.blocks[r].count * bytes, r, role, written, false, number};
  if (row.layout == kFlat) return {base, base + row.numel * bytes, r, role, written, false, number};
  const RowLayout layout(table.layouts + row.layout);
  int64_t low = 0, high = 0;
  for (int64_t d = 0; d < layout.ndim; ++d) {
    const int64_t reach = (layout.sizes[d] - 1) * layout.strides_of(role)[d];
    (reach < 0 ? low : high) += reach;
  }
  const bool gaps = high - low + 1 != row.numel;  // written roles hold every element once; a read one may repeat
  return {base + low * bytes, base + (high + 1) * bytes, r, role, written, gaps, number};
}

// Whether two arrays whose extents cross share a byte. Views of one matrix's columns do not.
bool share_memory(const TensorTable* const* tables, const Extent& a, const Extent& b) {
  if (!a.gaps && !b.gaps) return true;
  const uintptr_t low = std::max(a.low, b.low), high = std::min(a.high, b.high);
  std::vector<bool> taken(high - low);
  bool shared = false;
  const auto visit = [&](const Extent& e, auto f) {
    if (!e.gaps) {
      for (uintptr_t byte = low; byte < high; ++byte) f(byte);
      return;
    }
    const TensorTable& table = *tables[e.table];
    const TensorRow& row = table.rows[e.row];
    for_each_element(table, row, e.role, [&](uintptr_t address) {
      for (uintptr_t byte = address; byte < address + size_of(row.dtype[e.role]); ++byte)
        if (byte >= low && byte < high) f(byte);
    });
  };
  visit(a, [&](uintptr_t byte) { taken[byte - low] = true; });
  visit(b, [&](uintptr_t byte) { shared |= taken[byte - low]; });
  return shared;
}

bool is_written(unsigned writes, int role) { return writes >> role & 1; }

std::vector<Extent> extents_of(const OverlapGuard::Arrays& arrays, int number) {
  const TensorTable& table = arrays.table;
  std::vector<Extent> all;
  all.reserve(table.size * table.roles + arrays.counters.size());
  for (int64_t r = 0; r < table.size; ++r)
    for (int role = 0; role < table.roles; ++role)
      if (table.rows[r].data[role]) all.push_back(extent_of(table, r, role, is_written(arrays.writes, role), number));
  for (const Counter& counter : arrays.counters) {
    const auto low = reinterpret_cast<uintptr_t>(counter.data);
    all.push_back({low, low + counter.bytes, &counter - arrays.counters.data(), kCounter, true, false, number});
  }
  return all;
}

// Sorts them, and finds the first two of which one is written.
Overlap find_overlap(std::vector<Extent>& all, const TensorTable* const* tables) {
  std::sort(all.begin(), all.end(), [](const Extent& a, const Extent& b) { return a.low < b.low; });
  for (size_t i = 0; i < all.size(); ++i)
    for (size_t j = i + 1; j < all.size() && all[j].low < all[i].high; ++j)
      if ((all[i].written || all[j].written) && share_memory(tables, all[i], all[j])) return {true, all[i], all[j]};
  return {};
}

// Whether no array that is read reaches into what is written; but for those that lie where they did, if `before` says.
bool reads_are_clear(const OverlapGuard::Arrays& arrays, const std::vector<Extent>& written, const TensorRow* before) {
  const TensorTable& table = arrays.table;
  for (int64_t r = 0; r < table.size; ++r) {
    const TensorRow& now = table.rows[r];
    for (int role = 0; role < table.roles; ++role) {
      if (is_written(arrays.writes, role) || !now.data[role]) continue;
      if (before && now.data[role] == before[r].data[role] && now.dtype[role] == before[r].dtype[role]) continue;
      const Extent read = extent_of(table, r, role, false, 0);
      auto next = std::lower_bound(written.begin(), written.end(), read.high,
                                   [](const Extent& e, uintptr_t address) { return e.low < address; });
      // Written extents with gaps may cross each other, so the one before need not reach farthest: look closer then.
      if (next != written.begin() && ((next - 1)->high > read.low || (next - 1)->gaps)) return false;
    }
  }
  return true;
}

}  // namespace

Overlap OverlapGuard::check(const Arrays& arrays) {
  const TensorTable& table = arrays.table;
  if (same_but_for_reads(arrays) && reads_are_clear(arrays, written_, rows_.data())) {
    rows_.assign(table.rows, table.rows + table.size);
    return {};
  }
  std::vector<Extent> all = extents_of(arrays, 0);
  const TensorTable* const tables[] = {&table};
  const Overlap overlap = find_overlap(all, tables);
  if (overlap.found)
    rows_.clear();
  else
    remember(arrays, all);
  return overlap;
}

Overlap OverlapGuard::check_beside(const Arrays& own, const OverlapGuard& other, const Arrays& others) {
  const std::pair<int64_t, int64_t> versions = {version_, other.version_};
  if (versions == beside_ && reads_are_clear(own, other.written_, nullptr) &&
      reads_are_clear(others, written_, nullptr))
    return {};
  std::vector<Extent> all = extents_of(own, 0);
  const std::vector<Extent> theirs = extents_of(others, 1);
  all.insert(all.end(), theirs.begin(), theirs.end());
  const TensorTable* const tables[] = {&own.table, &others.table};
  const Overlap overlap = find_overlap(all, tables);
  beside_ = overlap.found ? std::pair<int64_t, int64_t>() : versions;
  return overlap;
}

void OverlapGuard::remember(const Arrays& arrays, const std::vector<Extent>& sorted) {
  const TensorTable& table = arrays.table;
  rows_.assign(table.rows, table.rows + table.size);
  layouts_.assign(table.layouts, table.layouts + table.layouts_size);
  counters_ = arrays.counters;
  ++version_;
  block_counts_.clear();
  for (int64_t r = 0; table.blocks && r < table.size; ++r) block_counts_.push_back(table.blocks[r].count);
  written_.clear();
  std::copy_if(sorted.begin(), sorted.end(), std::back_inserter(written_), [](const Extent& e) { return e.written; });
}

bool OverlapGuard::same_but_for_reads(const Arrays& arrays) const {
  const TensorTable& table = arrays.table;
  const std::vector<Counter>& counters = arrays.counters;
  if (int64_t(rows_.size()) != table.size || counters_.size() != counters.size()) return false;
  if (!std::equal(layouts_.begin(), layouts_.end(), table.layouts, table.layouts + table.layouts_size)) return false;
  for (size_t i = 0; i < counters.size(); ++i)
    if (counters_[i].data != counters[i].data || counters_[i].bytes != counters[i].bytes) return false;
  for (int64_t r = 0; r < table.size; ++r) {
    const TensorRow &now = table.rows[r], &then = rows_[r];
    if (now.numel != then.numel || now.layout != then.layout) return false;
    if (table.blocks && table.blocks[r].count != block_counts_[r]) return false;
    for (int role = 0; role < table.roles; ++role)
      if (is_written(arrays.writes, role) && (now.data[role] != then.data[role] || now.dtype[role] != then.dtype[role]))
        return false;
  }
  return true;
}

}  // namespace fusedopt
