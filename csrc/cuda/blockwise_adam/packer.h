// Rows of regions for a launch's table; neighbours that are alike share their kind.
#pragma once
#include <algorithm>

#include "cuda/blockwise_adam/region.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

class RegionPacker : public TablePacker {
 public:
  RegionPacker() : TablePacker(kRowWords) {}

  // False, and nothing changed, if the row does not fit beside those already here.
  bool add(const uint64_t* row, const RegionKind& kind, int32_t scalars, const int64_t* layout, int64_t thread_blocks,
           int head, int64_t smem_bytes) {
    const bool shares = rows().size > 0 && scalars == last_scalars_ && layout == last_layout_ && same(kind, last_);
    const int64_t layout_words = kind.ndim * int64_t(1 + kElementRoles);
    if (!fits(thread_blocks, shares ? 0 : kKindWords + layout_words)) return false;
    if (!shares) {
      uint64_t* words = add_kind(kKindWords + layout_words);
      memcpy(words, &kind, sizeof kind);
      if (layout) memcpy(words + kKindWords, layout + 1, layout_words * sizeof(int64_t));
    }
    add_row(row, thread_blocks, 1, head);
    last_ = kind, last_scalars_ = scalars, last_layout_ = layout;
    smem_bytes_ = std::max(smem_bytes_, smem_bytes);
    return true;
  }

  void clear() {
    TablePacker::clear();
    smem_bytes_ = 0;
  }
  size_t smem_bytes() const { return size_t(smem_bytes_); }  // the most that a row needs

 private:
  // But for scalars and layout.
  static bool same(const RegionKind& a, const RegionKind& b) {
    return memcmp(&a.split, &b.split, sizeof a.split) == 0 && a.shared_sum == b.shared_sum && a.offset == b.offset &&
           memcmp(a.dtype, b.dtype, sizeof a.dtype) == 0;
  }

  int64_t smem_bytes_ = 0;
  RegionKind last_ = {};
  int32_t last_scalars_ = 0;
  const int64_t* last_layout_ = nullptr;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
