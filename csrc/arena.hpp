// Columnar storage of token data: three columns (ids i32, log-probs f32, masks u8) under one allocator, all reserved
// at construction. Blocks are multiples of 16 tokens, so every trajectory starts on a 64-byte boundary of the wide
// columns. Freed blocks merge; when free space is too scattered, live blocks slide down. It never grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace mgrpo {

inline constexpr int64_t kBytesPerToken = 9;

class Arena {
 public:
  explicit Arena(int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A handle to room for n >= 1 tokens, or -1 when the arena is full. May move other blocks: pointers die here.
  int32_t allocate(int64_t n);
  void release(int32_t handle);

  int32_t* ids(int32_t handle) const { return ids_ + blocks_[handle].offset; }
  float* logprobs(int32_t handle) const { return logprobs_ + blocks_[handle].offset; }
  uint8_t* masks(int32_t handle) const { return masks_ + blocks_[handle].offset; }
  // Tells a reused handle from the one that was given out.
  uint32_t generation(int32_t handle) const { return blocks_[handle].generation; }

  int64_t used_tokens() const { return used_; }
  int64_t capacity_tokens() const { return capacity_; }

 private:
  struct Block {
    int64_t offset = 0;
    int64_t size = 0;  // 0 = free handle
    uint32_t generation = 0;
  };
  void give(int64_t offset, int64_t size);
  void take(std::map<int64_t, int64_t>::iterator hole);
  void compact();

  int64_t capacity_, used_ = 0;
  void* memory_ = nullptr;
  size_t mapped_ = 0;
  int32_t* ids_ = nullptr;
  float* logprobs_ = nullptr;
  uint8_t* masks_ = nullptr;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_handles_;
  std::map<int64_t, int64_t> holes_;               // offset -> size
  std::set<std::pair<int64_t, int64_t>> by_size_;  // (size, offset)
};

}  // namespace mgrpo
