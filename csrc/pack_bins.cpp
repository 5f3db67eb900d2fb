#include "pack_bins.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <queue>

#include "bitset_tree.hpp"

namespace mgrpo {

namespace {

constexpr int kRadixBits = 11;

// Stable radix sort by decreasing key.
void sort_decreasing(std::span<const int32_t> keys, std::vector<int32_t>& order, int64_t largest) {
  std::vector<int32_t> other(order.size());
  for (int shift = 0; (largest >> shift) > 0; shift += kRadixBits) {
    std::array<int32_t, (1 << kRadixBits) + 1> begin{};
    constexpr int32_t mask = (1 << kRadixBits) - 1;
    for (const int32_t key : keys) ++begin[mask - ((key >> shift) & mask) + 1];
    for (int d = 0; d < (1 << kRadixBits); ++d) begin[d + 1] += begin[d];
    for (const int32_t i : order) other[begin[mask - ((keys[i] >> shift) & mask)]++] = i;
    order.swap(other);
  }
}

}  // namespace

Sequences::Sequences(const PackUnits& units, const PackOptions& o)
    : capacity(o.capacity),
      max_segments(o.max_segments ? o.max_segments : std::numeric_limits<int32_t>::max()),
      index(units.lengths.size()),
      length(units.lengths.size()),
      segments(units.lengths.size(), 1),
      cost(units.lengths.size()) {
  const std::span<const int32_t> lengths = units.lengths;
  int64_t largest = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    index[i] = int32_t(i);
    largest = std::max<int64_t>(largest, lengths[i]);
  }
  sort_decreasing(lengths, index, largest);
  for (size_t p = 0; p < index.size(); ++p) {
    const double l = length[p] = lengths[index[p]];
    cost[p] = units.costs.empty() ? o.cost_a * l + o.cost_b * l * l : units.costs[index[p]];
    if (!units.segments.empty()) segments[p] = units.segments[index[p]];
    total_cost += cost[p];
    tokens += length[p];
  }
}

namespace {

// Bins by their room, kept between calls: clearing what was used is cheaper than a fresh table of capacity + 1 entries.
struct Rooms {
  std::vector<int32_t> top;    // room -> bin that came to it last, or -1
  std::vector<int32_t> below;  // bin -> the one before it at the same room
  BitsetTree taken{1};

  void prepare(int64_t capacity) {
    clear();
    if (int64_t(top.size()) > capacity) return;
    top.assign(size_t(capacity) + 1, -1);
    taken = BitsetTree(capacity + 1);
  }
  void push(int64_t room, int32_t bin) {
    if (int64_t(below.size()) <= bin) below.resize(size_t(bin) + 1);
    below[bin] = top[room];
    if (top[room] < 0) taken.insert(room);
    top[room] = bin;
  }
  int32_t pop(int64_t room) {
    const int32_t bin = top[room];
    top[room] = below[bin];
    if (top[room] < 0) taken.erase(room);
    return bin;
  }
  void clear() {
    for (int64_t room = taken.next(0); room >= 0; room = taken.next(room + 1)) {
      top[room] = -1;
      taken.erase(room);
    }
  }
};

// Out of line, so that the address of the thread's own is looked up once a call, not once an access.
[[gnu::noinline]] Rooms& kept_rooms() {
  thread_local Rooms rooms;
  return rooms;
}

}  // namespace

void best_fit_decreasing(const Sequences& s, Bins& bins) {
  Rooms& rooms = kept_rooms();
  rooms.prepare(s.capacity);
  for (int64_t p = 0; p < s.size(); ++p) {
    if (bins.of[p] >= 0) continue;
    int64_t room = rooms.taken.next(s.length[p]);
    while (room >= 0 && room <= s.capacity && !s.fits(bins.bins[rooms.top[room]], p)) room = rooms.taken.next(room + 1);
    int32_t bin;
    if (room >= 0 && room <= s.capacity) {
      bin = rooms.pop(room);
    } else {
      bin = int32_t(bins.bins.size());
      bins.bins.emplace_back();
    }
    s.put(bins, p, bin);
    const Bin& filled = bins.bins[bin];
    if (filled.tokens < s.capacity && filled.segments < s.max_segments) rooms.push(s.capacity - filled.tokens, bin);
  }
  rooms.clear();
}

bool cheapest_first(const Sequences& s, Bins& bins, int32_t first) {
  using Ticket = std::pair<double, int32_t>;
  std::priority_queue<Ticket, std::vector<Ticket>, std::greater<>> open;
  for (int32_t b = first; b < int32_t(bins.bins.size()); ++b) open.emplace(bins.bins[b].cost, b);
  std::vector<Ticket> passed;
  const int32_t fewest = s.size() ? *std::min_element(s.segments.begin(), s.segments.end()) : 0;
  for (int64_t p = 0; p < s.size(); ++p) {
    if (bins.of[p] >= 0) continue;
    passed.clear();
    while (!open.empty() && !s.fits(bins.bins[open.top().second], p)) {
      const Bin& bin = bins.bins[open.top().second];
      if (bin.tokens + s.length.back() <= s.capacity && bin.segments + fewest <= s.max_segments)
        passed.push_back(open.top());  // there may be one that it takes
      open.pop();
    }
    if (open.empty()) return false;
    const int32_t bin = open.top().second;
    open.pop();
    s.put(bins, p, bin);
    open.emplace(bins.bins[bin].cost, bin);
    for (const Ticket& ticket : passed) open.push(ticket);
  }
  return true;
}

void heavy_step(const Sequences& s, Bins& bins, int dp) {
  const int32_t first = int32_t(bins.bins.size());
  bins.bins.resize(size_t(first) + dp);
  int64_t p = 0;
  for (int32_t b = first; b < first + dp; ++b) {
    while (p < s.size() && bins.of[p] >= 0) ++p;
    if (p < s.size()) s.put(bins, p, b);
  }
  const double limit = bins.bins[first].cost;
  for (int32_t b = first; b < first + dp; ++b) {
    const Bin& bin = bins.bins[b];
    while (bin.count && bin.segments < s.max_segments) {
      const int64_t room = s.capacity - bin.tokens;
      // Lengths fall with the position: the first that fits is the longest that fits.
      int64_t q = std::partition_point(s.length.begin(), s.length.end(), [&](int32_t l) { return l > room; }) -
                  s.length.begin();
      while (q < s.size() && (bins.of[q] >= 0 || bin.cost + s.cost[q] > limit || !s.fits(bin, q))) ++q;
      if (q == s.size()) break;
      s.put(bins, q, b);
    }
  }
}

void rebalance(const Sequences& s, Bins& bins, std::span<const int32_t> members, std::span<const int32_t> positions) {
  double max_cost = 0;
  for (const int32_t b : members) max_cost = std::max(max_cost, bins.bins[b].cost);
  std::vector<Bin> fresh(members.size());
  std::vector<int32_t> choice(positions.size());
  for (size_t i = 0; i < positions.size(); ++i) {
    const int32_t p = positions[i];
    int best = -1;
    for (int m = 0; m < int(fresh.size()); ++m)
      if (s.fits(fresh[m], p) && (best < 0 || fresh[m].cost < fresh[best].cost)) best = m;
    if (best < 0) return;
    s.add(fresh[best], p);
    if (fresh[best].cost >= max_cost) return;
    choice[i] = best;
  }
  for (size_t m = 0; m < members.size(); ++m) bins.bins[members[m]] = fresh[m];
  for (size_t i = 0; i < positions.size(); ++i) bins.of[positions[i]] = members[choice[i]];
}

}  // namespace mgrpo
