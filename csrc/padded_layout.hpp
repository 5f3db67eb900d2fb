// Right-padded micro-batches of a plan: which items, in which order, how wide.
#pragma once

#include <cstdint>
#include <vector>

namespace mgrpo {

// Micro-batch b = rank * n_mb + step has the rows items[offsets[b] .. offsets[b+1]), each `width[b]` tokens wide.
struct PaddedLayout {
  int n_mb = 0;
  std::vector<int32_t> offsets, items, width;
  // Of a prefix that several micro-batches share and that is computed once for them: its tokens (0: none), the first of
  // each of their rows, and its number (-1: none).
  std::vector<int32_t> prefix, prefix_id;
};

}  // namespace mgrpo
