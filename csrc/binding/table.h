// Builds the tensor table: checks that a row's arrays fit together and that no two arrays overlap, then packs them.
#pragma once
#include <string>
#include <vector>

#include "binding/arrays.h"
#include "binding/blocks.h"
#include "binding/overlap.h"
#include "common/tensor_table.h"

namespace fusedopt {

// How messages call the arguments that hold a table's arrays: one name per role, and one for the step counters.
struct ArgNames {
  struct Parts {
    std::string prefix, suffix;
  };
  std::vector<Parts> roles;
  Parts counter;

  ArgName of(int role, int64_t index) const {
    const Parts& parts = role == kCounter ? counter : roles[role];
    return {parts.prefix.c_str(), index, parts.suffix.c_str()};
  }
};

struct Operand {  // one array in one role; object is nullptr where the row has none
  PyObject* object;
  ArrayView view;
};

class TableBuilder {
 public:
  // blocks: the last role holds one value per block. row_major: flat means row-major and axes stay in that order, as
  // with blocks that have regions.
  TableBuilder(int roles, unsigned writes, bool blocks = false, bool row_major = false)
      : roles_(roles), per_block_(blocks ? roles - 1 : -1), row_major_(row_major), writes_(writes) {}

  void clear();
  // Adds the row of a parameter (role 0) and of what belongs to it, the index-th of its arguments. Throws if shapes or
  // devices differ or memory can't be written; dtypes are the algorithm's to check. An empty tensor adds nothing.
  // `blocks` where rows have them; global ones all join the block that `shared` numbers.
  void add(const Operand* operands, const ArgNames* names, int64_t index, int32_t scalars,
           const Blocks* blocks = nullptr, int64_t shared = kOwnBlocks);
  void add_counter(const ArrayView& counter, const ArgNames* names, int64_t index);
  // A value that is written beside the table: the name of what holds it is that of a role.
  void add_value(const ArrayView& value, const ArgNames* names, int64_t index, int role);
  // Throws if an array that is written shares memory with another. What passed is remembered.
  void check_overlap();
  // The same for this table and another, each of which has passed on its own.
  void check_overlap(const TableBuilder& other);

  TensorTable table() const;

 private:
  struct Source {
    const ArgNames* names;
    int64_t index;
    int role = kCounter;  // of what lies beside the table
  };

  void check(const Operand* operands, const ArgNames& names, int64_t index) const;
  void check_block_values(const Operand* operands, const ArgNames& names, int64_t index, const Blocks& blocks) const;
  int64_t add_layout(const Operand* operands, const ArgNames& names, int64_t index, const Blocks* blocks,
                     std::vector<BlockRegion>* regions);
  std::string name_of(const Extent& extent) const;
  static void throw_if_found(const Overlap& overlap, const TableBuilder* const* builders);

  int roles_, per_block_;
  bool row_major_;
  unsigned writes_;
  std::vector<TensorRow> rows_;
  std::vector<RowBlocks> blocks_;
  std::vector<BlockRegion> regions_, own_regions_;
  std::vector<int64_t> starts_ = {0}, layouts_;
  std::vector<Counter> counters_;
  std::vector<Source> row_sources_, counter_sources_;
  OverlapGuard guard_;
};

}  // namespace fusedopt
