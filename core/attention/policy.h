// Which rows of the KV cache a decode step attends to. A policy keeps what it has to know per page or per sequence, and takes the place
// of attention_decode for the rows that it wants; prompts are always dense.
#pragma once
#include <vector>

#include "kv/page_pool.h"
#include "ops/ops.h"

namespace prt {

// Counters of one layer and kv head since the policy was set.
struct AttentionCounters {
  int64_t n_step = 0;       // decode rows
  int64_t n_context = 0;    // rows there were
  int64_t n_selected = 0;   // rows of the index that were attended to, after the union over the group
  int64_t n_exact = 0;      // rows that are always attended to: sinks, window, and what is not in the index yet
  int64_t n_mass = 0;       // query heads x steps
  double mass = 0;          // sum of the estimated shares
  int64_t n_true = 0;
  double true_mass = 0;     // sum of the measured shares
  int64_t n_reached = 0;    // of them, p or more
  int64_t histogram[PRT_MASS_BINS] = {};  // of the measured shares
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual bool wants(int64_t kv_len) const = 0;         // a decode row that sees so many keys
  virtual void prepare(const int64_t* seq, int64_t n) = 0;  // these sequences are about to be decoded; may change rows and pages of theirs
  virtual void begin(const int64_t* seq, int64_t n) = 0;  // the entries of the chunk that decode() will get, layer by layer
  virtual void decode(int64_t layer, const Attention& a) = 0;
  virtual void truncate(int64_t seq, int64_t n_token) = 0;  // before the pool does
};

}  // namespace prt
