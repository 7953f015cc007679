// Which rows of the KV cache a decode step attends to. A policy keeps what it has to know per page or per sequence, and takes the place
// of attention_decode for the rows that it wants; prompts are always dense.
#pragma once
#include "kv/page_pool.h"
#include "ops/ops.h"

namespace prt {

class Policy {
 public:
  virtual ~Policy() = default;
  virtual bool wants(int64_t kv_len) const = 0;             // a decode row that sees so many keys
  virtual void prepare(const int64_t* seq, int64_t n) = 0;  // these sequences are about to be decoded; may change rows and pages of theirs
  // First and end of the sequence's pages that the policy keeps in an order of its own: an input of the step, like its page table.
  virtual void closed_pages(int64_t seq, int32_t out[2]) const = 0;
  virtual void decode(int64_t layer, const Attention& a, const Tensor& closed) = 0;  // closed: [n_entry][2] i32
  virtual void truncate(int64_t seq, int64_t n_token) = 0;  // before the pool does
};

}  // namespace prt
