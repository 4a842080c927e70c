// How the blocks of a region are cut into units of work. It follows from the region alone, never from the number of
// threads, so that every sum has one order.
//
// One pass, where a block's gradient stays in a cache until it is read again: a unit is a few whole blocks. Two passes
// where it does not, or where a block spans several tensors: units are pieces of blocks; their sums are stored, added
// up in the order of the units, and the update then runs over the same units.
//
// A region of one row has its blocks one after another in memory. In one of more rows they are columns: a unit is a
// strip of columns over some rows, which go four at a time, a quarter of the unit apart.
#pragma once
#include "common/tensor_table.h"
#include "math/target.h"

namespace fusedopt {

struct SharedSum {  // of the squared gradients of a block over several tensors
  double sum, count;
};

struct BlockSums {        // what a launch keeps between its passes
  const int64_t* places;  // of each region of the table: where its part of `values` begins, or kOnePass
  double* values;         // one per block (its rate), then one per unit and block of the unit (sums)
  SharedSum* shared;      // by BlockRegion::shared, zero at first
};
constexpr int64_t kOnePass = -1;

}  // namespace fusedopt

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int64_t kSumLanes = 32;         // shorter blocks are summed by another loop
constexpr int64_t kShortRun = 512;        // elements of a unit of such blocks
constexpr int64_t kOneRate = 128;         // from this size on blocks are updated one by one, smaller ones together
constexpr int64_t kMiddleRun = 1024;      // elements of a unit of blocks below that
constexpr int64_t kRun = 2048;            // elements of a unit of longer ones: in L1 with their rates
constexpr int64_t kLongestRun = 1 << 16;  // a longer block goes in two passes: its gradient would fill L2
constexpr int64_t kPiece = 1 << 14;       // elements of a unit of the latter
constexpr int64_t kWidest = 4096;         // columns of a strip: their sums stay in L1 or L2, its rows are long
constexpr int64_t kStripPiece = 1 << 18;  // elements of a unit of several rows: streams that are worth starting
constexpr int64_t kMostBlocks = kWidest;  // of a unit

struct BlockUnit {
  int64_t row, rows, column, columns;  // within the region
  int64_t block, blocks;               // of the region
};

class BlockSplit {
 public:
  explicit BlockSplit(const BlockRegion& region) : region_(region) {
    if (coordinates()) {
      one_pass_ = true;
      width_ = height_ = 1;
    } else if (region.rows == 1) {
      split_run();
    } else {
      split_columns();
    }
    strips_ = per_block_ > 1 ? region.blocks() * per_block_ : ceil_div(region.columns, width_);
    layers_ = ceil_div(region.rows, height_);
  }

  bool coordinates() const { return region_.rows == 1 && region_.group == 1 && region_.shared == kOwnBlocks; }
  bool one_pass() const { return one_pass_; }
  int64_t units() const { return strips_ * layers_; }
  int64_t blocks_per_unit() const { return per_block_ > 1 ? 1 : width_ / region_.group; }
  int64_t values() const { return one_pass_ ? 0 : region_.blocks() + units() * blocks_per_unit(); }

  BlockUnit unit(int64_t index) const {
    const int64_t layer = index / strips_, strip = index % strips_, row = layer * height_;
    BlockUnit unit = {row, smaller(height_, region_.rows - row), 0, 0, 0, 1};
    if (per_block_ > 1) {
      unit.block = strip / per_block_;
      const int64_t begin = unit.block * region_.group, end = smaller(begin + region_.group, region_.columns);
      unit.column = smaller(begin + strip % per_block_ * width_, end);
      unit.columns = smaller(width_, end - unit.column);
    } else {
      unit.column = strip * width_;
      unit.columns = smaller(width_, region_.columns - unit.column);
      unit.block = unit.column / region_.group;
      unit.blocks = ceil_div(unit.columns, region_.group);
    }
    return unit;
  }

  // The first unit that begins at or after an element, counted through the region in the order of units.
  int64_t unit_at(int64_t element) const {
    if (element <= 0) return 0;
    if (element >= region_.numel()) return units();
    const double share = double(element) * double(units()) / double(region_.numel());
    const int64_t below = int64_t(share);
    return smaller(below + (double(below) < share), units());
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  void split_run() {
    height_ = 1;
    const int64_t target = region_.group < kSumLanes ? kShortRun : region_.group < kOneRate ? kMiddleRun : kRun;
    one_pass_ = region_.shared == kOwnBlocks && region_.group <= kLongestRun;
    if (one_pass_)
      whole_blocks(target);
    else
      pieces(kPiece);
  }

  void split_columns() {
    if (region_.group <= kWidest)
      whole_blocks(kWidest);
    else
      pieces(kWidest);
    one_pass_ = region_.shared == kOwnBlocks && region_.group <= kWidest && region_.numel() <= kLongestRun;
    height_ = one_pass_ ? region_.rows : ceil_div(kStripPiece, width_);
  }

  void whole_blocks(int64_t target) {
    width_ = region_.group < target ? target / region_.group * region_.group : region_.group;
  }
  void pieces(int64_t width) {
    per_block_ = ceil_div(region_.group, width);
    width_ = per_block_ > 1 ? width : region_.group;
  }

  const BlockRegion& region_;
  bool one_pass_ = false;
  int64_t width_ = 0, height_ = 0;  // of a unit
  int64_t per_block_ = 1;           // strips that a block is cut into; 1: a strip has whole blocks
  int64_t strips_ = 0, layers_ = 0;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
