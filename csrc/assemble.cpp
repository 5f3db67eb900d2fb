#include "assemble.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <thread>

#include "check.hpp"
#include "stream.hpp"

namespace mgrpo {

namespace {

// Starting a thread costs about as much as copying this many tokens.
constexpr int64_t kTokensPerThread = 1 << 17;

// A plan is good for the batcher that made it and for a rank that it divides its rows among.
void check_plan(const Batcher& batcher, const Plan& plan, int rank) {
  MGRPO_CHECK(plan.owner == batcher.id(), "the plan of step ", plan.step, " was made by batcher ", plan.owner,
              ", this is batcher ", batcher.id(), ": write a plan with the batcher that made it");
  MGRPO_CHECK(rank >= 0 && rank < plan.dp, "rank=", rank, " is outside [0, dp=", plan.dp, ")");
}

void check_alive(const Batcher& batcher, const Plan& plan, const PlanRow& row) {
  if (!batcher.arena().holds(row.handle, row.generation))
    throw BatcherError("dropped", plan.queries[plan.group_query[row.group]], row.rollout, row.id,
                       "the query was dropped after it was planned");
}

// What one sequence of a micro-batch is made of.
struct Source {
  const int32_t* ids;
  const float* logprobs;
  const float* advantages;  // of each token; null: `advantage` is that of all
  const uint8_t* masks;
  int64_t id;
  int32_t length, row;
  float advantage, weight;
};

// Rows and blocks lie anywhere in memory, and what was copied since the last micro-batch has pushed them out of the
// cache. Looking all of a micro-batch up at once lets those misses overlap; between two copies each would be waited for.
std::vector<Source> sources_of(const Arena& arena, const Plan& plan, int32_t begin, int32_t end) {
  std::vector<Source> sources(size_t(end - begin));
  for (int32_t i = begin; i < end; ++i) {
    const int32_t item = plan.packing.items[i];
    const PlanRow& row = plan.rows[plan.item_row[item]];
    sources[size_t(i - begin)] = {arena.ids(row.handle) + row.start,
                                  arena.logprobs(row.handle) + row.start,
                                  plan.token_advantages ? arena.advantages(row.handle) + row.start : nullptr,
                                  arena.masks(row.handle) + row.start,
                                  row.id,
                                  row.length,
                                  plan.item_row[item],
                                  row.advantage,
                                  plan.item_weight[item]};
  }
  return sources;
}

template <typename T>
void copy(T* to, const T* from, int64_t n) {
  if (to) stream_copy(to, from, size_t(n) * sizeof(T));
}

template <typename T>
void fill(T* to, int64_t n, T value) {
  if (to) std::fill_n(to, n, value);
}

template <typename T>
T* at(T* base, int64_t offset) {
  return base ? base + offset : nullptr;
}

void count_up(int32_t* to, int64_t n) {
  if (to) stream_count(to, n, 0, 1);
}

void write_advantages(float* to, const float* from, int64_t n, float value) {
  if (from)
    copy(to, from, n);
  else if (to)
    stream_count(reinterpret_cast<int32_t*>(to), n, std::bit_cast<int32_t>(value), 0);
}

void write_micro_batch(const Batcher& batcher, const Plan& plan, int64_t bin, int64_t mb, const PackedBuffers& out) {
  const int64_t row0 = mb * out.capacity, seg0 = mb * out.segments;
  int32_t* cu = at(out.cu_seqlens, mb * (out.segments + 2));
  const int32_t begin = bin < 0 ? 0 : plan.packing.offsets[bin], end = bin < 0 ? 0 : plan.packing.offsets[bin + 1];
  int64_t used = 0, longest = 0;
  if (cu) cu[0] = 0;
  const std::vector<Source> sources = sources_of(batcher.arena(), plan, begin, end);
  for (size_t segment = 0; segment < sources.size(); ++segment) {
    const Source& from = sources[segment];
    const int64_t place = row0 + used, index = seg0 + int64_t(segment);
    copy(at(out.ids, place), from.ids, from.length);
    copy(at(out.logprobs, place), from.logprobs, from.length);
    copy(at(out.loss_mask, place), from.masks, from.length);
    write_advantages(at(out.advantages, place), from.advantages, from.length, from.advantage);
    count_up(at(out.position_ids, place), from.length);
    if (out.seg_advantage) out.seg_advantage[index] = from.advantage;
    if (out.seg_weight) out.seg_weight[index] = from.weight;
    if (out.seg_traj) out.seg_traj[index] = from.id;
    if (out.seg_row) out.seg_row[index] = from.row;
    used += from.length;
    longest = std::max<int64_t>(longest, from.length);
    if (cu) cu[segment + 1] = int32_t(used);
  }
  const int64_t n_seg = end - begin, rest = out.capacity - used, blank = out.segments - n_seg;
  fill(at(out.ids, row0 + used), rest, plan.pad_id);
  fill(at(out.loss_mask, row0 + used), rest, uint8_t{0});
  fill(at(out.logprobs, row0 + used), rest, 0.0f);
  fill(at(out.advantages, row0 + used), rest, 0.0f);
  count_up(at(out.position_ids, row0 + used), rest);
  fill(at(cu, n_seg + 1), blank + 1, int32_t(out.capacity));
  fill(at(out.seg_advantage, seg0 + n_seg), blank, 0.0f);
  fill(at(out.seg_weight, seg0 + n_seg), blank, 0.0f);
  fill(at(out.seg_traj, seg0 + n_seg), blank, int64_t{-1});
  fill(at(out.seg_row, seg0 + n_seg), blank, int32_t{-1});
  if (out.n_seg) out.n_seg[mb] = int32_t(n_seg);
  if (out.max_seqlen) out.max_seqlen[mb] = int32_t(std::max(longest, rest));
  stream_done();
}

}  // namespace

void write_packed(const Batcher& batcher, const Plan& plan, int rank, const PackedBuffers& out) {
  check_plan(batcher, plan, rank);
  MGRPO_CHECK(out.n_mb >= plan.packing.n_mb, "buffers hold ", out.n_mb, " micro-batches, the plan has ",
              plan.packing.n_mb, " a rank");
  MGRPO_CHECK(out.capacity >= plan.capacity, "buffer rows hold ", out.capacity, " tokens, the capacity is ",
              plan.capacity);
  MGRPO_CHECK(out.segments >= plan.max_segments, "buffers hold ", out.segments,
              " segments a micro-batch, the plan has ", plan.max_segments);
  const auto lock = batcher.read_lock();
  const int64_t first = int64_t{rank} * plan.packing.n_mb;
  if (plan.packing.n_mb > 0)
    for (int32_t i = plan.packing.offsets[first]; i < plan.packing.offsets[first + plan.packing.n_mb]; ++i)
      check_alive(batcher, plan, plan.rows[plan.item_row[plan.packing.items[i]]]);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t mb = next++; mb < out.n_mb; mb = next++)
      write_micro_batch(batcher, plan, mb < plan.packing.n_mb ? first + mb : -1, mb, out);
  };
  const int64_t useful = std::min(out.n_mb, 1 + out.n_mb * out.capacity / kTokensPerThread);
  std::vector<std::jthread> helpers;
  for (int64_t t = 1; t < std::min<int64_t>(plan.threads, useful); ++t) helpers.emplace_back(work);
  work();
}

void write_padded(const Batcher& batcher, const Plan& plan, const PaddedLayout& layout, int rank, int micro_batch,
                  const PaddedBuffers& out) {
  check_plan(batcher, plan, rank);
  MGRPO_CHECK(micro_batch >= 0 && micro_batch < layout.n_mb, "micro_batch=", micro_batch, " is outside [0, ",
              layout.n_mb, ")");
  const int64_t bin = int64_t{rank} * layout.n_mb + micro_batch;
  const int32_t begin = layout.offsets[bin], end = layout.offsets[bin + 1];
  MGRPO_CHECK(out.rows >= end - begin && out.width >= layout.width[bin], "buffers hold ", out.rows, " rows of ",
              out.width, " tokens, the micro-batch has ", end - begin, " rows of ", layout.width[bin]);
  const auto lock = batcher.read_lock();
  for (int32_t i = begin; i < end; ++i) check_alive(batcher, plan, plan.rows[plan.item_row[layout.items[i]]]);
  for (int64_t r = 0; r < out.rows; ++r) {
    const bool real = begin + r < end;
    const int32_t item = real ? layout.items[begin + r] : -1;
    const PlanRow row = real ? plan.rows[plan.item_row[item]] : PlanRow{};
    const int64_t place = r * out.width, rest = out.width - row.length;
    if (real) {
      const Arena& arena = batcher.arena();
      copy(at(out.ids, place), arena.ids(row.handle) + row.start, row.length);
      copy(at(out.logprobs, place), arena.logprobs(row.handle) + row.start, row.length);
      copy(at(out.loss_mask, place), arena.masks(row.handle) + row.start, row.length);
      write_advantages(at(out.advantages, place),
                       plan.token_advantages ? arena.advantages(row.handle) + row.start : nullptr, row.length,
                       row.advantage);
    }
    fill(at(out.ids, place + row.length), rest, plan.pad_id);
    fill(at(out.loss_mask, place + row.length), rest, uint8_t{0});
    fill(at(out.logprobs, place + row.length), rest, 0.0f);
    fill(at(out.advantages, place + row.length), rest, 0.0f);
    if (out.lengths) out.lengths[r] = row.length;
    if (out.seg_advantage) out.seg_advantage[r] = row.advantage;
    if (out.seg_weight) out.seg_weight[r] = real ? plan.item_weight[item] : 0.0f;
    if (out.seg_traj) out.seg_traj[r] = real ? row.id : -1;
    if (out.seg_row) out.seg_row[r] = real ? plan.item_row[item] : -1;
  }
  stream_done();
}

}  // namespace mgrpo
