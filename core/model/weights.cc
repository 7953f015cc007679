#include "model/weights.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

namespace prt {

Weights::Weights(const ModelConfig& config, int32_t device) {
  Arena measure;
  layout(config, measure);
  const int64_t need = measure.used(), free = device == kHost ? host_memory_free() : device_memory_free(device);
  if (need > free)
    fail(PRT_OUT_OF_MEMORY, "the weights need ", need, " bytes (", need >> 20, " MiB) of ",
         device == kHost ? text("host memory") : text("memory on cuda:", device), "; ", free, " bytes (", free >> 20, " MiB) are free");
  buffer_ = device == kHost ? host_buffer(need, "the weights") : device_buffer(device, need, "the weights");
  if (device != kHost) upload_ = std::make_unique<Upload>(device);
  Arena arena(buffer_.data());
  layout(config, arena);
}

void Weights::add(const std::string& name, const Tensor& view) {
  if (!view) return;  // the model does not have it, or the layout is only being measured
  index_[name] = entries_.size();
  entries_.push_back({name, view, 0});
}

void Weights::layout(const ModelConfig& c, Arena& arena) {
  const DType w = c.weight_dtype(), f = DType::f32;
  const int64_t q = c.q_size(), kv = c.kv_size();
  layers.assign(static_cast<size_t>(c.n_layer), {});
  embed = arena.take(w, c.n_vocab, c.d_model);
  add("embed.weight", embed);
  for (int32_t i = 0; i < c.n_layer; ++i) {
    LayerWeights& l = layers[static_cast<size_t>(i)];
    const std::string p = "layers." + std::to_string(i) + ".";
    l.attn_norm = arena.take(f, c.d_model);
    l.qkv = arena.take(w, c.qkv_size(), c.d_model);
    if (c.qkv_bias) l.qkv_bias = arena.take(f, c.qkv_size());
    if (c.qk_norm) {
      l.q_norm = arena.take(f, c.d_head);
      l.k_norm = arena.take(f, c.d_head);
    }
    l.o = arena.take(w, c.d_model, q);
    if (c.o_bias) l.o_bias = arena.take(f, c.d_model);
    l.ffn_norm = arena.take(f, c.d_model);
    l.gate_up = arena.take(w, 2 * int64_t{c.d_ff}, c.d_model);
    if (c.mlp_bias) l.gate_up_bias = arena.take(f, 2 * int64_t{c.d_ff});
    l.down = arena.take(w, c.d_model, c.d_ff);
    if (c.mlp_bias) l.down_bias = arena.take(f, c.d_model);

    const auto part = [](const Tensor& t, int64_t begin, int64_t n) { return t ? t.rows(begin, n) : t; };
    add(p + "attn_norm.weight", l.attn_norm);
    add(p + "q.weight", part(l.qkv, 0, q));
    add(p + "q.bias", part(l.qkv_bias, 0, q));
    add(p + "k.weight", part(l.qkv, q, kv));
    add(p + "k.bias", part(l.qkv_bias, q, kv));
    add(p + "v.weight", part(l.qkv, q + kv, kv));
    add(p + "v.bias", part(l.qkv_bias, q + kv, kv));
    add(p + "q_norm.weight", l.q_norm);
    add(p + "k_norm.weight", l.k_norm);
    add(p + "o.weight", l.o);
    add(p + "o.bias", l.o_bias);
    add(p + "ffn_norm.weight", l.ffn_norm);
    add(p + "gate.weight", part(l.gate_up, 0, c.d_ff));
    add(p + "gate.bias", part(l.gate_up_bias, 0, c.d_ff));
    add(p + "up.weight", part(l.gate_up, c.d_ff, c.d_ff));
    add(p + "up.bias", part(l.gate_up_bias, c.d_ff, c.d_ff));
    add(p + "down.weight", l.down);
    add(p + "down.bias", l.down_bias);
  }
  norm = arena.take(f, c.d_model);
  add("norm.weight", norm);
  if (c.tied_embeddings) {
    lm_head = embed;
  } else {
    lm_head = arena.take(w, c.n_vocab, c.d_model);
    add("lm_head.weight", lm_head);
  }
}

size_t Weights::index_of(const std::string& name) const {
  const auto it = index_.find(name);
  check(it != index_.end(), "the model has no tensor '", name, "'; prt_model_tensor_get lists the names");
  return it->second;
}

const Weights::Entry& Weights::find(const std::string& name) const { return entries_[index_of(name)]; }

namespace {
void convert(void* to, DType to_type, const void* from, DType from_type, int64_t n) {
  if (to_type == from_type) {
    std::memcpy(to, from, static_cast<size_t>(n * dtype_size(to_type)));
    return;
  }
  for (int64_t i = 0; i < n; ++i) from_f32(to, i, to_type, to_f32(from, i, from_type));
}
}  // namespace

void Weights::write(void* to, int64_t bytes, const Upload::Fill& fill) {
  if (upload_) upload_->write(to, bytes, fill);
  else fill(static_cast<char*>(to), 0, bytes);
}

void Weights::loaded() { upload_.reset(); }

void Weights::load(const std::string& name, int64_t begin, int64_t n, const void* data, DType dtype) {
  Entry& e = entries_[index_of(name)];
  check(data != nullptr, "the data of tensor '", name, "' is NULL");
  check(begin >= 0 && n >= 0 && begin <= e.view.shape[0] - n, "rows [", begin, ", ", begin, " + ", n, ") of tensor '", name,
        "' are outside its ", e.view.shape[0], " rows");
  check(begin == 0 || begin == e.rows_loaded, "rows of tensor '", name, "' must come in order: row ", begin, " was given, row ",
        e.rows_loaded, " is next");
  const Tensor to = e.view.rows(begin, n);
  const int64_t size = dtype_size(to.dtype);
  write(to.data, to.bytes(), [&](char* piece, int64_t offset, int64_t bytes) {
    convert(piece, to.dtype, static_cast<const char*>(data) + offset / size * dtype_size(dtype), dtype, bytes / size);
  });
  e.rows_loaded = begin + n;
}

void Weights::load_file(const std::string& name, const std::string& path, int64_t offset, DType dtype) {
  Entry& e = entries_[index_of(name)];
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) fail(PRT_IO_ERROR, path, ": cannot open (", std::strerror(errno), ")");
  std::setvbuf(file.get(), nullptr, _IONBF, 0);
  check(offset >= 0, path, ": offset ", offset, " of tensor '", name, "' is negative");
#if defined(_WIN32)
  const bool at = _fseeki64(file.get(), offset, SEEK_SET) == 0;
#else
  const bool at = fseeko(file.get(), offset, SEEK_SET) == 0;
#endif
  if (!at) fail(PRT_IO_ERROR, path, ": cannot seek to byte ", offset, " of tensor '", name, "'");
  const auto read = [&](void* to, int64_t bytes) {
    const size_t got = std::fread(to, 1, static_cast<size_t>(bytes), file.get());
    if (static_cast<int64_t>(got) != bytes)
      fail(PRT_IO_ERROR, path, ": ends inside tensor '", name, "' (", got, " of ", bytes, " bytes read)");
  };
  constexpr int64_t kPiece = 1 << 18;  // elements converted at once
  const int64_t size = dtype_size(e.view.dtype);
  std::vector<char> piece(dtype == e.view.dtype ? 0 : static_cast<size_t>(std::min(e.view.size(), kPiece) * dtype_size(dtype)));
  write(e.view.data, e.view.bytes(), [&](char* to, int64_t, int64_t bytes) {  // called in order: the file is read from front to back
    if (dtype == e.view.dtype) return read(to, bytes);
    for (int64_t i = 0, n = bytes / size; i < n; i += kPiece) {
      const int64_t m = std::min(kPiece, n - i);
      read(piece.data(), m * dtype_size(dtype));
      convert(to + i * size, e.view.dtype, piece.data(), dtype, m);
    }
  });
  e.rows_loaded = e.view.shape[0];
}

std::string Weights::missing() const {
  std::string names;
  int64_t n = 0;
  for (const Entry& e : entries_) {
    if (e.rows_loaded >= e.view.shape[0]) continue;
    if (n++ < 5) {
      names += (names.empty() ? "" : ", ") + e.name;
      if (e.rows_loaded > 0) names += " (" + std::to_string(e.rows_loaded) + " of " + std::to_string(e.view.shape[0]) + " rows)";
    }
  }
  if (n > 5) names += " and " + std::to_string(n - 5) + " more";
  return names;
}

}  // namespace prt
