// The set of occupied values in [0, n): insert, erase and "smallest member >= x" in one word operation a level.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace mgrpo {

class BitsetTree {
 public:
  explicit BitsetTree(int64_t n) {
    do {
      n = (n + 63) / 64;
      levels_.emplace_back(size_t(n), 0);
    } while (n > 1);
  }

  void insert(int64_t x) {
    for (auto& level : levels_) {
      level[x >> 6] |= uint64_t{1} << (x & 63);
      x >>= 6;
    }
  }

  void erase(int64_t x) {
    for (auto& level : levels_) {
      level[x >> 6] &= ~(uint64_t{1} << (x & 63));
      if (level[x >> 6]) return;
      x >>= 6;
    }
  }

  // -1 when there is none.
  int64_t next(int64_t x) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      const int64_t word = x >> 6;
      if (word >= int64_t(levels_[height].size())) return -1;
      const uint64_t rest = levels_[height][word] >> (x & 63);
      if (rest) {
        int64_t found = x + std::countr_zero(rest);
        while (height > 0) {
          --height;
          found = found * 64 + std::countr_zero(levels_[height][found]);
        }
        return found;
      }
      x = word + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

}  // namespace mgrpo
