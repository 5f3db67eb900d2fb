#include "arena.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "check.hpp"

namespace mgrpo {

namespace {
constexpr int64_t kGrain = 16;  // tokens
}

Arena::Arena(int64_t bytes, bool advantages)
    : bytes_per_token_(advantages ? 13 : 9), capacity_(bytes / bytes_per_token_ / kGrain * kGrain) {
  MGRPO_CHECK(capacity_ >= kGrain, "arena_bytes=", bytes, " is below one block of ", kGrain * bytes_per_token_,
              " bytes");
  mapped_ = size_t(capacity_ * bytes_per_token_);
  // Anonymous pages cost nothing until they are written, so a generous bound is only a bound.
  void* mapped = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(mapped);
#ifdef MADV_HUGEPAGE
  madvise(memory_, mapped_, MADV_HUGEPAGE);  // a wish: fewer page faults while filling, fewer TLB misses while copying
#endif
  give(0, capacity_);
}

Arena::~Arena() { munmap(memory_, mapped_); }

void Arena::give(int64_t offset, int64_t size) {
  auto next = holes_.lower_bound(offset);
  if (next != holes_.end() && next->first == offset + size) {
    size += next->second;
    auto after = std::next(next);
    take(next);
    next = after;
  }
  if (next != holes_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      size += before->second;
      take(before);
    }
  }
  holes_.emplace(offset, size);
  by_size_.emplace(size, offset);
}

void Arena::take(std::map<int64_t, int64_t>::iterator hole) {
  by_size_.erase({hole->second, hole->first});
  holes_.erase(hole);
}

int32_t Arena::allocate(int64_t n) {
  const int64_t size = (n + kGrain - 1) / kGrain * kGrain;
  if (size > capacity_ - used_) return -1;
  auto fit = by_size_.lower_bound({size, 0});
  if (fit == by_size_.end()) {
    compact();
    fit = by_size_.lower_bound({size, 0});
  }
  const auto [hole_size, offset] = *fit;
  take(holes_.find(offset));
  if (hole_size > size) give(offset + size, hole_size - size);
  used_ += size;
  int32_t handle;
  if (free_handles_.empty()) {
    handle = int32_t(blocks_.size());
    blocks_.emplace_back();
  } else {
    handle = free_handles_.back();
    free_handles_.pop_back();
  }
  blocks_[handle].offset = offset;
  blocks_[handle].size = size;
  return handle;
}

void Arena::release(int32_t handle) {
  Block& block = blocks_[handle];
  give(block.offset, block.size);
  used_ -= block.size;
  block.size = 0;
  ++block.generation;
  free_handles_.push_back(handle);
}

void Arena::compact() {
  std::vector<int32_t> live;
  for (int32_t handle = 0; handle < int32_t(blocks_.size()); ++handle)
    if (blocks_[handle].size) live.push_back(handle);
  std::sort(live.begin(), live.end(), [&](int32_t a, int32_t b) { return blocks_[a].offset < blocks_[b].offset; });
  int64_t top = 0;
  for (const int32_t handle : live) {
    Block& block = blocks_[handle];
    if (block.offset != top) {
      std::memmove(memory_ + top * bytes_per_token_, memory_ + block.offset * bytes_per_token_,
                   size_t(block.size * bytes_per_token_));
      block.offset = top;
    }
    top += block.size;
  }
  holes_.clear();
  by_size_.clear();
  if (top < capacity_) give(top, capacity_ - top);
}

}  // namespace mgrpo
