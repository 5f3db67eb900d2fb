// What rows of tokens have in common: a prefix tree (trie) with one node for each run of tokens that no row leaves.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

// R rows of tokens anywhere in memory; lengths >= 1.
template <typename Token>
struct TokenRows {
  std::span<const Token* const> tokens;
  std::span<const int32_t> lengths;
};

// N nodes in preorder. Children are in the order of their first rows, and so are roots. A row may end within its last
// node.
struct PrefixTree {
  std::vector<int32_t> row;         // [N] the first row that has all of the node
  std::vector<int32_t> begin, end;  // [N] of that row's tokens; begin is the depth of the node
  std::vector<int32_t> parent;      // [N] -1: a root
  std::vector<int32_t> stop;        // [N] the number behind the last node below it
  std::vector<int32_t> leaf;        // [R] the node in which each row ends

  size_t size() const { return row.size(); }
  int64_t tokens() const;  // of all nodes
};

// A node that saves fewer than min_saved tokens (its length x its children less one) is pushed down into its children;
// the rows that end in it go to the first of these. Each row is read once at most, and compared with one that has the
// same tokens.
template <typename Token>
PrefixTree prefix_tree(const TokenRows<Token>& rows, int64_t min_saved);

extern template PrefixTree prefix_tree(const TokenRows<int32_t>&, int64_t);
extern template PrefixTree prefix_tree(const TokenRows<int64_t>&, int64_t);

// The rows in the order in which the first row of every node has all of it: a row that ends in a node comes behind all
// that go on from there, the longer of two that end in one node first, equal ones by their number.
std::vector<int32_t> covering_order(const PrefixTree& tree, std::span<const int32_t> lengths);

}  // namespace mgrpo
