// Rollout groups as they arrive: what is known of each (query, role, rollout), when a query is complete, and the token
// data of its trajectories in the arena. Thread-safe; every rejected call leaves the state as it was.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "arena.hpp"
#include "draw.hpp"

namespace mgrpo {

// Bad input that belongs to one trajectory. `kind` is the machine-readable reason, e.g. "too_long".
struct BatcherError : std::runtime_error {
  BatcherError(std::string kind, std::string query, int64_t rollout, int64_t trajectory, const std::string& what);
  std::string kind, query;
  int64_t rollout, trajectory;
};

enum class Empty { mask, count, error };
enum class Overlong { error, truncate, drop };

Empty parse_empty(std::string_view name);
Overlong parse_overlong(std::string_view name);

struct BatcherOptions {
  int k = 0;
  std::vector<std::string> roles;
  std::vector<int> d_max;  // one a role
  int64_t capacity = 0;
  int dp = 1;
  Mode mode = Mode::weights;
  SequenceWeight sequence_weight = SequenceWeight::per_rollout;
  Empty empty = Empty::mask;
  Overlong overlong = Overlong::error;
  bool token_advantages = false;  // an advantage of each token instead of one a trajectory
  double cost_a = 1, cost_b = 0;
  int max_segments = 0;
  uint64_t seed = 0;
  int threads = 2;
  int64_t arena_bytes = 0;
  int64_t vocab_size = 0;  // 0 = any id >= 0
  int32_t pad_id = 0;
};

// Throws std::invalid_argument naming the first bad option.
void validate(const BatcherOptions& options);

// One trajectory on its way in; the arrays are borrowed for the call.
struct TrajectoryView {
  std::string_view query;
  int role = 0;
  int64_t rollout = 0, invocation = 0, id = 0;
  const int32_t* tokens = nullptr;
  const uint8_t* mask = nullptr;
  const float* logprobs = nullptr;
  int64_t n_tokens = 0, n_mask = 0, n_logprobs = 0;
  float advantage = 0;                      // of the trajectory, or
  const float* token_advantages = nullptr;  // of each token
  int64_t n_token_advantages = 0;
  int32_t policy_version = 0;
  std::span<const int64_t> segment_starts;  // offsets, the first 0; none: it is one sequence
};

// One sequence of a trajectory, which has one or several: each is trained as a row of its own.
struct Segment {
  int64_t from = 0;   // its first token in the trajectory as it came
  int32_t start = 0;  // the same in the arena's block, which holds what was kept of all segments
  int32_t length = 0, active = 0;
  float advantage = 0;
  bool has_gradient = false;
};

struct Entry {
  int32_t invocation;
  int32_t length;  // tokens kept, of all segments; 0 = the trajectory left its group (failed, or too long under `drop`)
  int32_t active;  // tokens with loss_mask 1
  int32_t policy_version;
  int64_t id;
  float advantage;    // the trajectory's, or the mean over its trainable tokens
  bool has_gradient;  // some trainable token has an advantage other than 0
  int32_t handle;     // -1 when length is 0
};

// One (role, rollout) of a query.
struct Cell {
  int32_t sealed = -1;
  int32_t arrived = 0;  // entries, those that left their group included
  bool complete() const { return arrived == sealed; }
};

struct Query {
  double opened = 0;
  int32_t complete_cells = 0;
  std::vector<Cell> cells;     // role * k + rollout
  std::vector<Entry> entries;  // by cell, then by invocation: the canonical order, and one walk through memory

  bool ready() const { return complete_cells == int32_t(cells.size()); }
  // The entries of one cell.
  std::span<const Entry> of(size_t cell) const;
};

// The canonical order of queries. "12/3" < "12/10": runs of digits compare as numbers, everything else as bytes.
bool natural_less(std::string_view a, std::string_view b);

struct NameHash {
  using is_transparent = void;
  size_t operator()(std::string_view name) const { return std::hash<std::string_view>{}(name); }
};

struct Counters {
  int64_t accepted = 0, redelivered = 0, overlong = 0, truncated = 0, failed = 0, expired = 0;
};

class Batcher {
 public:
  using Queries = std::unordered_map<std::string, Query, NameHash, std::equal_to<>>;

  explicit Batcher(BatcherOptions options);

  const BatcherOptions& options() const { return options_; }
  // Unique in this process, also among batchers that are gone: says whose handles a plan holds.
  uint64_t id() const { return id_; }
  int role_index(std::string_view role) const;

  // False when the same trajectory with the same content was already here.
  bool add(const TrajectoryView& trajectory, double now);
  // Rollout `rollout` has exactly d invocations of this role (0 is legal).
  void seal(std::string_view query, int role, int64_t rollout, int64_t d, double now);
  // This invocation will never come: an infrastructure failure, which leaves the group instead of scoring 0.
  void fail(std::string_view query, int role, int64_t rollout, int64_t invocation, double now);
  std::vector<std::string> ready() const;
  // Waits until all of `queries` are ready or, when none are named, until at least `n` queries are. False after
  // `seconds`.
  bool wait_ready(int64_t n, const std::vector<std::string>& queries, double seconds) const;
  // Frees a query; false when it is unknown.
  bool drop(std::string_view query);
  // Frees the incomplete queries opened more than max_age seconds before `now`; returns their names.
  std::vector<std::string> expire(double max_age, double now);

  Counters counters() const;
  int64_t n_queries() const;
  int64_t used_bytes() const;

  // For plans, assembly and state: hold the lock while reading.
  std::shared_lock<std::shared_mutex> read_lock() const { return std::shared_lock(mutex_); }
  std::unique_lock<std::shared_mutex> write_lock() const { return std::unique_lock(mutex_); }
  const Queries& queries() const { return queries_; }
  std::vector<std::string> names() const;
  const Arena& arena() const { return *arena_; }
  // The segments of a trajectory that has several; none: it is one sequence.
  std::span<const Segment> segments(const Entry& entry) const;
  const Counters& counters_unlocked() const { return counters_; }
  void restore_opened(std::string_view query, double opened);
  void restore_absent(const TrajectoryView& trajectory, double now);
  void restore_counters(const Counters& counters);

 private:
  Queries::iterator open(std::string_view query, double now);
  void forget(Queries::iterator query);
  void count_complete(Query& query, const Cell& cell);
  void insert(Queries::iterator query, int role, int64_t rollout, const Entry& entry);
  void check_place(std::string_view query, int64_t rollout, int64_t invocation, int64_t id) const;
  size_t cell_index(int role, int64_t rollout) const { return size_t(role) * size_t(options_.k) + size_t(rollout); }
  const Query* find(std::string_view query) const;
  const Entry* find_entry(const Query* query, size_t cell, int64_t invocation) const;
  void check_vacant(const Query* query, const TrajectoryView& t) const;
  bool same_content(const Entry& entry, const TrajectoryView& t, std::span<const Segment> segments) const;

  BatcherOptions options_;
  uint64_t id_;
  mutable std::shared_mutex mutex_;
  mutable std::condition_variable_any changed_;
  int64_t n_ready_ = 0;
  std::unique_ptr<Arena> arena_;
  Queries queries_;
  std::unordered_map<int32_t, std::vector<Segment>> segments_;  // by handle, of trajectories with several
  std::unordered_set<int64_t> ids_;
  Counters counters_;
};

}  // namespace mgrpo
