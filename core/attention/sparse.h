// Sparse decode attention: an index over closed stretches of the KV cache, a choice of rows per kv head, and attention over that choice.
//
// A closed segment is a run of whole pages of one sequence, 32 as a rule (2048 tokens), whose rows were clustered per kv head and then
// stored cluster after cluster, so that a cluster is a range of rows. Attention does not care about the order of past rows: their positions
// are in the keys. All arrays of the index have one entry per KV page id: cluster j of a segment is in slot j % n_slot of the
// segment's page j / n_slot. An index therefore lives, is shared and dies with its pages and needs no bookkeeping of its own.
#pragma once
#include "ops/ops.h"

namespace prt {

constexpr int64_t kMaxSegmentPages = 1024;  // rows of a segment are numbered in 16 bits

struct ClusterIndex {
  Tensor centroid;  // [n_page][h_kv][n_slot][d_head] f8 (e4m3, saturated): mean key
  Tensor variance;  // [n_page][h_kv][n_slot][d_head] f8: of the keys about the centroid, per dimension
  Tensor value;  // [n_page][h_kv][n_slot][d_head] f8: mean value
  Tensor range;  // [n_page][h_kv][n_slot][2] i32: first row, counted from the first row of the slot's page; number of rows, may be 0
  Tensor order;  // [n_page][h_kv][64] u16: the row of the segment, before, of what is now stored here
};

// Lloyd's K-means of the keys of each segment and kv head, Euclidean (Tactic, section 4.1), then K and V rows change places.
// The centroids begin as keys drawn with `seed`; iterations end when no key changes its cluster. An emptied cluster stays empty.
struct Cluster {
  Tensor k_pages, v_pages;  // [n_page][h_kv][64][d_head], rows are permuted within a segment
  Tensor pages;  // [n_segment][n] i32: the pages of each segment, no page twice
  ClusterIndex index;
  int64_t iterations;
  uint64_t seed;
  Tensor scratch;  // [cluster_scratch_bytes() / 4] f32
};
void cluster(const Backend&, const Cluster&);
int64_t cluster_scratch_bytes(const Backend&, int64_t n_page, int64_t n_slot, int64_t d_head);  // for segments of n_page pages or fewer

// Takes a closed segment apart: dst[i] = page i of the segment as it was before clustering, for the first pages only where dst is shorter.
struct Uncluster {
  Tensor k_pages, v_pages;  // [n_page][h_kv][64][d_head]
  Tensor order;  // of the index
  Tensor src;  // [n] i32: the pages of the segment
  Tensor dst;  // [m] i32, m <= n: other pages, or the same
  Tensor scratch;  // [uncluster_scratch_bytes() / 4] f32
};
void uncluster(const Backend&, const Uncluster&);
int64_t uncluster_scratch_bytes(int64_t n_page, int64_t d_head);

// How the softmax mass of a cluster of n keys with centroid c is estimated, m = q.c scale:
enum class Estimator : int32_t {
  fit = 0,  // as published: y(x) = a / x + b over the rows sorted by m, through two sampled stretches; the head of the curve is exact
  moment = 1,  // n exp(m + scale^2 / 2 sum_i q_i^2 var_i); the best of the ranking are counted exactly
};

// Which rows each kv head attends to. Rows outside the closed segments (sinks, recent window) are always taken, and their exact mass
// counts. Per query head as few clusters, those with the most mass per row, as reach the share `p` of the mass, or before that the share
// `budget` of the clustered rows; the kv head takes the union of its group.
//
// `moment`: the first kFewClusters of the ranking are counted exactly, or the first kExactClusters, and put in order by what they are
// worth. A head that takes all of these and has not reached p goes on by the estimates, scaled by what the exactly counted ones turned out
// to be worth. In the tail, those that are counted and not taken have the mass that was counted.
struct Select {
  Tensor ranges;  // out [n_entry][h_kv][max_range][2] i32, ascending: first row of the sequence as stored; rows up to here, of all ranges
  Tensor n_range;  // out [n_entry][h_kv] i32
  Tensor tail;  // out [n_entry][h_q][max_pages * n_slot] f32, or missing: log of the mass that cluster j of the closed pages is given where
                // the kv head does not attend to it; -inf where it does, or if it is empty. What is after the last cluster is not written
  Tensor mass;  // out [n_entry][h_q] f32: the estimated share that the head's own choice reaches
  Tensor true_mass;  // out [n_entry][h_q] f32, or missing: the share of the exact mass that `ranges` holds. Costs a pass over all keys
  Tensor counters;  // in and out [h_kv][kAttentionCounters] i64, or missing: adds to what is there
  Tensor q;  // [n_entry][h_q * d_head] act
  Tensor k_pages;  // [n_page][h_kv][64][d_head]
  Tensor page_table;  // [n_entry][max_pages] i32
  Tensor kv_len;  // [n_entry] i32
  Tensor closed;  // [n_entry][2] i32: first and end of the pages (of the page table) that closed segments fill
  ClusterIndex index;  // without `order` and `value`
  float scale;
  float p, budget;  // 1: no limit
  Estimator estimator;
  Tensor scratch;  // [select_scratch_bytes() / 4] f32
  Tensor state{};  // [n_entry] i32, or missing: ranges, n_range and tail are [n_state], and entry e has row state[e]; -1: it is left alone
  Tensor made{};  // out [n_state] i32, with state: kv_len when the choice was made; n_choice is counted
};
void select(const Backend&, const Select&);
int64_t select_scratch_bytes(const Backend&, int64_t n_entry, int64_t h_q, int64_t h_kv, int64_t max_pages, int64_t n_slot);
inline int64_t select_max_range(int64_t max_pages, int64_t n_slot) { return max_pages * n_slot + 2; }
// With `moment`, so many clusters of a head's ranking have the exact mass of their rows computed: the few, and all of them if these are not
// enough. What they are worth decides which of them are taken.
constexpr int64_t kFewClusters = 16, kExactClusters = 64;
// The share that `moment` stops at: with nine tenths of the odds that p leaves the rest, which is estimated, and a little too low more
// often than too high. So p is reached as often as where every cluster in front is taken, with fewer rows; docs/adr/0013 has the table.
static inline float aimed_share(float p) { return p / (p + 0.9f * (1 - p)); }
// So many clusters a head takes even if sinks and window alone hold the share p, with `moment`: those keys often stand for nothing at all,
// and what the head says then comes from the rest. docs/adr/0013 has the table.
static inline int64_t least_clusters(float p) { return static_cast<int64_t>(__builtin_ceilf(4 * p)); }
// The mass of a cluster of n rows whose scores have the mean m and the variance 2 w, with `moment`: n exp(m + w) while w <= log n, the mean
// of a lognormal, and exp(m + 2 sqrt(w log n)) above it, the largest of n: so wide a distribution has its mean from values that n rows do
// not reach (Derrida's random energy model). On real keys w goes up to 20, log n is 3. The mass in `tail`: with kTailSpread of what the
// spread adds, with `fit` n exp(m). What is left behind are the clusters whose variance says too much, so it is not believed in full;
// docs/adr/0013 has the table.
constexpr float kTailSpread = 0.5f;

// Sums over decode rows, of one kv head. Integers, so that they do not depend on the order in which a GPU adds; shares are in units of
// 2^-32.
struct AttentionCounters {
  int64_t n_step = 0;  // decode rows
  int64_t n_context = 0;  // rows there were
  int64_t n_selected = 0;  // rows of the index that were attended to, after the union over the group
  int64_t n_exact = 0;  // rows that are always attended to: sinks, window, and what is not in the index yet
  int64_t n_mass = 0;  // query heads x steps
  int64_t mass = 0;  // sum of the estimated shares
  int64_t n_true = 0;  // with true_mass: query heads x steps
  int64_t true_mass = 0;  // sum of the measured shares
  int64_t n_reached = 0;  // of them, p or more
  int64_t histogram[PRT_MASS_BINS] = {};  // of the measured shares: bin floor(share x PRT_MASS_BINS), the last one for 1 as well
  int64_t n_full = 0;  // of n_step: all rows were attended to, and none of them chosen
  int64_t n_choice = 0;  // choices made
  int64_t n_compared = 0;  // rows of choices after another one of the same sequence, where both could choose
  int64_t n_overlap = 0;  // of these: rows that the one before had, too
};
constexpr int64_t kAttentionCounters = sizeof(AttentionCounters) / sizeof(int64_t);

// Softmax attention of one query row per entry over ranges of rows, plus the estimated rest if it is given: every cluster of the closed
// pages counts as one more row, of the score tail[j] and the cluster's mean value.
struct SparseAttention {
  Tensor out;  // [n_entry][h_q * d_head] act
  Tensor q;  // [n_entry][h_q * d_head] act
  Tensor k_pages;  // [n_page][h_kv][64][d_head]
  Tensor v_pages;  // [n_page][h_kv][64][d_head]
  Tensor page_table;  // [n_entry][max_pages] i32
  Tensor ranges;  // [n_entry][h_kv][max_range][2] i32, as select writes them
  Tensor n_range;  // [n_entry][h_kv] i32
  Tensor tail;  // [n_entry][h_q][max_pages * n_slot] f32, or missing
  Tensor closed;  // [n_entry][2] i32, with tail
  Tensor value;  // [n_page][h_kv][n_slot][d_head] f8, with tail
  float scale;
  Tensor scratch;  // [sparse_attention_scratch_bytes() / 4] f32
  Tensor state{};  // [n_entry] i32, or missing: ranges, n_range and tail are [n_state], and entry e has row state[e]; -1: it is left alone
};
void sparse_attention(const Backend&, const SparseAttention&);
int64_t sparse_attention_scratch_bytes(const Backend&, int64_t n_entry, int64_t max_pages, int64_t h_q, int64_t h_kv, int64_t d_head);

void check_contents(const Cluster& a);
void check_contents(const Uncluster& a);
void check_contents(const Select& a);
void check_contents(const SparseAttention& a);

// Shared by the contracts.
void check_index(const char* op, const ClusterIndex& index, int64_t n_page, int64_t h_kv, int64_t d);

}  // namespace prt
