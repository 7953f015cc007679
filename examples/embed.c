/* embed.c - a language model inside a C program, with nothing but pyruntime.h.
 *
 * The long form of the ten lines at the top of the header. It makes a tiny model with random weights (a real program reads
 * them from its own files), lets it read a prompt, forks the sequence, and lets both forks write the same continuation:
 *
 *   1. describe the model and create it          prt_model_config, prt_model_create
 *   2. load every tensor that it asks for        prt_model_tensor_count / _get, prt_model_load_tensor, prt_model_finalize
 *   3. create a session: KV pages and threads    prt_session_config, prt_session_create
 *   4. feed the prompt, get the first token      prt_sequence_create, prt_sampler_create, prt_session_step
 *   5. fork, and decode both forks in one batch  prt_sequence_fork
 *   6. what errors look like                     prt_last_error, prt_status_name
 *   7. statistics, clean-up                      prt_session_get_stats, prt_..._release
 *
 * Build: CMakeLists.txt in this folder, pkg-config as README.md shows, or, <package> being the folder of the installed Python package,
 *   cc -std=c99 -I<package>/include embed.c -o embed <package>/libpyruntime.so -Wl,-rpath,<package>
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pyruntime.h"

enum { N_PROMPT = 70, N_NEW = 24, N_FORK = 2 }; /* the prompt is longer than a page of 64 tokens, so that the forks share one */

/* Every call of the interface that can fail returns a status; this is all the error handling a small program needs. */
#define CHECK(call)                                                                                          \
  do {                                                                                                       \
    const prt_status check_status = (call);                                                                  \
    if (check_status != PRT_OK) {                                                                            \
      fprintf(stderr, "%s: %s\n  in %s\n", prt_status_name((int32_t)check_status), prt_last_error(), #call); \
      exit(1);                                                                                               \
    }                                                                                                        \
  } while (0)

/* Repeatable numbers in [-1, 1): the example prints the same tokens on every run. */
static float next_random(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (float)(int32_t)(*state >> 32) / 2147483648.0f;
}

/* Steps 1 and 2. */
static prt_model *make_model(const prt_model_config *config) {
  prt_model *model = NULL;
  int32_t i, count = 0;
  uint64_t state = 1;

  CHECK(prt_model_create(config, "cpu", &model)); /* checks the configuration and takes the memory for the weights */

  /* The model knows what it wants: names, shapes, and the type that each tensor is kept in. Data may come as f32, f16 or bf16
   * and is converted; it is copied, so one buffer serves all tensors. */
  CHECK(prt_model_tensor_count(model, &count));
  for (i = 0; i < count; ++i) {
    prt_tensor_info info = PRT_TENSOR_INFO_INIT;
    int64_t k, n;
    float *data;
    CHECK(prt_model_tensor_get(model, i, &info));
    n = info.shape[0] * (info.n_dim > 1 ? info.shape[1] : 1);
    data = malloc((size_t)n * sizeof *data);
    if (!data) exit(1);
    for (k = 0; k < n; ++k) data[k] = info.n_dim == 1 ? 1.0f : 0.2f * next_random(&state); /* vectors are norms: ones */
    CHECK(prt_model_load_tensor(model, info.name, data, PRT_F32, info.shape, info.n_dim));
    free(data);
  }
  CHECK(prt_model_finalize(model)); /* would name the tensors that are missing */
  return model;
}

/* Step 4: one sequence gets the whole prompt; the token after its last one is sampled. */
static int32_t read_prompt(prt_session *session, int64_t seq, const int32_t *prompt, int32_t n_prompt, prt_sampler *sampler) {
  int32_t token = -1;
  prt_batch batch = PRT_BATCH_INIT;
  batch.n_seq = 1;
  batch.seq = &seq;
  batch.n_token = &n_prompt;
  batch.tokens = prompt;
  batch.samplers = &sampler;
  batch.sampled = &token;
  CHECK(prt_session_step(session, &batch));
  return token;
}

/* Step 5: one token of each sequence per step. All sequences share the pass over the weights, which is what a step costs. */
static void decode(prt_session *session, const int64_t *seq, prt_sampler *const *samplers, int32_t first, int32_t out[N_FORK][N_NEW]) {
  int32_t tokens[N_FORK], sampled[N_FORK], n_token[N_FORK], step, s;
  prt_batch batch = PRT_BATCH_INIT;
  for (s = 0; s < N_FORK; ++s) {
    tokens[s] = first;
    n_token[s] = 1;
  }
  batch.n_seq = N_FORK;
  batch.seq = seq;
  batch.n_token = n_token;
  batch.tokens = tokens;
  batch.samplers = samplers;
  batch.sampled = sampled;
  for (step = 0; step < N_NEW; ++step) {
    for (s = 0; s < N_FORK; ++s) out[s][step] = tokens[s];
    CHECK(prt_session_step(session, &batch));
    memcpy(tokens, sampled, sizeof tokens);
  }
}

/* Step 6: an error is a status and a sentence, and nothing has changed. */
static int show_an_error(prt_session *session, int64_t seq) {
  const int32_t token = 1000000, one = 1;
  int64_t before = 0, after = 0;
  prt_status status;
  prt_batch batch = PRT_BATCH_INIT;
  batch.n_seq = 1;
  batch.seq = &seq;
  batch.n_token = &one;
  batch.tokens = &token;
  CHECK(prt_sequence_length(session, seq, &before));
  status = prt_session_step(session, &batch);
  printf("a deliberate error: %s: %s\n", prt_status_name((int32_t)status), prt_last_error());
  CHECK(prt_sequence_length(session, seq, &after));
  return status == PRT_INVALID_ARGUMENT && before == after;
}

int main(void) {
  prt_model_config config = PRT_MODEL_CONFIG_INIT; /* start from the defaults: they also set struct_size */
  prt_session_config session_config = PRT_SESSION_CONFIG_INIT;
  prt_session_stats stats = PRT_SESSION_STATS_INIT;
  prt_sampling greedy = PRT_SAMPLING_INIT;
  prt_model *model;
  prt_session *session = NULL;
  prt_sampler *samplers[N_FORK] = {NULL, NULL};
  int64_t seq[N_FORK], weight_bytes = 0;
  int32_t prompt[N_PROMPT], out[N_FORK][N_NEW], first, i;
  int same;

  /* The header and the library may come from different versions: the ABI number says whether they fit. */
  if (prt_abi_version() != PRT_ABI_VERSION) {
    fprintf(stderr, "the library has ABI %u, this program was built for %u\n", (unsigned)prt_abi_version(), (unsigned)PRT_ABI_VERSION);
    return 1;
  }
  printf("pyruntime %s\n", prt_version());

  config.n_layer = 2;
  config.h_q = 4;  /* four query heads share ... */
  config.h_kv = 2; /* ... two kv heads */
  config.d_head = 16;
  config.d_model = 64;
  config.d_ff = 160;
  config.n_vocab = 300;
  config.max_position = 512;
  model = make_model(&config);
  CHECK(prt_model_weight_bytes(model, &weight_bytes));
  printf("model: %lld bytes of weights\n", (long long)weight_bytes);

  session_config.max_context = 256; /* tokens of one sequence */
  session_config.n_page = 8;        /* room for 8 x 64 tokens in all sequences together */
  session_config.n_threads = 2;
  CHECK(prt_session_create(model, &session_config, &session));
  prt_model_release(model); /* the session keeps it alive */

  for (i = 0; i < N_PROMPT; ++i) prompt[i] = (i * i + 7) % config.n_vocab;
  greedy.temperature = 0.0f;
  for (i = 0; i < N_FORK; ++i) CHECK(prt_sampler_create(config.n_vocab, &greedy, &samplers[i])); /* one for each sequence */
  CHECK(prt_sequence_create(session, &seq[0]));
  first = read_prompt(session, seq[0], prompt, N_PROMPT, samplers[0]);

  CHECK(prt_sequence_fork(session, seq[0], &seq[1])); /* no copy: both hold the same pages until one writes into the last */
  decode(session, seq, samplers, first, out);
  same = memcmp(out[0], out[1], sizeof out[0]) == 0;
  printf("tokens:");
  for (i = 0; i < N_NEW; ++i) printf(" %d", (int)out[0][i]);
  printf("\nboth forks agree: %s\n", same ? "yes" : "no");

  same &= show_an_error(session, seq[0]);

  CHECK(prt_session_get_stats(session, &stats));
  printf("pages: %d of %d in use, %lld copied on write, %lld bytes each\n", (int)(stats.n_page - stats.n_page_free), (int)stats.n_page,
         (long long)stats.n_page_copy, (long long)stats.page_bytes);
  printf("prefill: %lld tokens in %.3f ms; decode: %lld tokens in %.3f ms; %d threads\n", (long long)stats.n_prefill_token,
         1e3 * stats.prefill_seconds, (long long)stats.n_decode_token, 1e3 * stats.decode_seconds, (int)stats.n_threads);

  for (i = 0; i < N_FORK; ++i) {
    CHECK(prt_sequence_free(session, seq[i])); /* gives its pages back */
    prt_sampler_release(samplers[i]);
  }
  prt_session_release(session);
  return same ? 0 : 1;
}
