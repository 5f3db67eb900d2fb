#include "weight_patch.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "check.hpp"

namespace mgrpo {
namespace {

constexpr uint8_t GO_ON = 255;

uint64_t load_word(const uint8_t* at, size_t bytes = 8) {
  uint64_t word = 0;
  std::memcpy(&word, at, bytes);
  return word;
}

template <size_t ITEM>
std::optional<SparseXor> sparse_of(const uint8_t* before, const uint8_t* after, size_t n, size_t limit) {
  constexpr size_t PER_WORD = 8 / ITEM, BITS = 8 * ITEM;
  constexpr uint64_t MASK = ITEM == 8 ? ~uint64_t{0} : (uint64_t{1} << (BITS % 64)) - 1;
  SparseXor out;
  std::array<std::vector<uint8_t>, ITEM> planes;
  size_t next = 0;  // the first element that no gap covers yet
  const size_t bytes = n * ITEM;
  for (size_t at = 0; at < bytes; at += 8) {
    const size_t here = std::min<size_t>(8, bytes - at);
    uint64_t word = load_word(before + at, here) ^ load_word(after + at, here);
    while (word != 0) {
      const size_t lane = size_t(std::countr_zero(word)) / BITS;
      const uint64_t value = (word >> (lane * BITS)) & MASK;
      const size_t index = at / 8 * PER_WORD + lane;
      size_t gap = index - next;
      for (; gap >= GO_ON; gap -= GO_ON) out.gaps.push_back(GO_ON);
      out.gaps.push_back(uint8_t(gap));
      for (size_t b = 0; b < ITEM; ++b) planes[b].push_back(uint8_t(value >> (8 * b)));
      next = index + 1;
      word &= ~(MASK << (lane * BITS));
    }
    if (planes[0].size() > limit) return std::nullopt;
  }
  out.values.reserve(planes[0].size() * ITEM);
  for (const auto& plane : planes) out.values.insert(out.values.end(), plane.begin(), plane.end());
  return out;
}

template <size_t ITEM>
void dense_of(const uint8_t* before, const uint8_t* after, size_t n, uint8_t* out) {
  for (size_t i = 0; i < n; ++i)
    for (size_t b = 0; b < ITEM; ++b) out[b * n + i] = before[i * ITEM + b] ^ after[i * ITEM + b];
}

template <size_t ITEM>
void apply_planes(uint8_t* data, size_t n, const uint8_t* planes) {
  for (size_t i = 0; i < n; ++i)
    for (size_t b = 0; b < ITEM; ++b) data[i * ITEM + b] ^= planes[b * n + i];
}

// Calls use(place of the entry, index of its element) in order; the number of entries.
template <typename Use>
size_t for_each_entry(const uint8_t* gaps, size_t gap_bytes, size_t n, Use&& use) {
  size_t next = 0, entries = 0;
  bool open = false;
  for (size_t at = 0; at < gap_bytes; ++at) {
    next += gaps[at];
    open = gaps[at] == GO_ON;
    if (open) continue;
    MGRPO_CHECK(next < n, "a patch names element ", next, " of a slice of ", n);
    use(entries++, next);
    ++next;
  }
  MGRPO_CHECK(!open, "a patch ends in the middle of a gap");
  return entries;
}

template <typename Call>
auto for_itemsize(size_t itemsize, Call&& call) {
  switch (itemsize) {
    case 1:
      return call(std::integral_constant<size_t, 1>{});
    case 2:
      return call(std::integral_constant<size_t, 2>{});
    case 4:
      return call(std::integral_constant<size_t, 4>{});
    case 8:
      return call(std::integral_constant<size_t, 8>{});
    default:
      throw std::invalid_argument(concat("elements of ", itemsize, " bytes; expected 1, 2, 4 or 8"));
  }
}

}  // namespace

std::optional<SparseXor> xor_sparse(const uint8_t* before, const uint8_t* after, size_t n, size_t itemsize,
                                    size_t limit) {
  return for_itemsize(itemsize, [&](auto item) { return sparse_of<item()>(before, after, n, limit); });
}

void xor_dense(const uint8_t* before, const uint8_t* after, size_t n, size_t itemsize, uint8_t* out) {
  for_itemsize(itemsize, [&](auto item) { dense_of<item()>(before, after, n, out); });
}

void apply_sparse(uint8_t* data, size_t n, size_t itemsize, const uint8_t* gaps, size_t gap_bytes,
                  const uint8_t* values, size_t value_bytes) {
  for_itemsize(itemsize, [&](auto item) {
    constexpr size_t ITEM = item();
    const size_t entries = for_each_entry(gaps, gap_bytes, n, [](size_t, size_t) {});
    MGRPO_CHECK(value_bytes == entries * ITEM, "a patch of ", entries, " elements of ", ITEM, " bytes has ",
                value_bytes, " bytes of values");
    for_each_entry(gaps, gap_bytes, n, [&](size_t entry, size_t index) {
      for (size_t b = 0; b < ITEM; ++b) data[index * ITEM + b] ^= values[b * entries + entry];
    });
  });
}

void apply_dense(uint8_t* data, size_t n, size_t itemsize, const uint8_t* planes) {
  for_itemsize(itemsize, [&](auto item) { apply_planes<item()>(data, n, planes); });
}

std::vector<int64_t> sparse_indices(const uint8_t* gaps, size_t gap_bytes, size_t n) {
  std::vector<int64_t> out;
  out.reserve(gap_bytes);
  for_each_entry(gaps, gap_bytes, n, [&](size_t, size_t index) { out.push_back(int64_t(index)); });
  return out;
}

}  // namespace mgrpo
