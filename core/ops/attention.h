// What attention_prefill and attention_decode have in common on the CPU side: the contract and the scratch layout.
#pragma once
#include "ops/ops.h"

namespace prt {

constexpr int64_t kAttentionRows = 64;  // query rows (tokens x heads of a group) that share one pass over the pages

void check_attention(const Backend& backend, const char* op, const Attention& a);

inline int64_t attention_block_rows(int64_t group) { return group > kAttentionRows ? group : kAttentionRows / group * group; }
inline int64_t attention_scratch_rows(int64_t group) { return (attention_block_rows(group) + 15) / 16 * 16; }  // whole tiles
// Per thread; d is padded to the widest vector (16) so that every instruction set fits.
inline int64_t attention_thread_floats(int64_t group, int64_t d) {
  const int64_t rows = attention_scratch_rows(group), d_pad = (d + 15) / 16 * 16;
  return (rows * (d + kPageTokens) + kPageTokens * (d + d_pad) + 2 * rows * (2 + d_pad) + 64 + 15) / 16 * 16;
}
// Decode keeps one partial result per chunk and query head.
inline int64_t attention_partial_floats(int64_t h_q, int64_t d) { return h_q * ((d + 15) / 16 * 16 + 2); }

}  // namespace prt
