// Included by exactly one file for each instruction set, which defines MGRPO_LANES (floats in a vector) and
// MGRPO_TABLE. GNU vector types: the same source is AVX-512, AVX2 or plain code, by the file's compile options.
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "loss_isa.hpp"

namespace mgrpo {
namespace {

constexpr int kLanes = MGRPO_LANES;
typedef float Vec __attribute__((vector_size(4 * MGRPO_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * MGRPO_LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * MGRPO_LANES)));
static_assert(kBlock % (4 * kLanes) == 0);

constexpr int64_t kAhead = 4 * kBlock;  // elements between what is computed and what is fetched
constexpr float kFloor = -126.0f;       // 2^t below the normal range counts as 0

// A cast between vector types of one size keeps the bits.
inline Vec splat(float x) { return Vec{} + x; }

template <bool kBf16>
inline Vec load(const void* base, int64_t i) {
  if constexpr (kBf16) {
    Half h;
    std::memcpy(&h, static_cast<const uint16_t*>(base) + i, sizeof h);
    const Int wide = __builtin_convertvector(h, Int) << 16;
    return (Vec)wide;
  } else {
    Vec v;
    std::memcpy(&v, static_cast<const float*>(base) + i, sizeof v);
    return v;
  }
}

inline float load_one(const void* base, bool bf16, int64_t i) {
  if (!bf16) return static_cast<const float*>(base)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(base)[i]} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // gradients are finite here
}

template <bool kBf16, bool kStream>
inline void store(void* base, int64_t i, Vec v) {
  if constexpr (kBf16) {
    const Int bits = (Int)v;
    const Int rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
    const Half h = __builtin_convertvector(rounded, Half);
    std::memcpy(static_cast<uint16_t*>(base) + i, &h, sizeof h);
  } else {
    float* p = static_cast<float*>(base) + i;
    if constexpr (kStream) {
#if defined(__AVX512F__)
      _mm512_stream_ps(p, (__m512)v);
      return;
#elif defined(__AVX__)
      _mm256_stream_ps(p, (__m256)v);
      return;
#endif
    }
    std::memcpy(p, &v, sizeof v);
  }
}

// Two vectors of a later block, on their way from memory while this one is computed: without it the sweep waits for
// memory and then computes, and the two add up. Past the end of the row it is the next row; past that, nothing.
template <bool kBf16>
inline void prefetch(const void* base, int64_t i) {
  constexpr int64_t kSize = kBf16 ? 2 : 4, kLine = 64;
  const char* p = static_cast<const char*>(base) + i * kSize;
  for (int64_t at = 0; at < 2 * kLanes * kSize; at += kLine) __builtin_prefetch(p + at);
}

// 2^t for t <= 0, relative error below 1e-7; exactly 0 below kFloor; NaN stays NaN.
inline Vec exp2_neg(Vec t) {
  const Int tiny = t < kFloor;
  t = tiny ? splat(kFloor) : t;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = t + magic;
  const Vec f = t - (shifted - magic);   // [-0.5, 0.5]
  Vec p = splat(1.534579205326736e-4f);  // minimax over [-0.5, 0.5], degree 6
  p = p * f + 1.3399929734e-3f;
  p = p * f + 9.6184890717e-3f;
  p = p * f + 5.5503286421e-2f;
  p = p * f + 2.4022646248e-1f;
  p = p * f + 6.9314718246e-1f;
  p = p * f + 1.0f;
  const Int exponent = (Int)shifted << 23;
  const Int scaled = (Int)p + exponent;
  return tiny ? splat(0.0f) : (Vec)scaled;
}

inline float exp2_one(float t) { return exp2_neg(splat(t))[0]; }

inline double add_up(Vec v) {
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

template <bool kBf16>
inline float block_maximum(const void* z, int64_t at, int64_t n) {
  Vec a = splat(-__builtin_inff()), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = larger(load<kBf16>(z, at + i), a);
    b = larger(load<kBf16>(z, at + i + kLanes), b);
  }
  a = larger(a, b);
  float m = a[0];
  for (int lane = 1; lane < kLanes; ++lane) m = a[lane] > m ? a[lane] : m;
  for (; i < n; ++i) {
    const float x = load_one(z, kBf16, at + i);
    m = x > m ? x : m;
  }
  return m;
}

template <bool kBf16>
RowStats stats_of(const void* z, int64_t n, float k, float* scratch, float* block_max) {
  RowStats r{-__builtin_inff(), 0.0, 0.0};
  for (int64_t at = 0, block = 0; at < n; at += kBlock, ++block) {
    const int64_t len = n - at < kBlock ? n - at : kBlock;
    const float top = block_maximum<kBf16>(z, at, len);
    if (top > r.maximum) {  // rescale what was summed so far; from -inf there is nothing
      const float down = (r.maximum - top) * k;
      const double f = down < kFloor ? 0.0 : exp2_one(down);
      r.weighted = f == 0.0 ? 0.0 : f * (r.weighted + down * r.sum);
      r.sum *= f;
      r.maximum = top;
    }
    block_max[block] = r.maximum;
    const float m = r.maximum == -__builtin_inff() ? 0.0f : r.maximum;  // a leading block of -inf: all exp are 0
    Vec s0{}, s1{}, w0{}, w1{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= len; i += 2 * kLanes) {
      prefetch<kBf16>(z, at + i + kAhead);
      const Vec t0 = (load<kBf16>(z, at + i) - m) * k, t1 = (load<kBf16>(z, at + i + kLanes) - m) * k;
      const Vec e0 = exp2_neg(t0), e1 = exp2_neg(t1);
      if (scratch) {
        std::memcpy(scratch + at + i, &e0, sizeof e0);
        std::memcpy(scratch + at + i + kLanes, &e1, sizeof e1);
      }
      s0 += e0;
      s1 += e1;
      w0 += e0 * (t0 < kFloor ? splat(kFloor) : t0);
      w1 += e1 * (t1 < kFloor ? splat(kFloor) : t1);
    }
    r.sum += add_up(s0 + s1);
    r.weighted += add_up(w0 + w1);
    for (; i < len; ++i) {
      const float t = (load_one(z, kBf16, at + i) - m) * k;
      const float e = exp2_one(t);
      if (scratch) scratch[at + i] = e;
      r.sum += e;
      r.weighted += e * (t < kFloor ? kFloor : t);
    }
  }
  return r;
}

template <bool kBf16, bool kStream>
void gradient_of(const void* z, int64_t n, const RowScale& s, const float* scratch, const float* block_max, void* out) {
  constexpr float kLn2 = 0.69314718055994531f;
  const float inverse_sum = float(1.0 / __builtin_exp2(s.log2_sum)), log2_sum = float(s.log2_sum);
  for (int64_t at = 0, block = 0; at < n; at += kBlock, ++block) {
    const int64_t len = n - at < kBlock ? n - at : kBlock;
    float rescale = inverse_sum;
    if (scratch) {
      const float down = (block_max[block] - s.maximum) * s.k;
      rescale = down < kFloor ? 0.0f : inverse_sum * exp2_one(down);
    }
    // Without an entropy term the factor of p is the constant -c.
    const bool plain = s.e == 0.0f;
    const float constant = plain ? -s.c * rescale : 0.0f;
    int64_t i = 0;
    if (plain && scratch) {
      for (; i + kLanes <= len; i += kLanes) {
        Vec e;
        std::memcpy(&e, scratch + at + i, sizeof e);
        store<kBf16, kStream>(out, at + i, e * constant);
      }
    }
    for (; i + kLanes <= len; i += kLanes) {
      const Vec t = (load<kBf16>(z, at + i) - s.maximum) * s.k;
      Vec e;
      if (scratch) {
        std::memcpy(&e, scratch + at + i, sizeof e);
      } else {
        e = exp2_neg(t);
      }
      const Vec logp = ((t < kFloor ? splat(kFloor) : t) - log2_sum) * kLn2;
      store<kBf16, kStream>(out, at + i, e * rescale * -(s.c + s.e * (logp + s.entropy)));
    }
    for (; i < len; ++i) {
      const float t = (load_one(z, kBf16, at + i) - s.maximum) * s.k;
      const float e = scratch ? scratch[at + i] : exp2_one(t);
      const float logp = ((t < kFloor ? kFloor : t) - log2_sum) * kLn2;
      const float g = e * rescale * -(s.c + s.e * (logp + s.entropy));
      if constexpr (kBf16) {
        static_cast<uint16_t*>(out)[at + i] = round_bf16(g);
      } else {
        static_cast<float*>(out)[at + i] = g;
      }
    }
  }
}

RowStats stats(const void* z, bool bf16, int64_t n, float k, float* scratch, float* block_max) {
  return bf16 ? stats_of<true>(z, n, k, scratch, block_max) : stats_of<false>(z, n, k, scratch, block_max);
}

void gradient(const void* z, bool bf16, int64_t n, const RowScale& scale, const float* scratch, const float* block_max,
              void* out, bool stream) {
  if (bf16) {
    gradient_of<true, false>(z, n, scale, scratch, block_max, out);
  } else if (stream) {
    gradient_of<false, true>(z, n, scale, scratch, block_max, out);
#if defined(__SSE2__)
    _mm_sfence();  // streamed lines are visible before the row is handed on
#endif
  } else {
    gradient_of<false, false>(z, n, scale, scratch, block_max, out);
  }
}

}  // namespace

const IsaTable MGRPO_TABLE{stats, gradient};

}  // namespace mgrpo
