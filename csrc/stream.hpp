// Copies and fills that do not read their destination into the cache first: assembly writes every byte once and reads
// none of it back, so ordinary stores would cost a third more memory traffic. Elsewhere than x86-64: plain ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mgrpo {

inline constexpr size_t kStreamFrom = 512;  // bytes; below, the unaligned ends outweigh the gain

#if defined(__SSE2__)

inline size_t bytes_to_line(const void* p) { return (64 - (reinterpret_cast<uintptr_t>(p) & 63)) & 63; }

// Half a line a store: on an AMD EPYC rows of a few kilobytes, copied in any order, go at 0.94 of one large memcpy, against
// 0.75 with quarter lines and 0.62 with libc's string moves. `to` is on a line; what is left in the end, under 128 bytes,
// is the caller's.
__attribute__((target("avx2"))) inline void stream_halves(char*& to, const char*& from, size_t& n) {
  for (; n >= 128; n -= 128, to += 128, from += 128) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
    const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 64));
    const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 96));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), b);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 64), c);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 96), d);
  }
}

inline void stream_quarters(char*& to, const char*& from, size_t& n) {
  for (; n >= 64; n -= 64, to += 64, from += 64) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32));
    const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 48));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), a);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 16), b);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 32), c);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 48), d);
  }
}

inline bool can_halves() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}
inline const bool kHalves = can_halves();

inline void stream_copy(void* to, const void* from, size_t n) {
  auto* d = static_cast<char*>(to);
  auto* s = static_cast<const char*>(from);
  if (n >= kStreamFrom) {
    const size_t head = bytes_to_line(d);
    std::memcpy(d, s, head);
    d += head;
    s += head;
    n -= head;
    if (kHalves)
      stream_halves(d, s, n);
    else
      stream_quarters(d, s, n);
  }
  std::memcpy(d, s, n);
}

// first, first + step, first + 2 step, ... as 32-bit words; step 0 fills.
inline void stream_count(int32_t* to, int64_t n, int32_t first, int32_t step) {
  int64_t i = 0;
  const auto store_until = [&](int64_t end) {
    for (; i < end; ++i) to[i] = first + int32_t(i) * step;
  };
  if (size_t(n) * 4 >= kStreamFrom) {
    store_until(int64_t(bytes_to_line(to) / 4));
    __m128i value = _mm_setr_epi32(first + int32_t(i) * step, first + int32_t(i + 1) * step,
                                   first + int32_t(i + 2) * step, first + int32_t(i + 3) * step);
    const __m128i four = _mm_set1_epi32(4 * step);
    for (; i + 4 <= n; i += 4) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), value);
      value = _mm_add_epi32(value, four);
    }
  }
  store_until(n);
}

// Makes streamed bytes visible before anything that follows.
inline void stream_done() { _mm_sfence(); }

#else

inline void stream_copy(void* to, const void* from, size_t n) { std::memcpy(to, from, n); }

inline void stream_count(int32_t* to, int64_t n, int32_t first, int32_t step) {
  for (int64_t i = 0; i < n; ++i) to[i] = first + int32_t(i) * step;
}

inline void stream_done() {}

#endif

}  // namespace mgrpo
