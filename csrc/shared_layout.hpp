// Micro-batches for a policy that computes what their rows have in common once.
#pragma once

#include <optional>

#include "pack.hpp"
#include "padded_layout.hpp"
#include "prefix_tree.hpp"

namespace mgrpo {

struct SharedOptions {
  PackOptions pack;
  int64_t min_saved = 1;  // of prefix_tree()
  bool hold = false;      // pieces of one tree keep its root; only with dp == 1
};

struct SharedLayout {
  PaddedLayout padded;
  std::vector<int32_t> item_shared;  // [N] leading entering tokens that another row, or the held prefix, has computed
  int64_t shared_tokens = 0;         // entering tokens that no forward pass computes
};

// `entering` are the tokens of each item that enter the model (all but the last), at most `capacity`; `lengths` all of
// its tokens. The distinct entering tokens of a micro-batch are at most `capacity`, and its rows at most max_segments.
// A tree of rows stays in one micro-batch where it fits; otherwise it is cut at branches, and each piece repeats what
// leads to it. With `hold` the pieces of one tree are micro-batches that follow one another and its root is computed
// once for them. Rows are in covering_order(), those that end within a held root last. No value when no two items
// share anything. A pure function of its arguments.
std::optional<SharedLayout> share_prefixes(const TokenRows<int32_t>& entering, std::span<const int32_t> lengths,
                                           const SharedOptions& options);

}  // namespace mgrpo
