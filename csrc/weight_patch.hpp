// Differences between two versions of a tensor's bytes, as XOR: what is applied twice is undone, and most values of a
// small optimizer step in bfloat16 are one of a few (a last bit or two), which compresses well.
//
//   sparse   gaps:   for each element that changed, how many unchanged ones stand before it; 255 is "255, go on"
//            values: old XOR new of each changed element, byte plane by byte plane (all lowest bytes first)
//   dense    old XOR new of every element, byte plane by byte plane
//
// Elements are of 1, 2, 4 or 8 bytes, little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace mgrpo {

struct SparseXor {
  std::vector<uint8_t> gaps;
  std::vector<uint8_t> values;  // one plane a byte of an element
};

// nullopt when more than `limit` of the n elements changed. Throws for an itemsize that is none of the above.
std::optional<SparseXor> xor_sparse(const uint8_t* before, const uint8_t* after, size_t n, size_t itemsize,
                                    size_t limit);

// out: n * itemsize bytes.
void xor_dense(const uint8_t* before, const uint8_t* after, size_t n, size_t itemsize, uint8_t* out);

// XOR a sparse difference into n elements. Throws, having changed nothing, where it does not fit them.
void apply_sparse(uint8_t* data, size_t n, size_t itemsize, const uint8_t* gaps, size_t gap_bytes,
                  const uint8_t* values, size_t value_bytes);

void apply_dense(uint8_t* data, size_t n, size_t itemsize, const uint8_t* planes);

// Index of each changed element. Throws where the gaps lead past n or end in the middle of one.
std::vector<int64_t> sparse_indices(const uint8_t* gaps, size_t gap_bytes, size_t n);

}  // namespace mgrpo
