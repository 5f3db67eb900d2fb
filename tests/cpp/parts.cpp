// The parts below the batcher: generator, bitset, arena, packer.
#include <algorithm>
#include <numeric>
#include <set>

#include "arena.hpp"
#include "bitset_tree.hpp"
#include "draw.hpp"
#include "harness.hpp"
#include "pack.hpp"
#include "shared_layout.hpp"

using namespace mgrpo;

CASE(philox_known_answer) {
  const PhiloxCounter zero = philox4x32_10({0, 0, 0, 0}, {0, 0});
  REQUIRE((zero == PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

CASE(draw_sums_to_d_max) {
  std::vector<int32_t> copies;
  for (uint32_t rollout = 0; rollout < 500; ++rollout) {
    for (int d = 0; d < 9; ++d) {
      const DrawStream stream(draw_key(1, "7/3", "sub"), rollout, rollout);
      multiplicities(stream, d, 5, Mode::weights, copies);
      REQUIRE(std::accumulate(copies.begin(), copies.end(), 0) == (d ? 5 : 0));
      REQUIRE(d > 5 || std::all_of(copies.begin(), copies.end(), [](int32_t m) { return m >= 1; }));
    }
  }
}

CASE(bitset_tree_is_a_set) {
  harness::Random random(1);
  for (const int64_t n : {1, 63, 64, 65, 5000, 300000}) {
    BitsetTree tree(n);
    std::set<int64_t> model;
    for (int i = 0; i < 4000; ++i) {
      const int64_t x = random(0, n - 1);
      if (random(0, 2)) {
        tree.insert(x);
        model.insert(x);
      } else if (model.erase(x)) {
        tree.erase(x);
      }
      const int64_t from = random(0, n);
      const auto expected = model.lower_bound(from);
      REQUIRE(tree.next(from) == (expected == model.end() ? -1 : *expected));
    }
  }
}

CASE(arena_keeps_what_it_holds) {
  harness::Random random(2);
  Arena arena(13 * 4096, true);
  struct Held {
    int32_t handle;
    int64_t length;
    uint8_t mark;
  };
  std::vector<Held> held;
  int64_t refused = 0;
  for (int i = 0; i < 20000; ++i) {
    if (random(0, 1) || held.empty()) {
      const int64_t length = random(1, 200);
      const int32_t handle = arena.allocate(length);
      if (handle < 0) {
        ++refused;
        REQUIRE(arena.used_tokens() + (length + 15) / 16 * 16 > arena.capacity_tokens());
        continue;
      }
      const auto mark = uint8_t(random(0, 255));
      std::fill_n(arena.ids(handle), length, int32_t(mark));
      std::fill_n(arena.logprobs(handle), length, float(mark));
      std::fill_n(arena.advantages(handle), length, float(mark));
      std::fill_n(arena.masks(handle), length, mark);
      REQUIRE(reinterpret_cast<uintptr_t>(arena.ids(handle)) % 16 == 0);
      held.push_back({handle, length, mark});
    } else {
      std::swap(held[size_t(random(0, int64_t(held.size()) - 1))], held.back());
      const Held last = held.back();
      held.pop_back();
      const uint32_t generation = arena.generation(last.handle);
      for (int64_t t = 0; t < last.length; ++t) {
        REQUIRE(arena.ids(last.handle)[t] == last.mark);
        REQUIRE(arena.logprobs(last.handle)[t] == float(last.mark));
        REQUIRE(arena.advantages(last.handle)[t] == float(last.mark));
        REQUIRE(arena.masks(last.handle)[t] == last.mark);
      }
      arena.release(last.handle);
      REQUIRE(arena.generation(last.handle) != generation);
    }
  }
  REQUIRE(refused > 100);
  for (const Held& h : held) arena.release(h.handle);
  REQUIRE(arena.used_tokens() == 0);
  REQUIRE(arena.allocate(4096) >= 0);  // the holes grew together again
}

CASE(packing_holds_everything_once) {
  harness::Random random(3);
  for (int round = 0; round < 400; ++round) {
    PackOptions o{.capacity = random(20, 3000), .dp = int(random(1, 9)), .cost_a = 1, .cost_b = 0.001};
    if (random(0, 1)) o.max_segments = int(random(1, 20));
    std::vector<int32_t> lengths(size_t(random(0, 300)));
    for (int32_t& l : lengths) l = int32_t(random(1, random(0, 3) ? std::min<int64_t>(o.capacity, 40) : o.capacity));
    const Packing p = pack(lengths, o);
    std::vector<int32_t> items = p.items;
    std::sort(items.begin(), items.end());
    for (size_t i = 0; i < lengths.size(); ++i) REQUIRE(items[i] == int32_t(i));
    REQUIRE(p.offsets.size() == size_t(p.n_mb) * o.dp + 1 && size_t(p.offsets.back()) == lengths.size());
    for (size_t b = 0; b + 1 < p.offsets.size(); ++b) {
      int64_t tokens = 0;
      for (int32_t i = p.offsets[b]; i < p.offsets[b + 1]; ++i) tokens += lengths[p.items[i]];
      REQUIRE(tokens <= o.capacity);
      REQUIRE(o.max_segments == 0 || p.offsets[b + 1] - p.offsets[b] <= o.max_segments);
    }
    REQUIRE(p.lockstep >= 1 - 1e-9);
  }
}

CASE(shared_layouts_hold_everything_once) {
  harness::Random random(4);
  for (int round = 0; round < 200; ++round) {
    SharedOptions o{.pack = {.capacity = random(20, 300), .dp = int(random(1, 4)), .cost_b = 0.001},
                    .min_saved = random(1, 40)};
    if (random(0, 1)) o.pack.max_segments = int(random(1, 9));
    o.hold = o.pack.dp == 1 && random(0, 1);
    std::vector<std::vector<int32_t>> rows(size_t(random(0, 40)));
    std::vector<const int32_t*> tokens;
    std::vector<int32_t> lengths, entering;
    for (size_t r = 0; r < rows.size(); ++r) {
      if (r && random(0, 4)) {
        const std::vector<int32_t>& base = rows[size_t(random(0, int64_t(r) - 1))];
        rows[r].assign(base.begin(), base.begin() + random(0, int64_t(base.size())));
      }
      for (int64_t own = random(0, o.pack.capacity / 3); own > 0; --own) rows[r].push_back(int32_t(random(0, 2)));
      rows[r].resize(std::clamp<size_t>(rows[r].size(), 1, size_t(o.pack.capacity)));
      rows[r].shrink_to_fit();  // a read behind the end is seen
      tokens.push_back(rows[r].data());
      lengths.push_back(int32_t(rows[r].size()));
      entering.push_back(std::max(lengths.back() - 1, 1));
    }
    const std::optional<SharedLayout> layout = share_prefixes({tokens, entering}, lengths, o);
    if (!layout) continue;
    REQUIRE(layout->shared_tokens >= 0);
    std::vector<int32_t> items = layout->padded.items;
    REQUIRE(layout->padded.offsets.size() == size_t(layout->padded.n_mb) * o.pack.dp + 1);
    std::sort(items.begin(), items.end());
    for (size_t i = 0; i < rows.size(); ++i) REQUIRE(items[i] == int32_t(i));
    for (size_t b = 0; b + 1 < layout->padded.offsets.size(); ++b) {
      int64_t computed = layout->padded.prefix[b];
      for (int32_t i = layout->padded.offsets[b]; i < layout->padded.offsets[b + 1]; ++i)
        computed += entering[layout->padded.items[i]] - layout->item_shared[layout->padded.items[i]];
      REQUIRE(computed <= o.pack.capacity);
    }
  }
}
