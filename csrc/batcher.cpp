#include "batcher.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>

#include "check.hpp"
#include "content.hpp"

namespace mgrpo {

BatcherError::BatcherError(std::string kind_, std::string query_, int64_t rollout_, int64_t trajectory_,
                           const std::string& what)
    : std::runtime_error(concat("query ", query_, ", rollout ", rollout_, ", trajectory ", trajectory_, ": ", what)),
      kind(std::move(kind_)),
      query(std::move(query_)),
      rollout(rollout_),
      trajectory(trajectory_) {}

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The run of digits at `at`: leading zeros skipped, `at` moved behind it.
std::string_view digits(std::string_view s, size_t& at) {
  while (at < s.size() && s[at] == '0') ++at;
  const size_t begin = at;
  while (at < s.size() && is_digit(s[at])) ++at;
  return s.substr(begin, at - begin);
}

}  // namespace

Empty parse_empty(std::string_view name) {
  if (name == "mask") return Empty::mask;
  if (name == "count") return Empty::count;
  MGRPO_CHECK(name == "error", "empty '", name, "' is not one of mask, count, error");
  return Empty::error;
}

Overlong parse_overlong(std::string_view name) {
  if (name == "error") return Overlong::error;
  if (name == "truncate") return Overlong::truncate;
  MGRPO_CHECK(name == "drop", "overlong '", name, "' is not one of error, truncate, drop");
  return Overlong::drop;
}

bool natural_less(std::string_view a, std::string_view b) {
  size_t i = 0, j = 0;
  while (i < a.size() && j < b.size()) {
    if (is_digit(a[i]) && is_digit(b[j])) {
      const std::string_view x = digits(a, i), y = digits(b, j);
      if (x.size() != y.size()) return x.size() < y.size();
      if (const int order = x.compare(y)) return order < 0;
    } else if (a[i] != b[j]) {
      return static_cast<unsigned char>(a[i]) < static_cast<unsigned char>(b[j]);
    } else {
      ++i;
      ++j;
    }
  }
  if (i == a.size() && j == b.size()) return a < b;  // "01" and "1" are two names
  return i == a.size();
}

void validate(const BatcherOptions& o) {
  MGRPO_CHECK(o.k >= 1, "k=", o.k, " is below 1");
  MGRPO_CHECK(!o.roles.empty() && o.roles.size() == o.d_max.size(), "d_max names no role");
  for (size_t r = 0; r < o.roles.size(); ++r)
    MGRPO_CHECK(o.d_max[r] >= 1, "d_max of role '", o.roles[r], "' is ", o.d_max[r], ", below 1");
  MGRPO_CHECK(o.capacity >= 1 && o.capacity <= (int64_t{1} << 30), "capacity=", o.capacity, " is outside [1, 2^30]");
  MGRPO_CHECK(o.dp >= 1, "dp=", o.dp, " is below 1");
  MGRPO_CHECK(o.sequence_weight == SequenceWeight::per_rollout || o.mode == Mode::none,
              "sequence_weight='per_invocation' belongs to mode='none': aligned rollouts all weigh the same");
  MGRPO_CHECK(
      std::isfinite(o.cost_a) && std::isfinite(o.cost_b) && o.cost_a >= 0 && o.cost_b >= 0 && o.cost_a + o.cost_b > 0,
      "cost=(", o.cost_a, ", ", o.cost_b, ") needs finite parts >= 0, not both 0");
  MGRPO_CHECK(o.max_segments >= 0, "max_segments=", o.max_segments, " is below 1");
  MGRPO_CHECK(o.threads >= 1 && o.threads <= 256, "threads=", o.threads, " is outside [1, 256]");
  MGRPO_CHECK(o.vocab_size >= 0 && o.vocab_size <= (int64_t{1} << 31), "vocab_size=", o.vocab_size,
              " is outside [1, 2^31]");
}

namespace {
std::atomic<uint64_t> last_id{0};
}

Batcher::Batcher(BatcherOptions options) : options_(std::move(options)), id_(++last_id) {
  validate(options_);
  arena_ = std::make_unique<Arena>(options_.arena_bytes, options_.token_advantages);
}

int Batcher::role_index(std::string_view role) const {
  const auto& roles = options_.roles;
  const auto found = std::find(roles.begin(), roles.end(), role);
  MGRPO_CHECK(found != roles.end(), "unknown role '", role, "'; this batcher has ", roles.size(), " starting with '",
              roles.front(), "'");
  return int(found - roles.begin());
}

void Batcher::check_place(std::string_view query, int64_t rollout, int64_t invocation, int64_t id) const {
  if (rollout < 0 || rollout >= options_.k)
    reject("rollout", query, rollout, id, "rollout is outside [0, k=", options_.k, ")");
  if (invocation < 0 || invocation > (int64_t{1} << 30))
    reject("invocation", query, rollout, id, "invocation ", invocation, " is outside [0, 2^30]");
}

std::span<const Entry> Query::of(size_t cell) const {
  size_t begin = 0;
  for (size_t c = 0; c < cell; ++c) begin += size_t(cells[c].arrived);
  return {entries.data() + begin, size_t(cells[cell].arrived)};
}

const Query* Batcher::find(std::string_view query) const {
  const auto found = queries_.find(query);
  return found == queries_.end() ? nullptr : &found->second;
}

const Entry* Batcher::find_entry(const Query* query, size_t cell, int64_t invocation) const {
  if (!query) return nullptr;
  for (const Entry& entry : query->of(cell))
    if (entry.invocation == invocation) return &entry;
  return nullptr;
}

bool Batcher::same_content(const Entry& e, const TrajectoryView& t, std::span<const Segment> segments) const {
  if (e.id != t.id) return false;
  if (e.length == 0) return true;  // it left its group: there is nothing to compare with
  if (e.length != kept_tokens(segments) || e.policy_version != t.policy_version) return false;
  if (!options_.token_advantages && e.advantage != t.advantage) return false;
  const std::span<const Segment> mine = this->segments(e);
  const auto same_start = [](const Segment& x, const Segment& y) { return x.start == y.start; };
  if (segments.size() > 1 ? !std::ranges::equal(mine, segments, same_start) : !mine.empty()) return false;
  return holds_content(*arena_, e.handle, t, segments);
}

std::span<const Segment> Batcher::segments(const Entry& entry) const {
  const auto found = segments_.find(entry.handle);
  return found == segments_.end() ? std::span<const Segment>{} : found->second;
}

void Batcher::check_vacant(const Query* query, const TrajectoryView& t) const {
  const Cell cell = query ? query->cells[cell_index(t.role, t.rollout)] : Cell{};
  if (cell.sealed >= 0 && t.invocation >= cell.sealed)
    reject("sealed", t, "invocation ", t.invocation, " of a rollout that was sealed with ", cell.sealed,
           " invocations");
  if (ids_.contains(t.id)) reject("duplicate", t, "this id belongs to a trajectory at another place");
}

bool Batcher::add(const TrajectoryView& t, double now) {
  const auto lock = write_lock();
  check_place(t.query, t.rollout, t.invocation, t.id);
  if (t.id < 0) reject("id", t, "trajectory ids are >= 0 (-1 marks padding)");
  std::vector<Segment> segments = cut_segments(t, options_);
  const int64_t length = kept_tokens(segments);
  const bool overlong = length < t.n_tokens;

  const Query* known = find(t.query);
  if (const Entry* e = find_entry(known, cell_index(t.role, t.rollout), t.invocation)) {
    if (!same_content(*e, t, segments))
      reject("duplicate", t, "invocation ", t.invocation, " is already here as trajectory ", e->id,
             " with other content");
    ++counters_.redelivered;
    return false;
  }
  check_vacant(known, t);
  Entry entry{int32_t(t.invocation), 0, 0, t.policy_version, t.id, 0, false, -1};
  if (overlong && options_.overlong == Overlong::drop) {
    ++counters_.overlong;
  } else {
    check_content(t, options_, segments);
    entry.handle = arena_->allocate(length);
    if (entry.handle < 0)
      reject("arena_full", t, length, " tokens do not fit: ", arena_->used_tokens(), " of ", arena_->capacity_tokens(),
             " tokens of the arena are in use; plan or drop groups first");
    copy_content(*arena_, entry.handle, t, segments);
    entry.length = int32_t(length);
    for (const Segment& segment : segments) {
      entry.active += segment.active;
      entry.has_gradient |= segment.has_gradient;
    }
    entry.advantage = options_.token_advantages ? segments.front().advantage : t.advantage;
    if (segments.size() > 1) segments_.emplace(entry.handle, std::move(segments));
    counters_.truncated += overlong;
    ++counters_.accepted;
  }
  ids_.insert(t.id);
  insert(open(t.query, now), t.role, t.rollout, entry);
  return true;
}

Batcher::Queries::iterator Batcher::open(std::string_view query, double now) {
  auto found = queries_.find(query);
  if (found == queries_.end()) {
    found = queries_.emplace(std::string(query), Query{}).first;
    found->second.opened = now;
    found->second.cells.resize(options_.roles.size() * size_t(options_.k));
  }
  return found;
}

void Batcher::insert(Queries::iterator query, int role, int64_t rollout, const Entry& entry) {
  Query& q = query->second;
  const size_t c = cell_index(role, rollout);
  const std::span<const Entry> mine = q.of(c);
  const auto place = std::lower_bound(mine.begin(), mine.end(), entry.invocation,
                                      [](const Entry& e, int32_t invocation) { return e.invocation < invocation; });
  q.entries.insert(q.entries.begin() + (mine.data() - q.entries.data()) + (place - mine.begin()), entry);
  ++q.cells[c].arrived;
  count_complete(q, q.cells[c]);
}

void Batcher::count_complete(Query& query, const Cell& cell) {
  if (!cell.complete()) return;
  ++query.complete_cells;
  if (!query.ready()) return;
  ++n_ready_;
  changed_.notify_all();
}

void Batcher::seal(std::string_view query, int role, int64_t rollout, int64_t d, double now) {
  const auto lock = write_lock();
  check_place(query, rollout, 0, -1);
  if (d < 0 || d > (int64_t{1} << 30)) reject("sealed", query, rollout, -1, "d=", d, " is outside [0, 2^30]");
  if (d == 0 && options_.empty == Empty::error)
    reject("empty_rollout", query, rollout, -1, "sealed with no invocation, and empty='error'");
  const size_t c = cell_index(role, rollout);
  if (const Query* known = find(query)) {
    const Cell& cell = known->cells[c];
    if (cell.sealed >= 0) {
      if (cell.sealed != d) reject("sealed", query, rollout, -1, "sealed with ", cell.sealed, ", then with ", d);
      return;
    }
    if (cell.arrived > 0 && known->of(c).back().invocation >= d)
      reject("sealed", query, rollout, known->of(c).back().id, "invocation ", known->of(c).back().invocation,
             " is already here, the rollout cannot be sealed with ", d, " invocations");
  }
  Query& q = open(query, now)->second;
  q.cells[c].sealed = int32_t(d);
  count_complete(q, q.cells[c]);
}

void Batcher::fail(std::string_view query, int role, int64_t rollout, int64_t invocation, double now) {
  const auto lock = write_lock();
  check_place(query, rollout, invocation, -1);
  TrajectoryView t;
  t.query = query;
  t.role = role;
  t.rollout = rollout;
  t.invocation = invocation;
  t.id = -1;
  const Query* known = find(query);
  if (const Entry* e = find_entry(known, cell_index(role, rollout), invocation)) {
    if (e->length == 0) return;
    reject("duplicate", query, rollout, e->id, "invocation ", invocation, " is already here and did not fail");
  }
  check_vacant(known, t);
  insert(open(query, now), role, rollout, Entry{int32_t(invocation), 0, 0, -1, -1, 0, false, -1});
  ++counters_.failed;
}

std::vector<std::string> Batcher::ready() const {
  const auto lock = read_lock();
  std::vector<std::string> names;
  for (const auto& [name, query] : queries_)
    if (query.ready()) names.push_back(name);
  std::sort(names.begin(), names.end(), natural_less);
  return names;
}

std::vector<std::string> Batcher::names() const {
  std::vector<std::string> names;
  for (const auto& [name, query] : queries_) names.push_back(name);
  std::sort(names.begin(), names.end(), natural_less);
  return names;
}

bool Batcher::wait_ready(int64_t n, const std::vector<std::string>& queries, double seconds) const {
  auto lock = read_lock();
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] {
    if (queries.empty()) return n_ready_ >= n;
    return std::all_of(queries.begin(), queries.end(), [&](const std::string& name) {
      const auto found = queries_.find(name);
      return found != queries_.end() && found->second.ready();
    });
  });
}

void Batcher::forget(Queries::iterator query) {
  n_ready_ -= query->second.ready();
  for (const Entry& entry : query->second.entries) {
    if (entry.handle >= 0) {
      arena_->release(entry.handle);
      segments_.erase(entry.handle);
    }
    ids_.erase(entry.id);
  }
  queries_.erase(query);
}

bool Batcher::drop(std::string_view query) {
  const auto lock = write_lock();
  const auto found = queries_.find(query);
  if (found == queries_.end()) return false;
  forget(found);
  return true;
}

std::vector<std::string> Batcher::expire(double max_age, double now) {
  const auto lock = write_lock();
  std::vector<std::string> names;
  for (auto at = queries_.begin(); at != queries_.end();) {
    const auto here = at++;
    if (here->second.ready() || now - here->second.opened <= max_age) continue;
    names.push_back(here->first);
    forget(here);
    ++counters_.expired;
  }
  std::sort(names.begin(), names.end(), natural_less);
  return names;
}

Counters Batcher::counters() const {
  const auto lock = read_lock();
  return counters_;
}

int64_t Batcher::n_queries() const {
  const auto lock = read_lock();
  return int64_t(queries_.size());
}

int64_t Batcher::used_bytes() const {
  const auto lock = read_lock();
  return arena_->used_tokens() * arena_->bytes_per_token();
}

void Batcher::restore_opened(std::string_view query, double opened) {
  const auto lock = write_lock();
  open(query, opened)->second.opened = opened;
}

void Batcher::restore_absent(const TrajectoryView& t, double now) {
  const auto lock = write_lock();
  check_place(t.query, t.rollout, t.invocation, t.id);
  if (t.id >= 0) ids_.insert(t.id);
  insert(open(t.query, now), t.role, t.rollout,
         Entry{int32_t(t.invocation), 0, 0, t.policy_version, t.id, 0, false, -1});
}

void Batcher::restore_counters(const Counters& counters) {
  const auto lock = write_lock();
  counters_ = counters;
}

}  // namespace mgrpo
