// prt_op_run: single operations by name. Operands arrive as untyped host tensors; the operation's own contract checks them.
// On a GPU they travel there and back, between stretches of NaN that must still be there afterwards.
#include <string>
#include <vector>

#include "attention/choice.h"
#include "cuda/device.h"
#include "ops/attention.h"
#include "ops/contents.h"
#include "ops/cuda_table.h"

namespace prt {

namespace {

constexpr int64_t kMost = int64_t{1} << 44;  // elements; keeps every size below an overflow
constexpr int kPoison = 0xff;                // every float format reads it as NaN

struct Call {
  Backend backend;
  std::string op;
  std::vector<Tensor> host, operands;  // as passed; where the operation reads and writes them
  std::vector<double> params;
  bool only_check = false;  // contracts and contents, then the sizes below
  int64_t scratch_bytes = 0;
  std::vector<SampleRow> rows;
  char *scratch_data = nullptr, *rows_data = nullptr;  // on a GPU
  std::vector<float> host_scratch;

  void expect(size_t n_operand, size_t n_param) const {
    check(operands.size() == n_operand && params.size() == n_param, op, " takes ", n_operand, " operands and ", n_param,
          " parameters, got ", operands.size(), " and ", params.size());
  }
  int64_t dim(size_t operand, int i) const {
    check(operands[operand].n_dim > i, op, ": operand ", operand, " has ", operands[operand].n_dim, " dimensions, expected more than ", i);
    return operands[operand].shape[i];
  }
  float number(size_t i) const { return static_cast<float>(params[i]); }

  Tensor scratch(int64_t bytes) {
    scratch_bytes = bytes;
    if (!backend.cuda) {
      host_scratch.assign(static_cast<size_t>(bytes / 4), bits_to_f32(0x7fc00000u));  // nothing may be read before it is written
      return make_tensor(host_scratch.data(), DType::f32, bytes / 4);
    }
    return make_tensor(scratch_data, DType::f32, bytes / 4);
  }
  const SampleRow* in_backend(std::vector<SampleRow> made) {
    rows = std::move(made);
    return rows_data ? reinterpret_cast<const SampleRow*>(rows_data) : rows.data();
  }
  template <class Args>
  void run(void (*operation)(const Backend&, const Args&), const Args& a) const {
    operation(backend, a);
    if (!only_check) return;
    if constexpr (requires { check_contents(a); }) check_contents(a);
    if constexpr (requires { check_contents(op.c_str(), a); }) check_contents(op.c_str(), a);
  }
};

Tensor view(const prt_tensor* t, size_t i) {
  if (!t || !t->data) return {};  // an optional operand that is left out
  check(t->n_dim >= 1 && t->n_dim <= 4, "operand ", i, ": n_dim is ", t->n_dim, ", expected 1..4");
  check(t->dtype >= PRT_F32 && t->dtype <= PRT_I64, "operand ", i, ": dtype is ", t->dtype);
  Tensor v;
  v.data = t->data;
  v.dtype = static_cast<DType>(t->dtype);
  v.n_dim = t->n_dim;
  int64_t size = 1;
  for (int k = 0; k < t->n_dim; ++k) {
    check(t->shape[k] >= 0 && t->shape[k] <= int64_t{1} << 40, "operand ", i, ": shape[", k, "] is ", t->shape[k]);
    check(t->shape[k] <= kMost / size, "operand ", i, ": shape has more than ", kMost, " elements");
    size *= std::max<int64_t>(1, t->shape[k]);
    v.shape[k] = t->shape[k];
  }
  v.row_stride = v.row_size();
  return v;
}

// {logits, tokens, uniforms}, or also {logprobs, top_ids, top_logprobs, seen [n][2], bias_ids, bias_values}, the same lists for every row.
void run_sample(Call& c) {
  const bool full = c.operands.size() > 3;
  c.expect(full ? 9 : 3, full ? 7 : 4);
  const auto &t = c.operands, &host = c.host;
  check_shape("sample", "uniforms", t[2], DType::f32, {c.dim(0, 0)});
  const int64_t n_row = c.dim(0, 0), n_vocab = c.dim(0, 1);
  SampleRow row{c.number(0), c.number(2), c.number(3), 1, 0, 0, static_cast<int32_t>(c.params[1]), 0, 0, nullptr, nullptr, nullptr, 0};
  Sample a{t[0], nullptr, t[1], {}, {}, {}, c.scratch(sample_scratch_bytes(c.backend, n_row, n_vocab))};
  if (full) {
    a.logprobs = t[3], a.top_ids = t[4], a.top_logprobs = t[5];
    row.repetition_penalty = c.number(4), row.presence_penalty = c.number(5), row.frequency_penalty = c.number(6);
    const auto inside = [&](int32_t id) {
      check(id >= 0 && id < n_vocab, "sample: token ", id, " is outside the vocabulary of ", n_vocab);
    };
    if (t[6]) {
      check_shape("sample", "seen", t[6], DType::i32, {-1, 2});
      row.seen = t[6].as<SeenToken>();
      row.n_seen = static_cast<int32_t>(t[6].shape[0]);
      for (int32_t i = 0; i < row.n_seen; ++i) inside(host[6].as<SeenToken>()[i].id);
    }
    if (t[7]) {
      check_shape("sample", "bias_ids", t[7], DType::i32, {-1});
      check_shape("sample", "bias_values", t[8], DType::f32, {t[7].shape[0]});
      row.bias_ids = t[7].as<int32_t>(), row.bias_values = t[8].as<float>();
      row.n_bias = static_cast<int32_t>(t[7].shape[0]);
      for (int32_t i = 0; i < row.n_bias; ++i) inside(host[7].as<int32_t>()[i]);
    }
  }
  std::vector<SampleRow> rows;
  for (int64_t i = 0; i < n_row; ++i) {
    row.uniform = host[2].as<float>()[i];
    rows.push_back(row);
  }
  a.rows = c.in_backend(std::move(rows));
  c.run(sample, a);
}

void dispatch(Call& c) {
  const auto& t = c.operands;
  if (c.op == "embedding") {
    c.expect(3, 0);
    c.run(embedding, {t[0], t[1], t[2]});
  } else if (c.op == "rms_norm") {
    c.expect(3, 1);
    c.run(rms_norm, {t[0], t[1], t[2], c.number(0)});
  } else if (c.op == "linear") {
    c.expect(5, 3);
    const int64_t n_row = c.dim(1, 0), n_in = c.dim(1, 1), n_out = c.dim(2, 0);
    check(n_row <= kMost / std::max<int64_t>(1, n_out), "linear: ", n_row, " x ", n_out, " results are too many");
    const bool gated = c.params[1] != 0;
    c.run(linear, {t[0], t[1], t[2], t[3], c.params[0] != 0, gated, t[4], c.number(2),
                   c.scratch(linear_scratch_bytes(c.backend, n_row, n_in, n_out, static_cast<bool>(t[4]), gated))});
  } else if (c.op == "rope_angles") {
    c.expect(3, 1);
    c.run(rope_angles, {t[0], t[1], t[2], c.number(0)});
  } else if (c.op == "rope_kv_write") {
    c.expect(7, 2);
    c.run(rope_kv_write, {t[0], t[1], t[2], c.number(1), t[3], t[4], t[5], t[6], static_cast<int64_t>(c.params[0])});
  } else if (c.op == "attention_prefill" || c.op == "attention_decode") {
    const bool more = c.operands.size() > 7 && c.op == "attention_decode";
    c.expect(more ? 10 : 7, 2);
    Attention a{t[0], t[1], t[2], t[3], t[4], t[5], t[6], static_cast<int64_t>(c.params[0]), c.number(1), {}};
    if (more) a.scores = t[7], a.log_total = t[8], a.state = t[9];
    check_attention(c.backend, c.op.c_str(), a);
    const int64_t d = a.k_pages.shape[3];
    a.scratch = c.scratch(attention_scratch_bytes(c.backend, a.kv_len.shape[0], a.page_table.shape[1] * kPageTokens, a.q.shape[1] / d,
                                                  a.k_pages.shape[1], d));
    c.run(c.op == "attention_prefill" ? attention_prefill : attention_decode, a);
  } else if (c.op == "silu_mul") {
    c.expect(2, 0);
    c.run(silu_mul, {t[0], t[1]});
  } else if (c.op == "target_logprob") {
    c.expect(3, 0);
    c.run(target_logprob, {t[0], t[1], t[2]});
  } else if (c.op == "sample") {
    run_sample(c);
  } else if (c.op == "cluster") {
    c.expect(8, 2);
    const int64_t n_page = c.dim(2, 1), n_slot = c.dim(3, 2), d = c.dim(0, 3);
    check(n_page <= kMaxSegmentPages && n_slot <= kPageTokens && d <= kMaxHead, "cluster: the segment is too large");
    c.run(cluster, {t[0],
                    t[1],
                    t[2],
                    {t[3], t[4], t[5], t[6], t[7]},
                    static_cast<int64_t>(c.params[0]),
                    static_cast<uint64_t>(c.params[1]),
                    c.scratch(cluster_scratch_bytes(c.backend, n_page, n_slot, d))});
  } else if (c.op == "uncluster") {
    c.expect(5, 0);
    const int64_t n_page = c.dim(3, 0), d = c.dim(0, 3);
    check(n_page <= kMaxSegmentPages && d <= kMaxHead, "uncluster: the segment is too large");
    c.run(uncluster, {t[0], t[1], t[2], t[3], t[4], c.scratch(uncluster_scratch_bytes(n_page, d))});
  } else if (c.op == "select") {
    c.expect(c.operands.size() > 14 ? 16 : 14, 4);
    const int64_t d = c.dim(7, 3), h_q = c.dim(6, 1) / std::max<int64_t>(1, d), h_kv = std::max<int64_t>(1, c.dim(7, 1)),
                  max_pages = c.dim(8, 1), n_slot = c.dim(11, 2);
    check(n_slot <= kPageTokens && c.dim(6, 0) <= 1 << 20 && h_q <= 1 << 10 && max_pages <= 1 << 20, "select: the operands are too large");
    c.run(select, {t[0],
                   t[1],
                   t[2],
                   t[3],
                   t[4],
                   t[5],
                   t[6],
                   t[7],
                   t[8],
                   t[9],
                   t[10],
                   {t[11], t[12], {}, t[13], {}},
                   c.number(0),
                   c.number(1),
                   c.number(2),
                   static_cast<Estimator>(static_cast<int32_t>(c.params[3])),
                   c.scratch(select_scratch_bytes(c.backend, c.dim(6, 0), h_q, h_kv, max_pages, n_slot)),
                   t.size() > 14 ? t[14] : Tensor{},
                   t.size() > 14 ? t[15] : Tensor{}});
  } else if (c.op == "sparse_attention") {
    c.expect(c.operands.size() > 10 ? 11 : 10, 1);
    const int64_t d = c.dim(2, 3), h_q = c.dim(1, 1) / std::max<int64_t>(1, d), h_kv = std::max<int64_t>(1, c.dim(2, 1)),
                  max_pages = c.dim(4, 1);
    check(d <= kMaxHead && c.dim(1, 0) <= 1 << 20 && h_q <= 1 << 10 && max_pages <= 1 << 20,
          "sparse_attention: the operands are too large");
    c.run(sparse_attention,
          {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], c.number(0),
           c.scratch(sparse_attention_scratch_bytes(c.backend, c.dim(1, 0), max_pages, h_q, h_kv, d)), t.size() > 10 ? t[10] : Tensor{}});
  } else if (c.op == "score_rows") {
    c.expect(7, 1);
    c.run(score_rows, {t[0], t[1], t[2], t[3], t[4], t[5], t[6], c.number(0)});
  } else if (c.op == "page_bounds") {
    c.expect(4, 0);
    c.run(page_bounds, {t[0], t[1], t[2], t[3]});
  } else if (c.op == "score_blocks") {
    c.expect(7, 1);
    c.run(score_blocks, {t[0], t[1], t[2], t[3], t[4], t[5], t[6], c.number(0)});
  } else if (c.op == "top_rows") {
    c.expect(8, 9);
    const auto whole = [&](size_t i) { return static_cast<int64_t>(c.params[i]); };
    const int64_t n_entry = c.dim(6, 0), h_kv = c.dim(0, 1), room = t[4] ? c.dim(4, 2) : 0;
    check(n_entry <= 1 << 20 && h_kv <= 1 << 10 && room <= 1 << 24, "top_rows: the operands are too large");
    c.run(top_rows,
          {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], whole(0), whole(1), whole(2), c.number(3), c.number(4), whole(5), whole(6),
           static_cast<Vote>(static_cast<int32_t>(c.params[7])), whole(8), c.scratch(top_rows_scratch_bytes(n_entry, h_kv, room))});
  } else if (c.op == "reuse") {
    c.expect(9, 3);
    c.run(reuse, {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], static_cast<int64_t>(c.params[0]),
                  static_cast<int64_t>(c.params[1]), c.number(2)});
  } else if (c.op == "count_rows") {
    c.expect(11, 5);
    c.run(count_rows, {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], static_cast<int64_t>(c.params[0]),
                       static_cast<int64_t>(c.params[1]), static_cast<int64_t>(c.params[2]), c.number(3), c.number(4)});
  } else if (c.op == "rope_shift") {
    c.expect(3, 0);
    c.run(rope_shift, {t[0], t[1], t[2]});
  } else if (c.op == "page_copy") {
    c.expect(4, 0);
    c.run(page_copy, {t[0], t[1], t[2], t[3]});
  } else {
    fail(PRT_INVALID_ARGUMENT, "operation '", c.op, "' is unknown");
  }
}

// The table with nothing behind the contracts.
CudaOps without_kernels(const CudaOps& ops) {
  CudaOps none = ops;  // the sizes of scratch memory stay
  none.embedding = [](const CudaStream&, const Embedding&) {};
  none.rms_norm = [](const CudaStream&, const RmsNorm&) {};
  none.linear = [](const CudaStream&, const Linear&) {};
  none.rope_angles = [](const CudaStream&, const RopeAngles&) {};
  none.rope_kv_write = [](const CudaStream&, const RopeKvWrite&) {};
  none.attention_prefill = none.attention_decode = [](const CudaStream&, const Attention&) {};
  none.silu_mul = [](const CudaStream&, const SiluMul&) {};
  none.target_logprob = [](const CudaStream&, const TargetLogprob&) {};
  none.sample = [](const CudaStream&, const Sample&) {};
  none.page_copy = [](const CudaStream&, const PageCopy&) {};
  none.cluster = [](const CudaStream&, const Cluster&) {};
  none.uncluster = [](const CudaStream&, const Uncluster&) {};
  none.select = [](const CudaStream&, const Select&) {};
  none.sparse_attention = [](const CudaStream&, const SparseAttention&) {};
  none.score_rows = [](const CudaStream&, const ScoreRows&) {};
  none.page_bounds = [](const CudaStream&, const PageBounds&) {};
  none.score_blocks = [](const CudaStream&, const ScoreBlocks&) {};
  none.top_rows = [](const CudaStream&, const TopRows&) {};
  none.reuse = [](const CudaStream&, const Reuse&) {};
  none.count_rows = [](const CudaStream&, const CountRows&) {};
  none.rope_shift = [](const CudaStream&, const RopeShift&) {};
  return none;
}

// Device memory with the operands, the scratch and the rows of `sample`; a gap before, between and after.
class OnDevice {
 public:
  OnDevice(const CudaStream& s, const Call& c) : s_(s) {
    for (const bool measure : {true, false}) {
      Arena arena(measure ? nullptr : memory_.data());
      pieces_.clear();
      used_.clear();
      const auto piece = [&](int64_t bytes) {
        arena.take(DType::f32, Arena::kAlign / 4);
        used_.push_back({arena.used(), bytes});
        return arena.take(DType::f16, (bytes + 1) / 2).as<char>();
      };
      for (size_t i = 0; i < c.host.size(); ++i) {
        size_t same = 0;  // an array that is passed twice is one on the device too
        while (same < i && c.host[same].data != c.host[i].data) ++same;
        pieces_.push_back(!c.host[i] ? nullptr : same < i ? pieces_[same] : piece(c.host[i].bytes()));
      }
      scratch = piece(c.scratch_bytes);
      rows = piece(static_cast<int64_t>(c.rows.size() * sizeof(SampleRow)));
      arena.take(DType::f32, Arena::kAlign / 4);
      if (measure) memory_ = device_buffer(s.device, arena.used(), "operands of an operation");
    }
    fill(s, memory_.data(), kPoison, memory_.bytes());
    for (size_t i = 0; i < c.host.size(); ++i)
      if (c.host[i].bytes() > 0) copy_to_device(s, pieces_[i], c.host[i].data, c.host[i].bytes());
  }

  Tensor operand(const Tensor& host, size_t i) const {
    Tensor t = host;
    t.data = pieces_[i];
    return t;
  }

  // Waits, checks the gaps and brings the operands back.
  void finish(const Call& c) const {
    std::vector<unsigned char> all(static_cast<size_t>(memory_.bytes()));
    std::vector<uint32_t> counters(CudaStream::kCounters);
    copy_to_host(s_, all.data(), memory_.data(), memory_.bytes());
    copy_to_host(s_, counters.data(), s_.counters, CudaStream::kCounters * 4);
    synchronize(s_);
    size_t at = 0;
    const auto untouched = [&](int64_t end) {
      for (; at < static_cast<size_t>(end); ++at)
        if (all[at] != kPoison) fail(PRT_INTERNAL, c.op, ": memory beside an operand was written");
    };
    for (const Used& u : used_) {
      untouched(u.begin);
      at = static_cast<size_t>(u.begin + u.bytes);
    }
    untouched(memory_.bytes());
    for (const uint32_t n : counters) check(n == 0, c.op, ": a counter is ", n, " after the operation");
    for (size_t i = 0; i < c.host.size(); ++i)
      if (c.host[i].bytes() > 0)
        std::memcpy(c.host[i].data, all.data() + (pieces_[i] - memory_.data()), static_cast<size_t>(c.host[i].bytes()));
  }

  char *scratch = nullptr, *rows = nullptr;

 private:
  struct Used {
    int64_t begin, bytes;
  };
  const CudaStream& s_;
  Buffer memory_;
  std::vector<char*> pieces_;
  std::vector<Used> used_;
};

}  // namespace

void run_op(const Backend& b, const char* op, prt_tensor* const* operands, int32_t n_operand, const double* params, int32_t n_param) {
  check(n_operand >= 0 && n_operand <= 16, "n_operand is ", n_operand, ", expected 0..16");
  check(n_param >= 0 && n_param <= 16, "n_param is ", n_param, ", expected 0..16");
  check(n_operand == 0 || operands, "operands is NULL");
  check(n_param == 0 || params, "params is NULL");
  Call c;
  c.backend = b;
  c.op = op;
  c.params.assign(params, params + n_param);
  for (int32_t i = 0; i < n_operand; ++i) c.host.push_back(view(operands[i], static_cast<size_t>(i)));
  c.operands = c.host;
  if (!b.cuda) return dispatch(c);

  // Contents can only be looked at here, and only once the shapes are known to be right.
  const CudaOps none = without_kernels(*b.cuda);
  c.backend.cuda = &none;
  c.only_check = true;
  dispatch(c);
  const OnDevice device(*b.stream, c);
  c.backend = b;
  c.only_check = false;
  for (size_t i = 0; i < c.host.size(); ++i) c.operands[i] = device.operand(c.host[i], i);
  c.scratch_data = device.scratch;
  c.rows_data = device.rows;
  if (!c.rows.empty()) {
    // The rows hold addresses of device memory: they are made again, copied, and then used.
    Call rows = c;
    rows.backend.cuda = &none;
    dispatch(rows);
    copy_to_device(*b.stream, device.rows, rows.rows.data(), static_cast<int64_t>(rows.rows.size() * sizeof(SampleRow)));
  }
  dispatch(c);
  device.finish(c);
}

}  // namespace prt
