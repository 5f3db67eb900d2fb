// One trajectory's tokens on their way into the arena: its segments, what is kept of each, and whether it can be trained
// on. Whatever does not fit is refused by name before anything is stored.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "batcher.hpp"
#include "check.hpp"

namespace mgrpo {

template <typename... Parts>
[[noreturn]] void reject(const char* kind, std::string_view query, int64_t rollout, int64_t id, const Parts&... parts) {
  throw BatcherError(kind, std::string(query), rollout, id, concat(parts...));
}

template <typename... Parts>
[[noreturn]] void reject(const char* kind, const TrajectoryView& t, const Parts&... parts) {
  reject(kind, t.query, t.rollout, t.id, parts...);
}

// The segments of a trajectory, each cut at the capacity where that is the policy, before `active` and what follows from
// it are known. Rejects columns and starts that do not fit together, and under Overlong::error a segment that is too long.
std::vector<Segment> cut_segments(const TrajectoryView& t, const BatcherOptions& options);

// Tokens kept of all segments.
int64_t kept_tokens(std::span<const Segment> segments);

// Rejects what cannot be trained on; fills active, advantage and has_gradient. A segment may have no trainable token, but
// not all of them.
void check_content(const TrajectoryView& t, const BatcherOptions& options, std::span<Segment> segments);

// The kept tokens into a block of the arena, and whether a block holds them.
void copy_content(const Arena& arena, int32_t handle, const TrajectoryView& t, std::span<const Segment> segments);
bool holds_content(const Arena& arena, int32_t handle, const TrajectoryView& t, std::span<const Segment> segments);

}  // namespace mgrpo
