// Packing of sequences into micro-batches of a fixed token capacity, and their assignment to data-parallel ranks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

struct PackOptions {
  int64_t capacity;   // tokens a micro-batch
  int dp = 1;         // ranks
  double cost_a = 1;  // cost of a sequence of length L: a*L + b*L^2
  double cost_b = 0;
  int max_segments = 0;  // sequences a micro-batch; 0 = no bound
};

// Bin (rank, step) holds items[offsets[b] .. offsets[b+1]) with b = rank * n_mb + step.
struct Packing {
  int n_mb = 0;  // micro-batches a rank
  std::vector<int32_t> offsets;
  std::vector<int32_t> items;
  std::vector<double> rank_cost;  // [dp]
  double lockstep = 1;            // sum over steps of the slowest rank's cost / (total cost / dp)
  double efficiency = 1;          // tokens / (bins * capacity)
};

// lengths[i] in [1, capacity]. A pure function of its arguments.
Packing pack(std::span<const int32_t> lengths, const PackOptions& options);

// What is packed whole may be several sequences: with a cost of its own each, and max_segments bounding `segments`.
struct PackUnits {
  std::span<const int32_t> lengths;   // in [1, capacity]
  std::span<const double> costs;      // empty: of the length
  std::span<const int32_t> segments;  // at most max_segments; empty: 1 each
};
Packing pack(const PackUnits& units, const PackOptions& options);

}  // namespace mgrpo
