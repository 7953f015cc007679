// The scratch of `sparse_attention`, which its contract sizes and its CPU twin lays out.
#pragma once
#include "attention/sparse.h"
#include "ops/attention.h"

namespace prt {

// Per thread: what dense attention needs, and the chunk's rows of K and V collected into pages of their own.
inline int64_t sparse_thread_floats(int64_t group, int64_t d) { return attention_thread_floats(group, d) + 2 * kChunkTokens * d; }
// Per chunk of chosen rows: a partial result of every query head.
inline int64_t sparse_partial_floats(int64_t h_q, int64_t d) { return attention_partial_floats(h_q, d); }

}  // namespace prt
