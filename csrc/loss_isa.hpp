// The vector part of loss_rows.cpp, compiled once for each instruction set (loss_avx512.cpp, loss_avx2.cpp,
// loss_scalar.cpp). Only plain types cross this border: no inline library code may be compiled with wider options.
#pragma once

#include <cstdint>

namespace mgrpo {

constexpr int64_t kBlock = 1024;  // elements whose exponentials share one running maximum

struct RowStats {
  float maximum;         // of z
  double sum, weighted;  // S and B, base 2, relative to maximum
};

struct RowScale {
  float k;          // log2(e) / temperature
  float maximum;    // final maximum of z
  double log2_sum;  // log2 S
  float c;          // d loss / d logp, divided by temperature
  float e;          // d loss / d entropy, divided by temperature
  float entropy;    // nats
};

struct IsaTable {
  // Sweep 1: statistics; the exponentials go to scratch, block b relative to block_max[b].
  RowStats (*stats)(const void* z, bool bfloat16, int64_t n, float k, float* scratch, float* block_max);
  // Sweep 2: -(c + e (ln p + entropy)) p into out; with `stream`, past the cache. scratch may be null (recompute).
  void (*gradient)(const void* z, bool bfloat16, int64_t n, const RowScale& scale, const float* scratch,
                   const float* block_max, void* out, bool stream);
};

#if defined(__x86_64__)
extern const IsaTable isa_avx512;
extern const IsaTable isa_avx2;
#endif
extern const IsaTable isa_scalar;

}  // namespace mgrpo
