// Writes a plan into the caller's buffers. Threads own whole micro-batches, so the bytes do not depend on their number.
#pragma once

#include <cstdint>

#include "plan.hpp"

namespace mgrpo {

// Packed rows, n_mb x capacity tokens and n_mb x segments sequences; a null pointer is a column nobody wants.
struct PackedBuffers {
  int64_t n_mb = 0, capacity = 0, segments = 0;
  int32_t* ids = nullptr;           // [n_mb, capacity]
  uint8_t* loss_mask = nullptr;     // [n_mb, capacity]
  float* logprobs = nullptr;        // [n_mb, capacity]
  float* advantages = nullptr;      // [n_mb, capacity]
  int32_t* position_ids = nullptr;  // [n_mb, capacity]
  int32_t* cu_seqlens = nullptr;    // [n_mb, segments + 2]
  int32_t* n_seg = nullptr;         // [n_mb]
  int32_t* max_seqlen = nullptr;    // [n_mb]
  float* seg_advantage = nullptr;   // [n_mb, segments]
  float* seg_weight = nullptr;      // [n_mb, segments]
  int64_t* seg_traj = nullptr;      // [n_mb, segments]
  int32_t* seg_row = nullptr;       // [n_mb, segments]
};

// One right-padded micro-batch of `rows` x `width` tokens.
struct PaddedBuffers {
  int64_t rows = 0, width = 0;
  int32_t* ids = nullptr;          // [rows, width]
  uint8_t* loss_mask = nullptr;    // [rows, width]
  float* logprobs = nullptr;       // [rows, width]
  float* advantages = nullptr;     // [rows, width]
  int32_t* lengths = nullptr;      // [rows]
  float* seg_advantage = nullptr;  // [rows]
  float* seg_weight = nullptr;     // [rows]
  int64_t* seg_traj = nullptr;     // [rows]
  int32_t* seg_row = nullptr;      // [rows]
};

void write_packed(const Batcher& batcher, const Plan& plan, int rank, const PackedBuffers& out);
void write_padded(const Batcher& batcher, const Plan& plan, const PaddedLayout& layout, int rank, int micro_batch,
                  const PaddedBuffers& out);

}  // namespace mgrpo
