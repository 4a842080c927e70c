// A preconditioner for plans that nearly fall into pieces, where scaling alone needs thousands of iterations: an
// approximate Cholesky factor of the Laplacian of the bipartite graph of kept entries (Gao, Kyng and Spielman,
// arXiv:2303.00709). Eliminating a node joins its neighbours by a sampled tree instead of a clique, so that a factor
// has about as many entries as the graph; on nodes with up to two neighbours, and so on trees, it is exact.
//
// Nodes are the rows, then the columns. What a node has beyond its edges (dropped entries, the shift) is its tie to the
// ground, which is always eliminated last and exactly.
#pragma once
#include "cpu/sinkhorn_newton_sparse/pass.h"

namespace fusedopt::FUSEDOPT_TARGET {

class ApproximateFactor {
 public:
  ApproximateFactor(const TransportProblem& problem, const Workspace& work)
      : p_(problem), w_(work), nodes_(problem.n + problem.m) {}

  // False: the graph has too many edges, and nothing was built. `columns`: the diagonal of the columns' block.
  bool build(const double* columns) {
    if (!count_edges(columns)) return false;
    find_order();
    hang_edges();
    return eliminate();
  }

  // The columns' part of the solution where the rows' part of the right side is zero.
  void solve(const double* right, double* solution) const {
    double* const x = w_.node;
    for (int64_t v = 0; v < p_.n; ++v) x[v] = 0;
    for (int64_t j = 0; j < p_.m; ++j) x[p_.n + j] = right[j];
    for (int64_t k = 0; k < nodes_; ++k) {
      const double value = x[w_.order[k]];
      for (int64_t e = w_.factor_begin[k]; e < w_.factor_begin[k + 1]; ++e)
        x[w_.factor_other[e]] += w_.factor_weight[e] * value;
    }
    for (int64_t k = nodes_ - 1; k >= 0; --k) {
      const int32_t v = w_.order[k];
      double value = x[v] * w_.pivot[k];
      for (int64_t e = w_.factor_begin[k]; e < w_.factor_begin[k + 1]; ++e)
        value += w_.factor_weight[e] * x[w_.factor_other[e]];
      x[v] = value;
    }
    for (int64_t j = 0; j < w_.mp; ++j) solution[j] = j < p_.m ? x[p_.n + j] : 0;
  }

 private:
  template <typename F>
  void each_edge(const F& visit) const {
    for (int64_t i = 0; i < p_.n; ++i) {
      const double* const blocks = w_.row_blocks(i);
      const int32_t* const columns = w_.row_columns(i);
      for (int32_t k = 0; k < w_.block_count[i]; ++k)
        for (int lane = 0; lane < kLanes; ++lane) {
          const double weight = blocks[k * kLanes + lane];
          const int64_t j = columns[k] + lane;
          const double least = p_.a[i] < w_.b[j] ? p_.a[i] : w_.b[j];
          if (weight > kFaintest * least) visit(int32_t(i), int32_t(p_.n + j), weight);
        }
    }
  }
  static constexpr double kFaintest = 1e-13;

  // Degrees into `mark`, ties to the ground.
  bool count_edges(const double* columns) {
    for (int64_t v = 0; v < nodes_; ++v) {
      w_.ground[v] = v < p_.n ? (p_.a[v] > 0 ? p_.a[v] : 0) : columns[v - p_.n];
      w_.mark[v] = 0;
    }
    edges_ = 0;
    each_edge([&](int32_t u, int32_t v, double weight) {
      ++edges_;
      ++w_.mark[u];
      ++w_.mark[v];
      w_.ground[u] -= weight;
      w_.ground[v] -= weight;
    });
    for (int64_t v = 0; v < nodes_; ++v) {
      const double least = 1e-15 * (v < p_.n ? p_.a[v] : columns[v - p_.n]);  // below is what rounding left
      if (w_.ground[v] < least) w_.ground[v] = least;
    }
    return edges_ <= w_.edge_room;
  }

  // Again and again a node with fewest neighbours left (a tree from its leaves), by buckets of degrees.
  void find_order() {
    int64_t begin = 0;
    for (int64_t v = 0; v < nodes_; ++v) {
      w_.adjacent_begin[v] = begin;
      begin += w_.mark[v];
    }
    w_.adjacent_begin[nodes_] = begin;
    int64_t* const cursor = w_.factor_begin;  // not in use yet
    for (int64_t v = 0; v < nodes_; ++v) cursor[v] = w_.adjacent_begin[v];
    each_edge([&](int32_t u, int32_t v, double) {
      w_.adjacent[cursor[u]++] = v;
      w_.adjacent[cursor[v]++] = u;
    });
    sort_by_degree();
    for (int64_t k = 0; k < nodes_; ++k) {
      const int32_t v = w_.order[k];
      for (int64_t e = w_.adjacent_begin[v]; e < w_.adjacent_begin[v + 1]; ++e) {
        const int32_t u = w_.adjacent[e];
        if (w_.mark[u] > w_.mark[v]) lower_degree(u);
      }
    }
  }

  // order, place and, in `head`, where each degree begins.
  void sort_by_degree() {
    int32_t most = 0;
    for (int64_t v = 0; v < nodes_; ++v) most = w_.mark[v] > most ? w_.mark[v] : most;
    int32_t* const begin = w_.head;
    for (int32_t d = 0; d <= most; ++d) begin[d] = 0;
    for (int64_t v = 0; v < nodes_; ++v) ++begin[w_.mark[v]];
    for (int32_t d = 0, at = 0; d <= most; ++d) {
      const int32_t count = begin[d];
      begin[d] = at;
      at += count;
    }
    for (int64_t v = 0; v < nodes_; ++v) {
      w_.place[v] = begin[w_.mark[v]]++;
      w_.order[w_.place[v]] = int32_t(v);
    }
    for (int32_t d = most; d > 0; --d) begin[d] = begin[d - 1];
    begin[0] = 0;
  }

  void lower_degree(int32_t u) {
    int32_t* const begin = w_.head;
    const int32_t degree = w_.mark[u], at = w_.place[u], first = begin[degree], v = w_.order[first];
    w_.order[at] = v;
    w_.place[v] = at;
    w_.order[first] = u;
    w_.place[u] = first;
    ++begin[degree];
    --w_.mark[u];
  }

  // Every edge in the list of the node that is eliminated first.
  void hang_edges() {
    for (int64_t v = 0; v < nodes_; ++v) w_.head[v] = -1;
    free_ = -1;
    used_ = 0;
    each_edge([&](int32_t u, int32_t v, double weight) { add_edge(u, v, weight); });
  }

  void add_edge(int32_t u, int32_t v, double weight) {
    if (w_.place[u] > w_.place[v]) {
      const int32_t swapped = u;
      u = v;
      v = swapped;
    }
    int32_t e = free_;
    if (e >= 0)
      free_ = w_.edge_next[e];
    else
      e = used_++;
    w_.edge_other[e] = v;
    w_.edge_weight[e] = weight;
    w_.edge_next[e] = w_.head[u];
    w_.head[u] = e;
  }

  bool eliminate() {
    const int64_t room = w_.factor_room;
    uint64_t seed = 1;
    for (int64_t v = 0; v < nodes_; ++v) w_.mark[v] = -1;
    int64_t filled = 0;
    for (int64_t k = 0; k < nodes_; ++k) {
      const int32_t v = w_.order[k];
      const int32_t count = gather(v);
      w_.factor_begin[k] = filled;
      if (filled + count > room) return false;
      sort_near(count);
      double total = w_.ground[v];
      for (int32_t i = 0; i < count; ++i) total += w_.near_weight[i];
      w_.pivot[k] = total > 0 ? 1 / total : 0;
      for (int32_t i = 0; i < count; ++i) {
        w_.factor_other[filled] = w_.near_node[i];
        w_.factor_weight[filled++] = w_.near_weight[i] / total;
      }
      join(count, w_.ground[v], total, &seed);
    }
    w_.factor_begin[nodes_] = filled;
    return true;
  }

  // The node's neighbours, each once, into near_node and near_weight.
  int32_t gather(int32_t v) {
    int32_t count = 0;
    for (int32_t e = w_.head[v]; e >= 0;) {
      const int32_t u = w_.edge_other[e], next = w_.edge_next[e];
      if (w_.mark[u] < 0) {
        w_.mark[u] = count;
        w_.near_node[count] = u;
        w_.near_weight[count++] = w_.edge_weight[e];
      } else {
        w_.near_weight[w_.mark[u]] += w_.edge_weight[e];
      }
      w_.edge_next[e] = free_;
      free_ = e;
      e = next;
    }
    for (int32_t i = 0; i < count; ++i) w_.mark[w_.near_node[i]] = -1;
    return count;
  }

  // Lightest first; Shell's sort.
  void sort_near(int32_t count) {
    for (int32_t gap = count / 2; gap > 0; gap /= 2)
      for (int32_t i = gap; i < count; ++i) {
        const double weight = w_.near_weight[i];
        const int32_t node = w_.near_node[i];
        int32_t k = i;
        for (; k >= gap && w_.near_weight[k - gap] > weight; k -= gap) {
          w_.near_weight[k] = w_.near_weight[k - gap];
          w_.near_node[k] = w_.near_node[k - gap];
        }
        w_.near_weight[k] = weight;
        w_.near_node[k] = node;
      }
  }

  // Instead of all pairs: each neighbour with the ground, and with one heavier neighbour drawn by weight.
  void join(int32_t count, double ground, double total, uint64_t* seed) {
    double rest = 0;
    for (int32_t i = 0; i < count; ++i) rest += w_.near_weight[i];
    for (int32_t i = 0; i < count; ++i) {
      const double weight = w_.near_weight[i];
      w_.ground[w_.near_node[i]] += weight * (ground / total);
      if (i + 1 == count) break;
      rest -= weight;
      double drawn = uniform(seed) * rest;
      int32_t other = i + 1;
      while (other + 1 < count && drawn >= w_.near_weight[other]) drawn -= w_.near_weight[other++];
      if (rest > 0) add_edge(w_.near_node[i], w_.near_node[other], weight * (rest / total));
    }
  }

  static double uniform(uint64_t* seed) {  // splitmix64
    uint64_t z = *seed += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return double((z ^ z >> 31) >> 11) * 0x1p-53;
  }

  const TransportProblem& p_;
  const Workspace& w_;
  int64_t nodes_, edges_ = 0;
  int32_t free_ = -1, used_ = 0;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
