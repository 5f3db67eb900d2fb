#include "content.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace mgrpo {

namespace {

// The scans of one trajectory. Plain accumulations without branches, so that they run in SIMD registers.
bool any_outside(const int32_t* tokens, int64_t n, uint32_t limit) {
  uint32_t outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= uint32_t(uint32_t(tokens[i]) >= limit);
  return outside;
}

bool any_infinite(const float* values, int64_t n) {
  uint32_t infinite = 0;  // on the bits: IEEE comparisons would not
  for (int64_t i = 0; i < n; ++i) infinite |= uint32_t((std::bit_cast<int32_t>(values[i]) & 0x7fffffff) >= 0x7f800000);
  return infinite;
}

// Sum of 0/1 bytes, or -1 when there is another value. Eight bytes at a time: their sum is the top byte of x * 0x01..01.
int64_t count_ones(const uint8_t* mask, int64_t n) {
  constexpr uint64_t ones = 0x0101010101010101ull;
  uint64_t seen = 0;
  int64_t sum = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, mask + i, 8);
    seen |= word;
    sum += int64_t((word * ones) >> 56);
  }
  for (; i < n; ++i) {
    seen |= mask[i];
    sum += mask[i];
  }
  return seen & ~ones ? -1 : sum;
}

void check_finite(const char* kind, const char* what, const TrajectoryView& t, const float* values, const Segment& s) {
  const float* first = values + s.from;
  if (!any_infinite(first, s.length)) return;
  const float* wrong = std::find_if_not(first, first + s.length, [](float x) { return std::isfinite(x); });
  reject(kind, t, what, " ", *wrong, " at ", wrong - values, " is not finite");
}

// A segment's advantage as one number, and whether it moves the policy at all.
void summarise_advantage(const TrajectoryView& t, Segment& segment) {
  if (!t.token_advantages) {
    segment.advantage = t.advantage;
    segment.has_gradient = t.advantage != 0 && segment.active > 0;
    return;
  }
  double sum = 0;
  for (int64_t i = segment.from; i < segment.from + segment.length; ++i) {
    if (!t.mask[i]) continue;
    sum += t.token_advantages[i];
    segment.has_gradient |= t.token_advantages[i] != 0;
  }
  segment.advantage = segment.active ? float(sum / segment.active) : 0.0f;
}

// Calls use(where the column lies in the block, where in the trajectory, bytes) for every column of every segment, until
// one returns false.
template <typename Use>
bool each_column(const Arena& arena, int32_t handle, const TrajectoryView& t, std::span<const Segment> segments,
                 const Use& use) {
  for (const Segment& s : segments) {
    const auto n = size_t(s.length);
    if (!use(arena.ids(handle) + s.start, t.tokens + s.from, n * sizeof(int32_t))) return false;
    if (!use(arena.logprobs(handle) + s.start, t.logprobs + s.from, n * sizeof(float))) return false;
    if (!use(arena.masks(handle) + s.start, t.mask + s.from, n)) return false;
    if (t.token_advantages && !use(arena.advantages(handle) + s.start, t.token_advantages + s.from, n * sizeof(float)))
      return false;
  }
  return true;
}

}  // namespace

std::vector<Segment> cut_segments(const TrajectoryView& t, const BatcherOptions& o) {
  if (t.n_tokens == 0) reject("empty", t, "the trajectory is empty");
  if (t.n_mask != t.n_tokens || t.n_logprobs != t.n_tokens)
    reject("length", t, t.n_tokens, " tokens, ", t.n_mask, " mask values, ", t.n_logprobs, " log-probs");
  if (o.token_advantages && t.n_token_advantages != t.n_tokens)
    reject("length", t, t.n_tokens, " tokens, ", t.n_token_advantages, " advantages");
  const size_t count = std::max<size_t>(1, t.segment_starts.size());
  std::vector<Segment> segments(count);
  int64_t kept = 0, end = t.n_tokens;
  for (size_t s = 0; s < count; ++s) {
    const int64_t from = t.segment_starts.empty() ? 0 : t.segment_starts[s];
    if (s == 0 && from != 0) reject("segments", t, "the first segment starts at ", from, ", expected 0");
    end = s + 1 < count ? t.segment_starts[s + 1] : t.n_tokens;
    if (end <= from || end > t.n_tokens)
      reject("segments", t, "segment start ", s + 1 < count ? end : from, " is out of order or outside ", t.n_tokens,
             " tokens");
    const int64_t length = std::min(end - from, o.capacity);
    if (length < end - from && o.overlong == Overlong::error)
      reject("too_long", t, end - from, " tokens", count > 1 ? concat(" of the segment at ", from) : "",
             " are over the capacity of ", o.capacity);
    segments[s].from = from;
    segments[s].start = int32_t(kept);
    segments[s].length = int32_t(length);
    kept += length;
  }
  if (kept > (int64_t{1} << 30)) reject("too_long", t, kept, " tokens of ", count, " segments are over 2^30");
  return segments;
}

int64_t kept_tokens(std::span<const Segment> segments) {
  return int64_t{segments.back().start} + segments.back().length;
}

void check_content(const TrajectoryView& t, const BatcherOptions& o, std::span<Segment> segments) {
  const uint32_t limit = o.vocab_size ? uint32_t(o.vocab_size) : uint32_t{1} << 31;
  int64_t total = 0;
  for (Segment& s : segments) {
    const int32_t* first = t.tokens + s.from;
    if (any_outside(first, s.length, limit)) {
      const int32_t* wrong = std::find_if(first, first + s.length, [&](int32_t id) { return uint32_t(id) >= limit; });
      reject("token_id", t, "token id ", *wrong, " at ", wrong - t.tokens, " is outside [0, ", limit, ")");
    }
    const int64_t active = count_ones(t.mask + s.from, s.length);
    if (active < 0) reject("loss_mask", t, "loss_mask has values other than 0 and 1");
    s.active = int32_t(active);
    total += active;
  }
  if (total == 0) reject("no_trainable", t, "no trainable token among ", kept_tokens(segments));
  for (const Segment& s : segments) check_finite("logprobs", "log-prob", t, t.logprobs, s);
  if (!o.token_advantages && !std::isfinite(t.advantage))
    reject("advantage", t, "advantage ", t.advantage, " is not finite");
  for (Segment& s : segments) {
    if (o.token_advantages) check_finite("advantage", "advantage", t, t.token_advantages, s);
    summarise_advantage(t, s);
  }
}

void copy_content(const Arena& arena, int32_t handle, const TrajectoryView& t, std::span<const Segment> segments) {
  each_column(arena, handle, t, segments, [](void* block, const void* from, size_t bytes) {
    std::memcpy(block, from, bytes);
    return true;
  });
}

bool holds_content(const Arena& arena, int32_t handle, const TrajectoryView& t, std::span<const Segment> segments) {
  return each_column(arena, handle, t, segments, [](const void* block, const void* from, size_t bytes) {
    return std::memcmp(block, from, bytes) == 0;
  });
}

}  // namespace mgrpo
