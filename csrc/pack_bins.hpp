// Ways to put sequences into bins of a fixed capacity. All of them see the sequences in one canonical order, by
// decreasing length and then by index, and name a sequence by its position in it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pack.hpp"

namespace mgrpo {

struct Bin {
  int64_t tokens = 0;
  double cost = 0;
  int32_t count = 0;
  int32_t segments = 0;  // more than count where sequences are units of several
};

struct Bins {
  std::vector<Bin> bins;
  std::vector<int32_t> of;  // position -> bin
};

class Sequences {
 public:
  Sequences(const PackUnits& units, const PackOptions& options);

  int64_t size() const { return int64_t(length.size()); }
  bool fits(const Bin& bin, int64_t position) const {
    return bin.tokens + length[position] <= capacity && bin.segments + segments[position] <= max_segments;
  }
  void put(Bins& into, int64_t position, int32_t bin) const {
    into.of[position] = bin;
    add(into.bins[bin], position);
  }

  void add(Bin& bin, int64_t position) const {
    bin.tokens += length[position];
    bin.cost += cost[position];
    bin.segments += segments[position];
    ++bin.count;
  }

  int64_t capacity;
  int32_t max_segments;
  int64_t tokens = 0;
  double total_cost = 0;
  std::vector<int32_t> index;     // position -> caller's index
  std::vector<int32_t> length;    // by position
  std::vector<int32_t> segments;  // by position
  std::vector<double> cost;       // by position
};

// Best-fit decreasing: a sequence goes to the fullest bin that takes it; among bins of equal room, to the one that
// came to this room last. Of units, a bin whose segments are too many is passed over. Positions with `of` >= 0 are
// placed already; new bins are appended.
void best_fit_decreasing(const Sequences& s, Bins& bins);

// Longest first to the cheapest of the bins [first, end) that takes it (then to the lowest number). False when a
// sequence fits nowhere: then `bins` is half-filled and worthless.
bool cheapest_first(const Sequences& s, Bins& bins, int32_t first);

// One micro-step of dp bins around sequences so long that they alone are dearer than an average bin: the dp longest
// open one bin each, and each bin in turn takes the longest sequences that fit, as long as it stays within the cost of
// the opener of the highest cost. What they take, the other micro-steps need not carry.
void heavy_step(const Sequences& s, Bins& bins, int dp);

// Deals the sequences of the bins `members` (a whole micro-step) anew, cheapest bin first; keeps the result only when
// the bin of the highest cost gets cheaper. `positions` are the members' sequences in canonical order.
void rebalance(const Sequences& s, Bins& bins, std::span<const int32_t> members, std::span<const int32_t> positions);

}  // namespace mgrpo
