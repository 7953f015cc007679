/* pyruntime.h - the C interface of libpyruntime.
 *
 * A transformer of the Llama family, from token ids to logits or sampled ids, over a paged KV cache.
 * This header is the whole interface and its manual; it compiles as C99 and as C++.
 *
 * In ten lines (examples/embed.c is the long form):
 *
 *     prt_model_config config = PRT_MODEL_CONFIG_INIT;      fill in the numbers of config.json
 *     prt_model *model;      prt_model_create(&config, "cpu", &model);
 *     for every tensor:      prt_model_load_tensor(model, "layers.0.q.weight", data, PRT_BF16, shape, 2);
 *     prt_model_finalize(model);
 *     prt_session_config sc = PRT_SESSION_CONFIG_INIT;
 *     prt_session *session;  prt_session_create(model, &sc, &session);
 *     int64_t seq;           prt_sequence_create(session, &seq);
 *     prt_batch batch = PRT_BATCH_INIT;                     which sequences get which tokens
 *     prt_session_step(session, &batch);                    the forward pass; samples if asked to
 *     prt_session_release(session); prt_model_release(model);
 *
 * Rules that hold everywhere
 *   - A function that can fail returns prt_status. PRT_OK is 0. After any other value prt_last_error() gives a
 *     sentence about what went wrong, for the calling thread, until its next call into this library.
 *   - Nothing here aborts, exits, prints or throws. After an error every handle is as it was before the call.
 *   - Structures that are passed in begin with struct_size; start from the PRT_..._INIT value, which also holds the
 *     defaults. Later versions only append fields, so older callers keep working.
 *   - Handles are counted: a session keeps its model alive, so the order of release does not matter. Releasing NULL
 *     does nothing.
 *   - Threads: a finalized model is read-only and may be shared. A session does one call at a time: a second thread waits.
 *   - Sizes are in elements unless a name says bytes. Arrays are dense, row-major, the last dimension contiguous.
 *   - Letters for shapes: n_tok tokens in a batch, n_seq sequences, h_q / h_kv query / kv heads, d_head, d_model, d_ff,
 *     n_vocab, n_layer, n_page pages of PRT_PAGE_TOKENS tokens.
 */
#ifndef PYRUNTIME_H
#define PYRUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PRT_API __declspec(dllexport)
#else
#define PRT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- versions, errors, log */

#define PRT_ABI_VERSION 1    /* changes only when an older caller would break */
#define PRT_PAGE_TOKENS 64   /* tokens in a KV page */

/* Status codes; the numbers are part of the ABI. */
typedef enum prt_status {
  PRT_OK = 0,
  PRT_INVALID_ARGUMENT = 1, /* an argument is out of range, NULL, or does not go with another */
  PRT_OUT_OF_MEMORY = 2,    /* host or device memory; the text has the bytes needed and free */
  PRT_OUT_OF_PAGES = 3,     /* the KV page pool; the text has the pages needed and free. Nothing changed. */
  PRT_UNSUPPORTED = 4,      /* understood, but this version or build cannot do it */
  PRT_BAD_STATE = 5,        /* the call came too early or too late, e.g. a step before finalize */
  PRT_ABORTED = 6,          /* a callback said stop; the KV cache is as before the call */
  PRT_DEVICE_ERROR = 7,     /* the device is missing, too old, or failed */
  PRT_IO_ERROR = 8,         /* a file could not be read */
  PRT_INTERNAL = 9          /* a defect of the library */
} prt_status;

PRT_API const char *prt_version(void);     /* "0.1.0" */
PRT_API uint32_t prt_abi_version(void);    /* PRT_ABI_VERSION of the library that was loaded */
PRT_API const char *prt_status_name(int32_t status); /* "PRT_OUT_OF_PAGES"; never NULL */
PRT_API const char *prt_last_error(void);  /* text of this thread's last failure; "" if none; never NULL */
/* What was built, as "key=value" lines: compiler, build type, CUDA version and architectures or why there are none. */
PRT_API const char *prt_build_info(void);

typedef enum prt_log_level { PRT_LOG_NONE = 0, PRT_LOG_ERROR = 1, PRT_LOG_WARN = 2, PRT_LOG_INFO = 3, PRT_LOG_DEBUG = 4 } prt_log_level;
typedef void (*prt_log_fn)(void *user, int32_t level, const char *text);
/* Process-wide; the library is silent until this is called. fn NULL silences it again. fn may be called from any thread. */
PRT_API prt_status prt_set_log(prt_log_fn fn, void *user, int32_t max_level);

/* ---------------------------------------------------------------- devices */

typedef struct prt_device_info {
  uint32_t struct_size;
  int32_t is_cuda;       /* 0: the CPU */
  int32_t index;         /* CUDA device index; 0 for the CPU */
  int32_t usable;        /* 0: present but this build cannot run models on it; `note` says why */
  int64_t memory_total;  /* bytes */
  int64_t memory_free;   /* bytes, now */
  char id[16];           /* what prt_model_create takes: "cpu", "cuda:0", ... */
  char name[96];
  char features[96];     /* CPU: instruction sets in use; CUDA: compute capability and driver */
  char note[160];        /* why it is not usable; else empty */
} prt_device_info;
#define PRT_DEVICE_INFO_INIT { sizeof(prt_device_info), 0, 0, 0, 0, 0, {0}, {0}, {0}, {0} }

/* Device 0 is the CPU, CUDA devices follow. A missing driver is not an error: the count is then 1. */
PRT_API prt_status prt_device_count(int32_t *count);
PRT_API prt_status prt_device_get(int32_t i, prt_device_info *info);

/* ---------------------------------------------------------------- model */

typedef enum prt_dtype {
  PRT_F32 = 0,
  PRT_F16 = 1,
  PRT_BF16 = 2,
  PRT_I32 = 3, /* ids; only as an operand of prt_op_run */
  PRT_U16 = 4, /* the same, small ones */
  PRT_F8 = 5,  /* e4m3, up to 448; only there, too */
  PRT_I64 = 6
} prt_dtype;

typedef enum prt_rope_kind {
  PRT_ROPE_DEFAULT = 0,
  PRT_ROPE_LINEAR = 1,   /* positions divided by factor */
  PRT_ROPE_DYNAMIC = 2,  /* NTK-aware base, fixed per session from its max_context, so that chunked and whole prompts agree */
  PRT_ROPE_LLAMA3 = 3,   /* Llama 3.1: low_freq_factor, high_freq_factor, original_max_position */
  PRT_ROPE_YARN = 4      /* beta_fast, beta_slow, attention_factor, original_max_position */
} prt_rope_kind;

/* Everything the forward pass needs to know. Rope is the "rotate half" form on all d_head dimensions. */
typedef struct prt_model_config {
  uint32_t struct_size;
  int32_t dtype;               /* prt_dtype in which weights and KV are kept: PRT_BF16, PRT_F16 or PRT_F32 */
  int32_t n_layer, h_q, h_kv;  /* h_q is a multiple of h_kv */
  int32_t d_head;              /* even, 8..256 */
  int32_t d_model, d_ff, n_vocab;
  int32_t max_position;        /* the context the model was made for, in tokens */
  float norm_eps;
  int32_t tied_embeddings;     /* the output matrix is the embedding: lm_head.weight is not loaded */
  int32_t qkv_bias, o_bias, mlp_bias;
  int32_t qk_norm;             /* RMS norm over d_head on q and k before rope (Qwen3) */
  int32_t sliding_window;      /* attend to the last sliding_window tokens; 0: to all */
  int32_t window_first_layer;  /* layers below this one attend to all tokens */
  int32_t rope_kind;           /* prt_rope_kind */
  float rope_theta;
  float rope_factor;
  int32_t rope_original_max_position; /* 0: max_position */
  float rope_low_freq_factor, rope_high_freq_factor; /* llama3 */
  float rope_beta_fast, rope_beta_slow;              /* yarn */
  float rope_attention_factor; /* yarn: multiplies cos and sin; 0: 0.1 ln(factor) + 1 */
  int32_t rope_truncate;       /* yarn: round the correction range to whole dimensions */
} prt_model_config;
#define PRT_MODEL_CONFIG_INIT { sizeof(prt_model_config), PRT_BF16, 0, 0, 0, 0, 0, 0, 0, 0, 1e-5f, 0, 0, 0, 0, 0, 0, 0, \
    PRT_ROPE_DEFAULT, 10000.0f, 1.0f, 0, 1.0f, 4.0f, 32.0f, 1.0f, 0.0f, 1 }

typedef struct prt_model prt_model;

typedef struct prt_tensor_info {
  uint32_t struct_size;
  int32_t dtype;    /* prt_dtype it is kept in (norms and biases: PRT_F32) */
  int32_t n_dim;    /* 1 or 2 */
  int32_t loaded;   /* all of its rows have been loaded */
  int64_t shape[2]; /* matrices: [out_features][in_features] */
  char name[64];
} prt_tensor_info;
#define PRT_TENSOR_INFO_INIT { sizeof(prt_tensor_info), 0, 0, 0, {0, 0}, {0} }

/* device: "cpu", "cuda:0", "cuda:1", ... Checks the configuration and takes the memory for all weights, there. Models on several devices
 * may live in one process; the calling thread's current CUDA device is left as it was. Beside other CUDA code: where this call makes the
 * device's primary context, it sets the stacks of its threads to 64 bytes, which saves 250 MiB. A program whose own kernels recurse sets
 * what they need with cudaDeviceSetLimit(cudaLimitStackSize, ...) afterwards, or uses the device first: then nothing is changed. */
PRT_API prt_status prt_model_create(const prt_model_config *config, const char *device, prt_model **out);

/* The tensors the model wants, in file order of a typical checkpoint:
 *   embed.weight  norm.weight  lm_head.weight (not when tied)   and for each layer i
 *   layers.i.attn_norm.weight  layers.i.{q,k,v,o}.weight  layers.i.ffn_norm.weight  layers.i.{gate,up,down}.weight
 *   and, where the configuration says so, .bias of these and layers.i.{q_norm,k_norm}.weight */
PRT_API prt_status prt_model_tensor_count(prt_model *model, int32_t *count);
PRT_API prt_status prt_model_tensor_get(prt_model *model, int32_t i, prt_tensor_info *info);

/* Copy a whole tensor in, converting from `dtype` (F32, F16, BF16) with round-to-nearest-even. shape has n_dim entries and
 * must match exactly. Data is copied; different tensors may be loaded from different threads, which on a GPU overlaps reading files with
 * copying to it (8 MiB of pinned memory per thread, until prt_model_finalize). */
PRT_API prt_status prt_model_load_tensor(prt_model *model, const char *name, const void *data, int32_t dtype,
                                         const int64_t *shape, int32_t n_dim);
/* The same for rows [row_begin, row_begin + n_row) only, in order, so that a caller who dequantises needs little memory. */
PRT_API prt_status prt_model_load_rows(prt_model *model, const char *name, int64_t row_begin, int64_t n_row,
                                       const void *data, int32_t dtype);
/* The same, read from `path` (UTF-8) at byte `offset` straight into place: what a safetensors loader wants. */
PRT_API prt_status prt_model_load_file(prt_model *model, const char *name, const char *path, int64_t offset, int32_t dtype,
                                       const int64_t *shape, int32_t n_dim);
/* Fails with the names of missing tensors; afterwards the model is read-only and sessions can be created. */
PRT_API prt_status prt_model_finalize(prt_model *model);
PRT_API prt_status prt_model_weight_bytes(prt_model *model, int64_t *bytes);
PRT_API void prt_model_release(prt_model *model);

/* ---------------------------------------------------------------- session */

typedef struct prt_session prt_session;

/* Called between layers, at most every 20 ms, on the thread that called prt_session_step; return non-zero to stop the step.
 * Must not call back into the session. */
typedef int32_t (*prt_abort_fn)(void *user);
/* Called after each internal chunk of a long step. done and total are tokens of this step. */
typedef void (*prt_progress_fn)(void *user, int64_t done, int64_t total);

typedef struct prt_session_config {
  uint32_t struct_size;
  int32_t max_context;       /* most tokens of one sequence; 0: the model's max_position */
  int32_t n_page;            /* size of the KV page pool; 0: enough for one sequence of max_context */
  int32_t max_batch_tokens;  /* rows per internal chunk (workspace size); longer steps are cut; 0: 512, on a GPU 1024 */
  int32_t n_threads;         /* CPU threads; 0: one per physical core this process may use; without effect on a GPU */
  prt_abort_fn abort;        /* may be NULL */
  prt_progress_fn progress;  /* may be NULL */
  void *user;                /* passed to both */
  const char *cpu_isa;       /* highest CPU instruction set to use: baseline, avx2, avx512, avx512bf16, amx; NULL: the best */
} prt_session_config;
#define PRT_SESSION_CONFIG_INIT { sizeof(prt_session_config), 0, 0, 0, 0, NULL, NULL, NULL, NULL }

PRT_API prt_status prt_session_create(prt_model *model, const prt_session_config *config, prt_session **out);
PRT_API void prt_session_release(prt_session *session);

/* A sequence is a list of KV pages. Ids are never reused within a session. */
PRT_API prt_status prt_sequence_create(prt_session *session, int64_t *seq);
/* A new sequence with the same tokens; pages are shared and copied only when one side writes into them. */
PRT_API prt_status prt_sequence_fork(prt_session *session, int64_t seq, int64_t *out);
/* Forget all tokens after the first n_token. n_token must not exceed the length. */
PRT_API prt_status prt_sequence_truncate(prt_session *session, int64_t seq, int64_t n_token);
PRT_API prt_status prt_sequence_length(prt_session *session, int64_t seq, int64_t *n_token);
PRT_API prt_status prt_sequence_free(prt_session *session, int64_t seq);

/* A sequence as bytes, for a file: the caller's function takes or gives them in order, some megabytes at a time, and returns 0, or anything
 * else to stop with PRT_ABORTED. It runs on the calling thread and must not call into the session. What is written depends on the machine's
 * byte order only, ends with the last row, and never holds rows of other sequences: 88 bytes of numbers, 4 for each stretch of pages that
 * sparse attention has clustered, and prt_session_stats.page_bytes for each page.
 *
 * Import makes a new sequence with the same tokens, of which the caller must know the ids. It refuses rows of another dtype or shape, and of
 * another max_context where the rope depends on it; whether they were made with the same weights is for the caller to know. Where the
 * attention policy in force clusters like the exporting session's did, the same stretches are clustered again, so that the next tokens are
 * those that the exporting session would have made; else rows are as if they came from a prompt. */
typedef int32_t (*prt_write_fn)(void *user, const void *data, int64_t bytes);
typedef int32_t (*prt_read_fn)(void *user, void *data, int64_t bytes); /* fills all of them */
PRT_API prt_status prt_sequence_export(prt_session *session, int64_t seq, prt_write_fn write, void *user);
PRT_API prt_status prt_sequence_import(prt_session *session, prt_read_fn read, void *user, int64_t *seq);

/* ---------------------------------------------------------------- attention */

typedef enum prt_attention_policy {
  PRT_ATTENTION_FULL = 0,   /* every decoded token attends to all tokens before it */
  PRT_ATTENTION_TACTIC = 1, /* ... to the clusters of keys that reach a share p of the softmax mass (arXiv 2502.12216) */
  PRT_ATTENTION_RECYCLED = 2,        /* ... to all, and in the steps after it to the k rows that mattered then (arXiv 2411.05787) */
  PRT_ATTENTION_STREAMING = 3,       /* ... to the first and the last rows (StreamingLLM, arXiv 2309.17453) */
  PRT_ATTENTION_QUEST = 4,           /* ... to the blocks of 16 rows whose keys could score highest (arXiv 2406.10774) */
  PRT_ATTENTION_TOKEN_SELECT = 5,    /* ... to the k rows that all heads of the layer vote for, by exact scores (arXiv 2411.02886) */
  PRT_ATTENTION_ORACLE = 6,          /* ... to the rows that truly matter most; as slow as dense attention, to compare others with */
  PRT_ATTENTION_TACTIC_RECYCLED = 7  /* tactic, whose choice serves again while the query stays similar */
} prt_attention_policy;

typedef enum prt_estimator {
  PRT_ESTIMATOR_FIT = 0,    /* the published curve a / x + b through two sampled stretches */
  PRT_ESTIMATOR_MOMENT = 1  /* the mass of a cluster from its mean and variance, and exactly once it is chosen */
} prt_estimator;

typedef enum prt_group {
  PRT_GROUP_FIRST = 0,      /* the first query head of a kv head speaks for its group */
  PRT_GROUP_MAX = 1         /* a row is worth what it is to the head that wants it most */
} prt_group;

/* Prompts (entries of more than one token) are always dense. Decoded tokens are sparse from min_context on; before that, bit-equal to
 * PRT_ATTENTION_FULL. Rows of a sequence that were clustered are kept in another order: later dense steps over them differ from steps of
 * a session that never clustered by rounding only. */
typedef struct prt_attention {
  uint32_t struct_size;
  int32_t policy;        /* prt_attention_policy */
  float p;               /* share of the softmax mass to reach per query head, (0, 1]; 1: all rows. tactic, oracle without k */
  int32_t cluster;       /* mean rows of a cluster: 4, 8, 16, 32 or 64 */
  int32_t segment;       /* rows that are clustered together, a multiple of 64 from 256; 0: all there are when decoding begins, as published */
  int32_t iterations;    /* most steps of K-means */
  int32_t estimator;     /* prt_estimator */
  int32_t tail;          /* 1: clusters that were not chosen count with their mean value and estimated mass */
  int32_t sinks;         /* first rows that are always attended to; tactic: rounded up to whole pages */
  int32_t window;        /* last rows that are always attended to; rows that are not clustered yet come on top */
  int32_t min_context;   /* decoded tokens that see fewer rows are dense */
  int32_t dense_layers;  /* first layers that stay dense */
  int32_t measure;       /* 1: also compute the true share of the mass, at the cost of dense attention */
  float selected;        /* for benchmarks: the share of the clustered rows that each query head chooses, whatever their mass; 0: by p */
  uint64_t seed;         /* of K-means */
  int32_t k;             /* rows that each kv head chooses beside sinks and window; 0: the policy's own number, oracle: by p */
  float budget;          /* instead of k: so many rows as a share of the context, up to 1; 0: k. tactic: the most that a query head takes of the
                          * clustered rows, whatever p says; 0: 0.18 up to p = 0.9, from there 0.018 / (1 - p); no limit with p = 1 */
  int32_t stride;        /* recycled: every so many decoded tokens one attends to all; 0: 50, with check: never because of this */
  int32_t check;         /* recycled: every so many tokens, a layer whose query is no more like that of its last full step takes one; 0: off */
  float threshold;       /* cosine of two queries from which on they are alike; 0: the policy's own */
  int32_t group;         /* recycled: prt_group */
  int32_t pool;          /* recycled: a row is worth what the best of so many around it is, an odd number; 0: 1 */
  int32_t evict;         /* streaming: 1: rows between sinks and window are given up for good, and the context may grow without end */
} prt_attention;
#define PRT_ATTENTION_INIT { sizeof(prt_attention), PRT_ATTENTION_FULL, 0.9f, 16, 2048, 10, PRT_ESTIMATOR_MOMENT, 1, 16, 128, 1024, 0, 0, 0.0f, 0, \
  0, 0.0f, 0, 0, 0.0f, PRT_GROUP_FIRST, 0, 0 }

/* A policy in words, with the defaults of its authors: "recycled", "recycled:stride=10,k=2048". The names are those of prt_attention_policy
 * in lower case; an option is a field of prt_attention that the policy reads. PRT_INVALID_ARGUMENT names the word that is wrong. */
PRT_API prt_status prt_attention_parse(const char *text, prt_attention *attention);

/* How the session's later steps attend; PRT_ATTENTION_FULL at first. May be changed at any time between steps; what is kept per page serves
 * on unless cluster, segment, iterations, sinks, window or seed change. Clears the counters below. Not with a sliding window.
 * PRT_OUT_OF_MEMORY: nothing has changed; the text says how large a pool leaves room for the index. */
PRT_API prt_status prt_session_set_attention(prt_session *session, const prt_attention *attention);

/* What a policy keeps for each KV page, in bytes, beside prt_session_stats.page_bytes: for choosing an n_page that leaves room for it. 0 for
 * PRT_ATTENTION_FULL. prt_session_set_attention takes that much for every page of the pool, and working memory. */
PRT_API prt_status prt_attention_page_bytes(prt_model *model, const prt_attention *attention, int64_t *bytes);

#define PRT_MASS_BINS 100

/* Sums over all sparse decode rows since prt_session_set_attention, of one layer and kv head or of several. */
typedef struct prt_attention_stats {
  uint32_t struct_size;
  int32_t reserved;
  int64_t n_step;        /* (decode row, layer, kv head) */
  int64_t n_context;     /* rows there were to attend to */
  int64_t n_selected;    /* chosen rows attended to, after the union over the query heads of a kv head; / n_context is the density */
  int64_t n_exact;       /* rows attended to in any case: sinks, window, and those that came after a choice or are in no index yet */
  int64_t n_mass;        /* (decode row, layer, query head) */
  double mass;           /* sum of the shares of the mass that the heads' choices reach, as estimated */
  int64_t n_true;        /* with `measure`: the same for the true share of all rows that were attended to */
  double true_mass;
  int64_t n_reached;     /* of n_true: p or more */
  int64_t histogram[100]; /* of the true shares, from 0 to 1: PRT_MASS_BINS */
  int64_t n_full;        /* of n_step: attended to all rows (recycled); n_true leaves these out */
  int64_t n_choice;      /* choices made; n_step / n_choice is the effective stride */
  int64_t n_compared;    /* rows of choices that followed another one of the same sequence, where both could choose */
  int64_t n_overlap;     /* of n_compared: rows that the choice before had, too */
} prt_attention_stats;
#define PRT_ATTENTION_STATS_INIT { sizeof(prt_attention_stats), 0, 0, 0, 0, 0, 0, 0.0, 0, 0.0, 0, {0}, 0, 0, 0, 0 }

/* layer -1: all layers; kv_head -1: all of them. All zero before prt_session_set_attention. */
PRT_API prt_status prt_session_get_attention_stats(prt_session *session, int32_t layer, int32_t kv_head, prt_attention_stats *stats);

/* ---------------------------------------------------------------- sampling */

/* Order of application: logit bias, repetition, frequency and presence penalties, temperature, top-k, min-p, top-p. */
typedef struct prt_sampling {
  uint32_t struct_size;
  float temperature;         /* 0: greedy, the lowest id wins ties; else > 0 */
  int32_t top_k;             /* 0: off */
  float top_p;               /* (0, 1]; 1: off */
  float min_p;               /* [0, 1]; 0: off. Keeps tokens of at least min_p times the best one's probability */
  float repetition_penalty;  /* > 0; 1: off. Divides positive and multiplies negative logits of tokens seen (prompt included) */
  float presence_penalty;    /* subtracted once from the logits of generated tokens */
  float frequency_penalty;   /* subtracted once per occurrence in the generated tokens */
  int32_t n_bias;            /* logit_bias: bias_values[i] is added to the logit of bias_ids[i]; -INFINITY forbids it */
  const int32_t *bias_ids;
  const float *bias_values;
  uint64_t seed;             /* same seed, same logits: same tokens, whatever else runs in the batch */
} prt_sampling;
#define PRT_SAMPLING_INIT { sizeof(prt_sampling), 1.0f, 0, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 0, NULL, NULL, 0 }

/* A sampler remembers the tokens it has seen (for the penalties) and how many numbers it has drawn. One per sequence. */
typedef struct prt_sampler prt_sampler;
PRT_API prt_status prt_sampler_create(int32_t n_vocab, const prt_sampling *sampling, prt_sampler **out);
/* Tell it tokens that it did not sample itself: is_prompt 1 for the prompt, 0 for text generated elsewhere. */
PRT_API prt_status prt_sampler_accept(prt_sampler *sampler, const int32_t *tokens, int32_t n_token, int32_t is_prompt);
/* Replace the logit bias (bans for min_tokens, grammars); n 0 removes it. */
PRT_API prt_status prt_sampler_set_bias(prt_sampler *sampler, const int32_t *ids, const float *values, int32_t n);
/* Sample from logits [n_vocab] in host memory, e.g. after changing them; the token is accepted. logprob may be NULL. */
PRT_API prt_status prt_sampler_sample(prt_sampler *sampler, const float *logits, int32_t n_vocab, int32_t *token, float *logprob);
PRT_API void prt_sampler_release(prt_sampler *sampler);

/* ---------------------------------------------------------------- step */

/* One forward pass over a ragged batch: entry s appends n_token[s] tokens to sequence seq[s]; prompts (many tokens) and decode
 * rows (one token) mix freely, and a sequence appears at most once. n_tok is the sum of n_token. What comes out is chosen by
 * which pointers are not NULL. On the CPU results do not depend on what else is in the batch, on how a prompt is cut into steps, or
 * on the number of threads. On a GPU the same steps give the same bits every time, but other kernels run for other numbers of rows: what
 * else is in the batch changes the order of additions, and so the last bits of a logit. All pointers are host memory on either.
 * On any failure no sequence has changed. (A shared page that the step had already copied stays copied, so that n_page_free may be one
 * lower per sequence than before.) */
typedef struct prt_batch {
  uint32_t struct_size;
  int32_t n_seq;
  const int64_t *seq;           /* [n_seq] */
  const int32_t *n_token;       /* [n_seq], each >= 1 */
  const int32_t *tokens;        /* [n_tok], ids in 0..n_vocab-1, sequence after sequence */
  const uint8_t *logits_mask;   /* [n_tok] 1: copy this row's logits out; NULL: none */
  float *logits;                /* out [number of ones][n_vocab] */
  const int32_t *targets;       /* [n_tok] token whose log-probability is wanted after this row; -1: none; NULL: none */
  float *target_logprobs;       /* out [n_tok]; rows with target -1 are left alone */
  prt_sampler *const *samplers; /* [n_seq] sample after the last token of entry s; NULL entries: do not; NULL: none */
  int32_t *sampled;             /* out [n_seq]; -1 where the sampler is NULL */
  float *sampled_logprobs;      /* out [n_seq] log-probability under the unmodified distribution; may be NULL */
  int32_t n_top;                /* number of most likely tokens to report for each sampled row; 0: none */
  int32_t *top_ids;             /* out [n_seq][n_top] */
  float *top_logprobs;          /* out [n_seq][n_top], unmodified distribution, descending */
} prt_batch;
#define PRT_BATCH_INIT { sizeof(prt_batch), 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL }

PRT_API prt_status prt_session_step(prt_session *session, const prt_batch *batch);

typedef struct prt_session_stats {
  uint32_t struct_size;
  int32_t n_page, n_page_free, n_page_peak; /* pool size, free now, most in use so far */
  int32_t n_sequence;
  int32_t n_threads;
  int32_t max_context;
  int32_t max_batch_tokens;
  int64_t kv_bytes;            /* address space of the page pool; on the CPU only touched pages are resident */
  int64_t page_bytes;          /* K and V of one page, all layers */
  int64_t workspace_bytes;     /* activations and logits, allocated at creation, on the device */
  int64_t n_step;
  int64_t n_prefill_token;     /* tokens of entries with more than one token */
  int64_t n_decode_token;      /* tokens of entries with one token */
  int64_t n_page_copy;         /* copy-on-write copies made */
  double prefill_seconds, decode_seconds; /* wall time of steps with and without a multi-token entry */
  int64_t index_bytes;         /* address space of what sparse attention keeps per page, and of its workspace */
  int64_t n_clustered_token;   /* rows clustered so far */
  double cluster_seconds;      /* time that took; part of the step in which it was done */
} prt_session_stats;
#define PRT_SESSION_STATS_INIT { sizeof(prt_session_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0.0 }
PRT_API prt_status prt_session_get_stats(prt_session *session, prt_session_stats *stats);

/* ---------------------------------------------------------------- advanced: single operations */

/* Runs one operation of the forward pass by name, for conformance tests and benchmarks. Which operands and parameters an
 * operation takes is written at the top of core/ops/<op>.cc. The list of operations may change between versions. */
typedef struct prt_tensor {
  void *data;        /* host memory */
  int32_t dtype;     /* prt_dtype */
  int32_t n_dim;     /* 1..4 */
  int64_t shape[4];
} prt_tensor;

/* isa: upper bound for the CPU's instruction set, "baseline", "avx2", "avx512", "avx512bf16", "amx", or NULL for the best. */
PRT_API prt_status prt_op_run(const char *device, const char *op, prt_tensor *const *operands, int32_t n_operand,
                              const double *params, int32_t n_param, int32_t n_threads, const char *isa);

#ifdef __cplusplus
}
#endif
#endif
