// The C interface: handles, and guard(), where every exception ends.
#include <memory>
#include <new>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "base/abi.h"
#include "base/log.h"
#include "cuda/device.h"
#include "runtime/session.h"

using namespace prt;

struct prt_model {
  std::shared_ptr<Model> model;
};
struct prt_session {
  std::shared_ptr<const Model> model;
  Session session;
};

#ifndef PRT_BUILD_INFO
#define PRT_BUILD_INFO ""
#endif

namespace {

thread_local std::string last_error;

prt_status fail_with(prt_status status, const char* what) noexcept {
  try {
    last_error = what;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <class F>
prt_status guard(F&& body) noexcept {
  try {
    last_error.clear();
    body();
    return PRT_OK;
  } catch (const Error& e) {
    return fail_with(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return fail_with(PRT_OUT_OF_MEMORY, "out of host memory");
  } catch (const std::exception& e) {
    return fail_with(PRT_INTERNAL, e.what());
  } catch (...) {
    return fail_with(PRT_INTERNAL, "unknown exception");
  }
}

template <class T>
T& deref(T* p, const char* what) {
  check(p != nullptr, what, " is NULL");
  return *p;
}

int32_t device_index(const std::string& device) {
  if (device.rfind("cuda", 0) == 0) return cuda_require(device);
  check(device == "cpu", "device '", device, "' is unknown, expected \"cpu\" or \"cuda:N\"");
  return Weights::kHost;
}

Model& open_model(prt_model* m) {
  Model& model = *deref(m, "model").model;
  if (model.finalized) fail(PRT_BAD_STATE, "the model is finalized: its tensors can no longer be loaded");
  return model;
}

// Runs body on the session while holding its lock.
template <class F>
prt_status with_session(prt_session* s, F&& body) {
  return guard([&] {
    Session& session = deref(s, "session").session;
    const std::lock_guard<std::mutex> lock(session.mutex);
    body(session);
  });
}

void check_matches(const Weights::Entry& e, const int64_t* shape, int32_t n_dim) {
  check(shape != nullptr, "shape of tensor '", e.name, "' is NULL");
  bool same = n_dim == e.view.n_dim;
  for (int32_t i = 0; same && i < n_dim; ++i) same = shape[i] == e.view.shape[i];
  if (same) return;
  std::string given = "[";
  for (int32_t i = 0; i < std::min(std::max(n_dim, 0), 8); ++i) given += (i ? "][" : "") + std::to_string(shape[i]);
  fail(PRT_INVALID_ARGUMENT, "tensor '", e.name, "' has shape ", given, "], the model expects ", shape_text(e.view));
}

template <size_t N>
void put(char (&to)[N], const std::string& from) {
  const size_t n = std::min(from.size(), N - 1);
  std::memcpy(to, from.data(), n);
  to[n] = 0;
}

}  // namespace

extern "C" {

const char* prt_version(void) { return PRT_VERSION; }
uint32_t prt_abi_version(void) { return PRT_ABI_VERSION; }
const char* prt_last_error(void) { return last_error.c_str(); }
const char* prt_build_info(void) { return PRT_BUILD_INFO; }

const char* prt_status_name(int32_t status) {
  switch (status) {
    case PRT_OK: return "PRT_OK";
    case PRT_INVALID_ARGUMENT: return "PRT_INVALID_ARGUMENT";
    case PRT_OUT_OF_MEMORY: return "PRT_OUT_OF_MEMORY";
    case PRT_OUT_OF_PAGES: return "PRT_OUT_OF_PAGES";
    case PRT_UNSUPPORTED: return "PRT_UNSUPPORTED";
    case PRT_BAD_STATE: return "PRT_BAD_STATE";
    case PRT_ABORTED: return "PRT_ABORTED";
    case PRT_DEVICE_ERROR: return "PRT_DEVICE_ERROR";
    case PRT_IO_ERROR: return "PRT_IO_ERROR";
    case PRT_INTERNAL: return "PRT_INTERNAL";
    default: return "unknown status";
  }
}

prt_status prt_set_log(prt_log_fn fn, void* user, int32_t max_level) {
  return guard([&] {
    check(max_level >= PRT_LOG_NONE && max_level <= PRT_LOG_DEBUG, "max_level is ", max_level, ", expected 0..4");
    log_set(fn, user, max_level);
  });
}

prt_status prt_device_count(int32_t* count) {
  return guard([&] { deref(count, "count") = 1 + cuda_device_count(); });
}

prt_status prt_device_get(int32_t i, prt_device_info* info) {
  return guard([&] {
    const int32_t n = 1 + cuda_device_count();
    check(i >= 0 && i < n, "device ", i, " does not exist, there are ", n);
    prt_device_info d = PRT_DEVICE_INFO_INIT;
    if (i == 0) {
      d.usable = 1;
      d.memory_total = host_memory_total();
      d.memory_free = host_memory_free();
      put(d.id, "cpu");
      put(d.name, cpu_model_name());
      put(d.features, text(isa_name(isa_best()), ", ", usable_cores(), " cores"));
    } else {
      cuda_device_info(i - 1, d);
    }
    write_struct(info, d, "info");
  });
}

prt_status prt_model_create(const prt_model_config* config, const char* device, prt_model** out) {
  return guard([&] {
    deref(out, "out") = nullptr;
    const std::string where = &deref(device, "device");
    const int32_t index = device_index(where);
    *out = new prt_model{std::make_shared<Model>(read_model_config(config), index)};
  });
}

prt_status prt_model_tensor_count(prt_model* model, int32_t* count) {
  return guard([&] { deref(count, "count") = static_cast<int32_t>(deref(model, "model").model->weights.entries().size()); });
}

prt_status prt_model_tensor_get(prt_model* model, int32_t i, prt_tensor_info* info) {
  return guard([&] {
    const auto& entries = deref(model, "model").model->weights.entries();
    check(i >= 0 && i < static_cast<int32_t>(entries.size()), "tensor ", i, " does not exist, there are ", entries.size());
    const auto& e = entries[static_cast<size_t>(i)];
    prt_tensor_info t = PRT_TENSOR_INFO_INIT;
    t.dtype = static_cast<int32_t>(e.view.dtype);
    t.n_dim = e.view.n_dim;
    t.loaded = e.rows_loaded >= e.view.shape[0];
    t.shape[0] = e.view.shape[0];
    t.shape[1] = e.view.n_dim > 1 ? e.view.shape[1] : 1;
    put(t.name, e.name);
    write_struct(info, t, "info");
  });
}

prt_status prt_model_load_tensor(prt_model* model, const char* name, const void* data, int32_t dtype, const int64_t* shape, int32_t n_dim) {
  return guard([&] {
    Weights& w = open_model(model).weights;
    const auto& e = w.find(&deref(name, "name"));
    check_matches(e, shape, n_dim);
    w.load(e.name, 0, e.view.shape[0], data, float_dtype(dtype, "dtype"));
  });
}

prt_status prt_model_load_rows(prt_model* model, const char* name, int64_t row_begin, int64_t n_row, const void* data, int32_t dtype) {
  return guard([&] { open_model(model).weights.load(&deref(name, "name"), row_begin, n_row, data, float_dtype(dtype, "dtype")); });
}

prt_status prt_model_load_file(prt_model* model, const char* name, const char* path, int64_t offset, int32_t dtype, const int64_t* shape,
                               int32_t n_dim) {
  return guard([&] {
    Weights& w = open_model(model).weights;
    const auto& e = w.find(&deref(name, "name"));
    check_matches(e, shape, n_dim);
    w.load_file(e.name, &deref(path, "path"), offset, float_dtype(dtype, "dtype"));
  });
}

prt_status prt_model_finalize(prt_model* model) {
  return guard([&] {
    Model& m = open_model(model);
    const std::string missing = m.weights.missing();
    if (!missing.empty()) fail(PRT_BAD_STATE, "the model lacks tensors: ", missing);
    m.weights.loaded();
    m.finalized = true;
#if defined(__GLIBC__)
    malloc_trim(0);  // what loading has freed goes back to the system: 8 MB after dequantising a 135M model
#endif
  });
}

prt_status prt_model_weight_bytes(prt_model* model, int64_t* bytes) {
  return guard([&] { deref(bytes, "bytes") = deref(model, "model").model->weights.bytes(); });
}

void prt_model_release(prt_model* model) { delete model; }

prt_status prt_session_create(prt_model* model, const prt_session_config* config, prt_session** out) {
  return guard([&] {
    deref(out, "out") = nullptr;
    const std::shared_ptr<const Model> m = deref(model, "model").model;
    if (!m->finalized) fail(PRT_BAD_STATE, "the model is not finalized: call prt_model_finalize first");
    const prt_session_config defaults = PRT_SESSION_CONFIG_INIT;
    *out = new prt_session{m, Session(m, read_struct(config, defaults, PRT_SIZE_THROUGH(prt_session_config, cpu_isa), "config"))};
  });
}

void prt_session_release(prt_session* session) { delete session; }

prt_status prt_sequence_create(prt_session* session, int64_t* seq) {
  return with_session(session, [&](Session& s) { deref(seq, "seq") = s.pool.create(); });
}

prt_status prt_sequence_fork(prt_session* session, int64_t seq, int64_t* out) {
  return with_session(session, [&](Session& s) { deref(out, "out") = s.fork(seq); });
}

prt_status prt_sequence_truncate(prt_session* session, int64_t seq, int64_t n_token) {
  return with_session(session, [&](Session& s) { s.truncate(seq, n_token); });
}

prt_status prt_sequence_length(prt_session* session, int64_t seq, int64_t* n_token) {
  return with_session(session, [&](Session& s) { deref(n_token, "n_token") = s.pool.at(seq).length; });
}

prt_status prt_sequence_free(prt_session* session, int64_t seq) {
  return with_session(session, [&](Session& s) { s.free(seq); });
}

prt_status prt_sequence_export(prt_session* session, int64_t seq, prt_write_fn write, void* user) {
  return with_session(session, [&](Session& s) {
    deref(write, "write");
    s.export_sequence(seq, [&](const void* data, int64_t bytes) {
      if (write(user, data, bytes) != 0) fail(PRT_ABORTED, "export: the caller stopped it");
    });
  });
}

prt_status prt_sequence_import(prt_session* session, prt_read_fn read, void* user, int64_t* seq) {
  return with_session(session, [&](Session& s) {
    deref(read, "read");
    int64_t& made = deref(seq, "seq");
    made = s.import_sequence([&](void* data, int64_t bytes) {
      if (read(user, data, bytes) != 0) fail(PRT_ABORTED, "import: the caller stopped it");
    });
  });
}

prt_status prt_session_set_attention(prt_session* session, const prt_attention* attention) {
  return with_session(session, [&](Session& s) {
    const prt_attention defaults = PRT_ATTENTION_INIT;
    s.set_attention(read_struct(attention, defaults, PRT_SIZE_THROUGH(prt_attention, seed), "attention"));
  });
}

prt_status prt_attention_page_bytes(prt_model* model, const prt_attention* attention, int64_t* bytes) {
  return guard([&] {
    const ModelConfig& c = deref(model, "model").model->config;
    const prt_attention defaults = PRT_ATTENTION_INIT;
    const prt_attention a = read_struct(attention, defaults, PRT_SIZE_THROUGH(prt_attention, seed), "attention");
    check_attention_config(a);
    const PolicyInfo& info = policy_info(a.policy);
    deref(bytes, "bytes") = info.page_bytes ? info.page_bytes(a, c.n_layer, c.h_kv, c.d_head, c.weight_dtype()) : 0;
  });
}

prt_status prt_attention_parse(const char* text, prt_attention* attention) {
  return guard([&] {
    const prt_attention parsed = parse_attention(&deref(text, "text"));
    check_attention_config(parsed);
    write_struct(attention, parsed, "attention");
  });
}

prt_status prt_session_get_attention_stats(prt_session* session, int32_t layer, int32_t kv_head, prt_attention_stats* stats) {
  return with_session(session, [&](Session& s) {
    const AttentionCounters c = s.attention_counters(layer, kv_head);
    prt_attention_stats v = PRT_ATTENTION_STATS_INIT;
    v.n_step = c.n_step, v.n_context = c.n_context, v.n_selected = c.n_selected, v.n_exact = c.n_exact;
    v.n_mass = c.n_mass, v.mass = static_cast<double>(c.mass) * 0x1p-32, v.n_true = c.n_true,
    v.true_mass = static_cast<double>(c.true_mass) * 0x1p-32, v.n_reached = c.n_reached;
    std::copy_n(c.histogram, PRT_MASS_BINS, v.histogram);
    v.n_full = c.n_full, v.n_choice = c.n_choice, v.n_compared = c.n_compared, v.n_overlap = c.n_overlap;
    write_struct(stats, v, "stats");
  });
}

prt_status prt_sampler_create(int32_t n_vocab, const prt_sampling* sampling, prt_sampler** out) {
  return guard([&] {
    deref(out, "out") = nullptr;
    *out = reinterpret_cast<prt_sampler*>(new Sampler(n_vocab, sampling));
  });
}

prt_status prt_sampler_accept(prt_sampler* sampler, const int32_t* tokens, int32_t n_token, int32_t is_prompt) {
  return guard([&] {
    check(n_token >= 0, "n_token is ", n_token);
    reinterpret_cast<Sampler&>(deref(sampler, "sampler")).accept(tokens, n_token, is_prompt != 0);
  });
}

prt_status prt_sampler_set_bias(prt_sampler* sampler, const int32_t* ids, const float* values, int32_t n) {
  return guard([&] { reinterpret_cast<Sampler&>(deref(sampler, "sampler")).set_bias(ids, values, n); });
}

prt_status prt_sampler_sample(prt_sampler* sampler, const float* logits, int32_t n_vocab, int32_t* token, float* logprob) {
  return guard([&] {
    Sampler& s = reinterpret_cast<Sampler&>(deref(sampler, "sampler"));
    check(n_vocab == s.n_vocab(), "n_vocab is ", n_vocab, ", the sampler was made for ", s.n_vocab());
    check(logits && token, "logits or token is NULL");
    std::vector<float> row(logits, logits + n_vocab);
    const SampleRow params = s.row();
    ThreadPool alone(1);
    std::vector<float> scratch(static_cast<size_t>(sample_scratch_floats(n_vocab)));
    sample(cpu_backend(alone, isa_best()), {make_tensor(row.data(), DType::f32, 1, n_vocab),
                                            &params,
                                            make_tensor(token, DType::i32, 1),
                                            logprob ? make_tensor(logprob, DType::f32, 1) : Tensor{},
                                            {},
                                            {},
                                            make_tensor(scratch.data(), DType::f32, scratch.size())});
    s.drawn(*token);
  });
}

void prt_sampler_release(prt_sampler* sampler) { delete reinterpret_cast<Sampler*>(sampler); }

prt_status prt_session_step(prt_session* session, const prt_batch* batch) {
  return with_session(session, [&](Session& s) {
    const prt_batch defaults = PRT_BATCH_INIT;
    s.step(read_struct(batch, defaults, PRT_SIZE_THROUGH(prt_batch, top_logprobs), "batch"));
  });
}

prt_status prt_session_get_stats(prt_session* session, prt_session_stats* stats) {
  return with_session(session, [&](Session& s) {
    write_struct(
        stats,
        [&] {
          auto v = s.stats();
          v.struct_size = sizeof v;
          return v;
        }(),
        "stats");
  });
}

prt_status prt_op_run(const char* device, const char* op, prt_tensor* const* operands, int32_t n_operand, const double* params,
                      int32_t n_param, int32_t n_threads, const char* isa) {
  return guard([&] {
    const std::string where = &deref(device, "device");
    const int32_t index = device_index(where);
    check(n_threads >= 1 && n_threads <= 1024, "n_threads is ", n_threads, ", expected 1..1024");
    Isa level = isa_best();
    if (isa) level = isa_from_name(isa);
    if (level > isa_best()) fail(PRT_UNSUPPORTED, "this processor supports ", isa_name(isa_best()), " at most, not ", isa_name(level));
    if (index != Weights::kHost) {
      const DeviceScope scope(index);
      const CudaContext context(index);
      return run_op(cuda_backend(context.stream()), &deref(op, "op"), operands, n_operand, params, n_param);
    }
    ThreadPool pool(n_threads);
    run_op(cpu_backend(pool, level), &deref(op, "op"), operands, n_operand, params, n_param);
  });
}

}  // extern "C"
