#include "plan.hpp"

#include <algorithm>
#include <numeric>

#include "check.hpp"
#include "shared_layout.hpp"

namespace mgrpo {

namespace {

struct Scratch {
  std::vector<const Entry*> present;
  std::vector<int32_t> copies;
};

// The rows of one trajectory: `whole`, or one a segment with a trainable token, among which its weight is divided.
void add_rows(Plan& plan, PlanRow whole, std::span<const Segment> segments) {
  if (segments.empty()) {
    plan.rows.push_back(whole);
    return;
  }
  whole.weight /=
      double(std::count_if(segments.begin(), segments.end(), [](const Segment& s) { return s.active > 0; }));
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    if (s.active == 0) continue;
    PlanRow row = whole;
    row.segment = int32_t(i);
    row.start = s.start;
    row.length = s.length;
    row.active = s.active;
    row.advantage = s.advantage;
    row.has_gradient = s.has_gradient;
    plan.rows.push_back(row);
  }
}

void add_rollout(Plan& plan, const Batcher& batcher, std::span<const Entry> entries, int d_max, int rollout,
                 DrawStream stream, Scratch& scratch) {
  const BatcherOptions& o = batcher.options();
  scratch.present.clear();
  for (const Entry& entry : entries)
    if (entry.length > 0) scratch.present.push_back(&entry);
  const int d = int(scratch.present.size());
  if (d == 0) return;
  multiplicities(stream, d, d_max, o.mode, scratch.copies);
  const int32_t group = int32_t(plan.group_query.size() - 1);
  int32_t* slot = &plan.slots[(size_t(group) * plan.k + rollout) * plan.depth];
  for (int i = 0; i < d; ++i) {
    const int32_t m = scratch.copies[i];
    if (m == 0) continue;
    const Entry& entry = *scratch.present[i];
    slot = std::fill_n(slot, m, int32_t(plan.rows.size()));
    add_rows(plan,
             {.group = group,
              .rollout = rollout,
              .invocation = entry.invocation,
              .multiplicity = m,
              .length = entry.length,
              .active = entry.active,
              .policy_version = entry.policy_version,
              .handle = entry.handle,
              .generation = batcher.arena().generation(entry.handle),
              .advantage = entry.advantage,
              .has_gradient = entry.has_gradient,
              .weight = invocation_weight(m, d, d_max, o.mode, o.sequence_weight),
              .id = entry.id},
             batcher.segments(entry));
  }
  ++plan.group_rollouts.back();
}

int slot_depth(const Batcher& batcher, const std::vector<const Query*>& queries) {
  const BatcherOptions& o = batcher.options();
  if (o.mode != Mode::none) return *std::max_element(o.d_max.begin(), o.d_max.end());
  size_t depth = 1;
  for (const Query* query : queries)
    for (const Cell& cell : query->cells) depth = std::max(depth, size_t(cell.arrived));
  return int(depth);
}

// The layout of rows that share prefixes, if there are any.
std::optional<SharedLayout> shared_layout(const Batcher& batcher, const Plan& plan, const PlanOptions& options) {
  const BatcherOptions& o = batcher.options();
  std::vector<const int32_t*> tokens;
  std::vector<int32_t> entering, lengths;
  for (const int32_t r : plan.item_row) {
    const PlanRow& row = plan.rows[r];
    tokens.push_back(batcher.arena().ids(row.handle) + row.start);
    entering.push_back(std::max(row.length - 1, 1));
    lengths.push_back(row.length);
  }
  return share_prefixes(
      {tokens, entering}, lengths,
      {{o.capacity, o.dp, o.cost_a, o.cost_b, o.max_segments}, options.min_saved, options.hold_prefixes});
}

}  // namespace

Plan make_plan(const Batcher& batcher, uint64_t step, std::vector<std::string> names, const PlanOptions& options) {
  const auto lock = batcher.read_lock();
  const BatcherOptions& o = batcher.options();
  Plan plan;
  plan.owner = batcher.id();
  plan.step = step;
  plan.dp = o.dp;
  plan.k = o.k;
  plan.capacity = o.capacity;
  plan.pad_id = o.pad_id;
  plan.threads = o.threads;
  plan.token_advantages = o.token_advantages;
  plan.queries = std::move(names);
  if (!std::is_sorted(plan.queries.begin(), plan.queries.end(), natural_less))
    std::sort(plan.queries.begin(), plan.queries.end(), natural_less);
  std::vector<const Query*> queries;
  queries.reserve(plan.queries.size());
  for (size_t q = 0; q < plan.queries.size(); ++q) {
    MGRPO_CHECK(q == 0 || plan.queries[q] != plan.queries[q - 1], "query ", plan.queries[q], " is asked for twice");
    const auto found = batcher.queries().find(plan.queries[q]);
    MGRPO_CHECK(found != batcher.queries().end(), "query ", plan.queries[q], " is not in the batcher");
    MGRPO_CHECK(found->second.ready(), "query ", plan.queries[q], " is not ready: ", found->second.complete_cells,
                " of ", found->second.cells.size(), " rollouts are complete");
    queries.push_back(&found->second);
  }
  plan.depth = slot_depth(batcher, queries);
  plan.slots.assign(queries.size() * o.roles.size() * size_t(o.k) * plan.depth, -1);
  plan.rows.reserve(queries.size() * o.roles.size() * size_t(o.k));
  Scratch scratch;
  for (size_t q = 0; q < queries.size(); ++q) {
    const Entry* next = queries[q]->entries.data();
    for (size_t r = 0; r < o.roles.size(); ++r) {
      plan.group_query.push_back(int32_t(q));
      plan.group_role.push_back(int32_t(r));
      plan.group_rollouts.push_back(0);
      const PhiloxKey key = draw_key(o.seed, plan.queries[q], o.roles[r]);
      for (int rollout = 0; rollout < o.k; ++rollout) {
        const auto n = size_t(queries[q]->cells[r * size_t(o.k) + size_t(rollout)].arrived);
        add_rollout(plan, batcher, {next, n}, o.d_max[r], rollout, {key, step, uint32_t(rollout)}, scratch);
        next += n;
      }
    }
  }

  std::vector<int32_t> lengths;
  lengths.reserve(plan.rows.size());
  plan.item_row.reserve(plan.rows.size());
  plan.item_weight.reserve(plan.rows.size());
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    const PlanRow& row = plan.rows[i];
    if (options.skip_zero && !row.has_gradient) continue;
    const int copies = o.mode == Mode::duplicate ? row.multiplicity : 1;
    for (int c = 0; c < copies; ++c) {
      plan.item_row.push_back(int32_t(i));
      plan.item_weight.push_back(float(row.weight / copies));
      lengths.push_back(row.length);
    }
  }
  plan.tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  plan.packing = pack(lengths, {o.capacity, o.dp, o.cost_a, o.cost_b, o.max_segments});
  plan.max_rows = o.max_segments;
  plan.max_segments = std::max(1, o.max_segments);
  for (size_t b = 1; b < plan.packing.offsets.size() && o.max_segments == 0; ++b)
    plan.max_segments = std::max(plan.max_segments, plan.packing.offsets[b] - plan.packing.offsets[b - 1]);
  plan.row_shared.resize(plan.rows.size());
  if (options.min_saved == 0) return plan;
  if (std::optional<SharedLayout> shared = shared_layout(batcher, plan, options)) {
    plan.padded_ = std::move(shared->padded);
    plan.shared_tokens = shared->shared_tokens;
    std::vector<bool> seen(plan.rows.size(), false);
    for (size_t i = 0; i < plan.item_row.size(); ++i) {
      int32_t& least = plan.row_shared[plan.item_row[i]];
      least = seen[plan.item_row[i]] ? std::min(least, shared->item_shared[i]) : shared->item_shared[i];
      seen[plan.item_row[i]] = true;
    }
  }
  return plan;
}

namespace {

PaddedLayout pad_rows(const std::vector<int32_t>& lengths, int64_t capacity, int dp, int max_rows) {
  std::vector<int32_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
  std::vector<int32_t> cuts = {0};  // the longest row of a cut is its first
  for (int32_t i = 0; i < int32_t(order.size()); ++i) {
    const int64_t rows = i - cuts.back() + 1;
    if (rows > 1 && (rows * lengths[order[cuts.back()]] > capacity || (max_rows && rows > max_rows))) cuts.push_back(i);
  }
  if (!order.empty()) cuts.push_back(int32_t(order.size()));
  const auto area = [&](size_t c) { return int64_t{lengths[order[cuts[c]]]} * (cuts[c + 1] - cuts[c]); };
  while ((cuts.size() - 1) % size_t(dp)) {
    size_t widest = 0;
    int64_t best = 0;
    for (size_t c = 0; c + 1 < cuts.size(); ++c) {
      if (cuts[c + 1] - cuts[c] < 2 || area(c) <= best) continue;
      best = area(c);
      widest = c;
    }
    // Fewer rows than ranks: the last ranks get nothing.
    if (best == 0)
      cuts.push_back(int32_t(order.size()));
    else
      cuts.insert(cuts.begin() + widest + 1, (cuts[widest] + cuts[widest + 1] + 1) / 2);
  }
  PaddedLayout out;
  out.n_mb = int(cuts.size() - 1) / dp;
  out.offsets.push_back(0);
  for (int rank = 0; rank < dp; ++rank) {
    for (int step = 0; step < out.n_mb; ++step) {
      const size_t c = size_t(step) * dp + rank;
      out.items.insert(out.items.end(), order.begin() + cuts[c], order.begin() + cuts[c + 1]);
      out.offsets.push_back(int32_t(out.items.size()));
      out.width.push_back(cuts[c + 1] > cuts[c] ? lengths[order[cuts[c]]] : 0);
      out.prefix.push_back(0);
      out.prefix_id.push_back(-1);
    }
  }
  return out;
}

}  // namespace

const PaddedLayout& Plan::padded() const {
  if (!padded_) {
    std::vector<int32_t> lengths;
    for (const int32_t row : item_row) lengths.push_back(rows[row].length);
    padded_ = pad_rows(lengths, capacity, dp, max_rows);
  }
  return *padded_;
}

}  // namespace mgrpo
