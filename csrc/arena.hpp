// Storage of token data, all reserved at construction: a block a trajectory, which holds its columns one after the other
// (ids i32, log-probs f32, where wanted advantages f32, masks u8), so that a processor that reads ahead of the one reads
// what comes next of the other: copying trajectories in any order is a quarter faster than out of long columns. Blocks are
// multiples of 16 tokens, so every column is aligned to 16 bytes. Freed blocks merge; when free space is too scattered,
// live blocks slide down. It never grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace mgrpo {

class Arena {
 public:
  // advantages: every token has an advantage of its own.
  explicit Arena(int64_t bytes, bool advantages = false);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A handle to room for n >= 1 tokens, or -1 when the arena is full. May move other blocks: pointers die here.
  int32_t allocate(int64_t n);
  void release(int32_t handle);

  int32_t* ids(int32_t handle) const { return reinterpret_cast<int32_t*>(column(handle, 0)); }
  float* logprobs(int32_t handle) const { return reinterpret_cast<float*>(column(handle, sizeof(int32_t))); }
  float* advantages(int32_t handle) const {
    return reinterpret_cast<float*>(column(handle, sizeof(int32_t) + sizeof(float)));
  }
  uint8_t* masks(int32_t handle) const { return column(handle, size_t(bytes_per_token_) - sizeof(uint8_t)); }
  // Tells a reused handle from the one that was given out.
  uint32_t generation(int32_t handle) const { return blocks_[handle].generation; }
  // Whether `handle` still names the block that it named when its generation was read; false for any other number.
  bool holds(int32_t handle, uint32_t generation) const {
    return handle >= 0 && size_t(handle) < blocks_.size() && blocks_[handle].size > 0 &&
           blocks_[handle].generation == generation;
  }

  int64_t used_tokens() const { return used_; }
  int64_t capacity_tokens() const { return capacity_; }
  int64_t bytes_per_token() const { return bytes_per_token_; }

 private:
  struct Block {
    int64_t offset = 0;  // tokens, as everything here that is not called bytes
    int64_t size = 0;    // 0 = free handle
    uint32_t generation = 0;
  };
  // before: bytes a token of the columns in front of it.
  uint8_t* column(int32_t handle, size_t before) const {
    const Block& block = blocks_[handle];
    return memory_ + block.offset * bytes_per_token_ + block.size * int64_t(before);
  }
  void give(int64_t offset, int64_t size);
  void take(std::map<int64_t, int64_t>::iterator hole);
  void compact();

  int64_t bytes_per_token_, capacity_, used_ = 0;
  uint8_t* memory_ = nullptr;
  size_t mapped_ = 0;  // bytes
  std::vector<Block> blocks_;
  std::vector<int32_t> free_handles_;
  std::map<int64_t, int64_t> holes_;               // offset -> size
  std::set<std::pair<int64_t, int64_t>> by_size_;  // (size, offset)
};

}  // namespace mgrpo
