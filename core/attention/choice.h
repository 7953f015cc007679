// Choosing rows by score, and keeping a choice for the steps after it: the operations that the policies beside Tactic are made of.
//
// A choice is what sparse_attention takes: per kv head the sinks, the chosen rows and the window as ranges of rows, of which the last one
// reaches to the newest row. Choices lie in arrays with one entry for each sequence that is remembered ("state"); the [n_entry] i32 lists
// that name an entry's place there may hold -1, and the operation then leaves the entry alone.
#pragma once
#include "attention/sparse.h"

#ifdef __CUDACC__
#define PRT_HOST_DEVICE __host__ __device__
#else
#define PRT_HOST_DEVICE
#endif

namespace prt {

constexpr int64_t kBlockRows = 16;  // Quest's page

// First row of the window of a choice made when kv_len rows were there: blocks of rows are only known for whole pages.
PRT_HOST_DEVICE static inline int64_t window_begin(int64_t kv_len, int64_t sinks, int64_t window, int64_t unit) {
  int64_t begin = kv_len - window;
  if (unit > 1 && begin > (kv_len - 1) / kPageTokens * kPageTokens) begin = (kv_len - 1) / kPageTokens * kPageTokens;
  return begin > sinks ? begin : sinks < kv_len ? sinks : kv_len;
}

// scores[e][h][i] = scale q.k_i for every row i of the entry; log_total = log sum e^scores. Reads K only.
struct ScoreRows {
  Tensor scores;      // out [n_entry][h_q][room] f32, room >= kv_len
  Tensor log_total;   // out [n_entry][h_q] f32
  Tensor q;           // [n_entry][h_q * d_head] act
  Tensor k_pages;     // [n_page][h_kv][64][d_head]
  Tensor page_table;  // [n_entry][max_pages] i32
  Tensor kv_len;      // [n_entry] i32
  Tensor state;       // [n_entry] i32, or missing: -1: nothing is computed
  float scale;
};
void score_rows(const Backend&, const ScoreRows&);

// Per dimension the least and the largest of the keys of each block of 16 rows, for whole pages.
struct PageBounds {
  Tensor low, high;  // out [n_page][h_kv][4][d_head], as the keys
  Tensor k_pages;    // [n_page][h_kv][64][d_head]
  Tensor pages;      // [n] i32
};
void page_bounds(const Backend&, const PageBounds&);

// Quest's upper bound of the scores of a block: scores[e][h][b] = scale sum_d max(q_d low_d, q_d high_d), for the blocks of the
// (kv_len - 1) / 64 first pages; log_total = log sum e^scores over them.
struct ScoreBlocks {
  Tensor scores;      // out [n_entry][h_q][room] f32, room >= 4 max_pages
  Tensor log_total;   // out [n_entry][h_q] f32
  Tensor q;           // [n_entry][h_q * d_head] act
  Tensor low, high;   // [n_page][h_kv][4][d_head], as the keys
  Tensor page_table;  // [n_entry][max_pages] i32
  Tensor kv_len;      // [n_entry] i32
  float scale;
};
void score_blocks(const Backend&, const ScoreBlocks&);

// How the scores of several query heads become one worth of a row. Shares are those of a head's softmax: e^(score - log_total).
enum class Vote : int32_t {
  first = 0,  // the score for the first head of the group
  max = 1,    // the largest share in the group
  sum = 2,    // the sum of the group's shares: no other choice of as many rows holds more of the heads' mass
  layer = 3,  // the sum of the shares of all heads of the layer: every kv head chooses the same rows
};

// The rows that are worth most, per kv head: n of them, n = k or a fraction of kv_len; of equal ones the first. Or, with p, per query head
// the fewest whose exact mass, that of sinks and window included, reaches the share p, and the union over the group.
struct TopRows {
  Tensor ranges;     // out [n_state][h_kv][max_range][2] i32, as select writes them
  Tensor n_range;    // out [n_state][h_kv] i32
  Tensor made;       // in and out [n_state] i32, or missing: kv_len when the choice was made; 0: there is none
  Tensor counters;   // in and out [h_kv][kAttentionCounters] i64, or missing: adds n_choice, n_compared, n_overlap
  Tensor scores;     // [n_entry][h_q][room] f32, or missing: sinks and window only
  Tensor log_total;  // [n_entry][h_q] f32, with scores
  Tensor kv_len;     // [n_entry] i32
  Tensor state;      // [n_entry] i32, or missing: entry e is state e
  int64_t h_q;
  int64_t unit = 1;  // rows that a score stands for: 1 or kBlockRows
  int64_t k = 0;
  float fraction = 0, p = 0;
  int64_t sinks, window;
  Vote vote = Vote::sum;
  int64_t pool = 1;  // a unit is worth what the best of so many around it is, an odd number
  Tensor scratch;    // [top_rows_scratch_bytes() / 4] f32
};
void top_rows(const Backend&, const TopRows&);
int64_t top_rows_scratch_bytes(int64_t n_entry, int64_t h_kv, int64_t room);
// Ranges there may be: every other unit, or as many as are chosen.
int64_t top_rows_max_range(int64_t max_rows, int64_t unit, int64_t k, float fraction, float p);

// Whether a kept choice serves an entry once more. It does not if there is none; if `stride` tokens have come since it was made; or if
// `check` divides their number and the query's cosine to the one that it was made for is below the threshold. A choice that serves is
// extended to the newest row; else the query is kept for the choice that is to be made.
struct Reuse {
  Tensor anew;     // out [n_entry] i32: state where a choice has to be made, or -1
  Tensor kept;     // out [n_entry] i32: state where the one there is serves, or -1
  Tensor ranges;   // in and out [n_state][h_kv][max_range][2] i32
  Tensor n_range;  // [n_state][h_kv] i32
  Tensor made;     // [n_state] i32
  Tensor query;    // in and out [n_state][w] f32: all heads (w = h_q d_head), or their mean (w = d_head)
  Tensor q;        // [n_entry][h_q * d_head] act
  Tensor kv_len;   // [n_entry] i32
  Tensor state;    // [n_entry] i32
  int64_t stride;  // 0: never because of it
  int64_t check;   // 0: queries are not compared
  float threshold;
};
void reuse(const Backend&, const Reuse&);

// What a step attended to, for AttentionCounters; entries whose state is -1 attended to everything, or with `closed` were counted by
// select.
struct CountRows {
  Tensor counters;   // in and out [h_kv][kAttentionCounters] i64
  Tensor true_mass;  // out [n_entry][h_q] f32, or missing: the share of the exact mass that the ranges hold. Costs a pass over all keys
  Tensor q;          // [n_entry][h_q * d_head] act
  Tensor k_pages;    // [n_page][h_kv][64][d_head]
  Tensor page_table; // [n_entry][max_pages] i32
  Tensor kv_len;     // [n_entry] i32
  Tensor ranges;     // [n_state][h_kv][max_range][2] i32
  Tensor n_range;    // [n_state][h_kv] i32
  Tensor state;      // [n_entry] i32, or missing: entry e is state e
  Tensor made;       // [n_state] i32, or missing: now
  Tensor closed;     // [n_entry][2] i32, or missing: rows outside of these pages are exact; else those outside of sinks and window
  int64_t unit, sinks, window;
  float scale, p;
};
void count_rows(const Backend&, const CountRows&);

// Turns the keys of whole pages to positions `delta` away: as if rope had been applied there. By angle, with the factor 1.
struct RopeShift {
  Tensor k_pages;  // in and out [n_page][h_kv][64][d_head]
  Tensor pages;    // [n] i32, no page twice
  Tensor cos_sin;  // [2][d_head / 2] f32: of delta x the frequencies
};
void rope_shift(const Backend&, const RopeShift&);

void check_contents(const RopeShift& a);
void check_contents(const ScoreRows& a);
void check_contents(const PageBounds& a);
void check_contents(const ScoreBlocks& a);
void check_contents(const TopRows& a);
void check_contents(const Reuse& a);
void check_contents(const CountRows& a);

// Shared by the contracts: lengths and pages of the entries, and the places that state names.
void check_entries(const char* op, const Tensor& kv_len, const Tensor& page_table, int64_t n_page);
void check_state(const char* op, const Tensor& state, int64_t n_entry, int64_t n_state);

}  // namespace prt
