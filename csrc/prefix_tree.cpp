#include "prefix_tree.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

namespace mgrpo {

namespace {

// How many of n tokens are the same in both.
template <typename Token>
int32_t common(const Token* a, const Token* b, int32_t n) {
  int32_t i = 0;
  for (const size_t bytes : {size_t{4096}, size_t{256}}) {  // many tokens a call, then closer to the difference
    const int32_t step = int32_t(bytes / sizeof(Token));
    while (i + step <= n && std::memcmp(a + i, b + i, bytes) == 0) i += step;
  }
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

// (parent, first token) -> child, for all nodes in one table with open addressing: a root with thousands of children is
// as fast as one with two.
class Children {
 public:
  // The place of the child: -1 where there is none yet, to be filled by the caller before the next call.
  int32_t& at(int32_t parent, int64_t token) {
    if (2 * used_ >= slots_.size()) grow();
    Slot& slot = find(parent, token);
    if (slot.child < 0) ++used_;
    slot.parent = parent;
    slot.token = token;
    return slot.child;
  }

 private:
  struct Slot {
    int32_t parent = -1, child = -1;
    int64_t token = 0;
  };

  Slot& find(int32_t parent, int64_t token) {
    const size_t mask = slots_.size() - 1;
    uint64_t h = (uint64_t(token) + uint64_t(uint32_t(parent + 1)) * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    size_t i = size_t(h ^ (h >> 31)) & mask;
    while (slots_[i].child >= 0 && (slots_[i].parent != parent || slots_[i].token != token)) i = (i + 1) & mask;
    return slots_[i];
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old)
      if (slot.child >= 0) find(slot.parent, slot.token) = slot;
  }

  std::vector<Slot> slots_ = std::vector<Slot>(256);
  size_t used_ = 0;
};

struct Node {
  int32_t parent = -1;
  int32_t begin = 0, end = 0;
  int32_t source = 0;    // some row that has all of it
  int32_t children = 0;  // their number
  // Set when all rows are in:
  int32_t row = -1;                          // the first row that has all of it
  bool reached = false;                      // by some row's way up
  int32_t first = -1, last = -1, next = -1;  // children and siblings by their first rows
};

// The tree before nodes are pushed down.
template <typename Token>
class Trie {
 public:
  explicit Trie(const TokenRows<Token>& rows) : rows_(rows) {
    leaf.reserve(rows.lengths.size());
    for (int32_t r = 0; r < int32_t(rows.lengths.size()); ++r) leaf.push_back(insert(r));
    order();
  }

  std::vector<Node> nodes;
  std::vector<int32_t> leaf;  // by row
  int32_t first_root = -1;

 private:
  int32_t add(Node node) {
    if (node.parent >= 0) ++nodes[node.parent].children;
    nodes.push_back(node);
    return int32_t(nodes.size()) - 1;
  }

  // The node in which the row ends; a later row may split it.
  int32_t insert(int32_t row) {
    const Token* tokens = rows_.tokens[row];
    const int32_t length = rows_.lengths[row];
    int32_t at = 0;
    for (int32_t parent = -1;;) {
      int32_t& child = children_.at(parent, int64_t(tokens[at]));
      if (child < 0) return child = add({.parent = parent, .begin = at, .end = length, .source = row});
      const int32_t n = child, end = nodes[n].end;
      at += common(tokens + at, rows_.tokens[nodes[n].source] + at, std::min(length, end) - at);
      if (at == length) return n;
      if (at < end) return split(child, at, row);
      if (nodes[n].children == 0) {  // nobody went on from here: the node grows
        nodes[n].end = length;
        nodes[n].source = row;
        return n;
      }
      parent = n;
    }
  }

  // The lower part keeps the number, and so its children; the new row leaves the upper one.
  int32_t split(int32_t& place, int32_t at, int32_t row) {
    const int32_t lower = place;
    const Node old = nodes[lower];
    const int32_t upper = int32_t(nodes.size());
    nodes.push_back({.parent = old.parent, .begin = old.begin, .end = at, .source = old.source, .children = 1});
    place = upper;
    nodes[lower].parent = upper;
    nodes[lower].begin = at;
    children_.at(upper, int64_t(rows_.tokens[old.source][at])) = lower;
    const int32_t fresh = add({.parent = upper, .begin = at, .end = rows_.lengths[row], .source = row});
    children_.at(upper, int64_t(rows_.tokens[row][at])) = fresh;
    return fresh;
  }

  // Leaves of rows whose node was split, first rows and the order of children.
  void order() {
    std::vector<int32_t> last(1, -1);
    for (int32_t r = 0; r < int32_t(leaf.size()); ++r) {
      const int32_t length = rows_.lengths[r];
      while (length <= nodes[leaf[r]].begin) leaf[r] = nodes[leaf[r]].parent;
      int32_t n = leaf[r];
      for (; n >= 0 && !nodes[n].reached; n = nodes[n].parent) {
        nodes[n].reached = true;
        int32_t& before = nodes[n].parent < 0 ? last[0] : nodes[nodes[n].parent].last;
        int32_t& first = nodes[n].parent < 0 ? first_root : nodes[nodes[n].parent].first;
        (before < 0 ? first : nodes[before].next) = n;
        before = n;
      }
      n = length == nodes[leaf[r]].end ? leaf[r] : nodes[leaf[r]].parent;
      for (; n >= 0 && nodes[n].row < 0; n = nodes[n].parent) nodes[n].row = r;
    }
  }

  TokenRows<Token> rows_;
  Children children_;
};

struct Visit {
  int32_t node, begin, parent;  // the parent is numbered in preorder
};

// `leaves`: of the rows, as they were inserted.
PrefixTree flatten(const std::vector<Node>& nodes, const std::vector<int32_t>& leaves, int32_t first_root,
                   int64_t min_saved) {
  PrefixTree out;
  std::vector<int32_t> number(nodes.size(), -1), pushed, siblings;
  std::vector<Visit> open;
  const auto descend = [&](int32_t first, int32_t begin, int32_t parent) {
    siblings.clear();
    for (int32_t n = first; n >= 0; n = nodes[n].next) siblings.push_back(n);
    for (size_t i = siblings.size(); i-- > 0;)
      open.push_back({siblings[i], begin < 0 ? nodes[siblings[i]].begin : begin, parent});
  };
  descend(first_root, -1, -1);
  while (!open.empty()) {
    const Visit v = open.back();
    open.pop_back();
    const Node& node = nodes[v.node];
    if (node.children > 1 && int64_t{node.end - v.begin} * (node.children - 1) < min_saved) {
      pushed.push_back(v.node);
      descend(node.first, v.begin, v.parent);
      continue;
    }
    number[v.node] = int32_t(out.size());
    out.row.push_back(node.row);
    out.begin.push_back(v.begin);
    out.end.push_back(node.end);
    out.parent.push_back(v.parent);
    descend(node.first, -1, number[v.node]);
  }
  for (size_t i = pushed.size(); i-- > 0;) number[pushed[i]] = number[nodes[pushed[i]].first];
  out.leaf.reserve(leaves.size());
  for (const int32_t n : leaves) out.leaf.push_back(number[n]);
  out.stop.resize(out.size());
  std::iota(out.stop.begin(), out.stop.end(), 1);
  for (size_t n = out.size(); n-- > 0;)
    if (out.parent[n] >= 0) out.stop[out.parent[n]] = std::max(out.stop[out.parent[n]], out.stop[n]);
  return out;
}

}  // namespace

int64_t PrefixTree::tokens() const {
  int64_t sum = 0;
  for (size_t n = 0; n < size(); ++n) sum += end[n] - begin[n];
  return sum;
}

template <typename Token>
PrefixTree prefix_tree(const TokenRows<Token>& rows, int64_t min_saved) {
  const Trie<Token> trie(rows);
  return flatten(trie.nodes, trie.leaf, trie.first_root, min_saved);
}

template PrefixTree prefix_tree(const TokenRows<int32_t>&, int64_t);
template PrefixTree prefix_tree(const TokenRows<int64_t>&, int64_t);

std::vector<int32_t> covering_order(const PrefixTree& tree, std::span<const int32_t> lengths) {
  std::vector<int32_t> order(tree.leaf.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int32_t m = tree.leaf[a], n = tree.leaf[b];
    if (tree.stop[m] != tree.stop[n]) return tree.stop[m] < tree.stop[n];
    return m != n ? m > n : lengths[a] > lengths[b];
  });
  return order;
}

}  // namespace mgrpo
