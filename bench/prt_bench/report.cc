#include "prt_bench/report.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <ctime>

namespace prt_bench {

namespace {

__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...) {
  char buffer[1024];
  va_list args;
  va_start(args, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, args);
  va_end(args);
  return buffer;
}

// ---- JSON: just enough to write one
std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) out += format("\\u%04x", c);
    else out += c;
  }
  return out + '"';
}
std::string json(const std::string& s) { return quoted(s); }
std::string json(const char* s) { return quoted(s); }
std::string json(double x) { return std::isfinite(x) ? format("%.8g", x) : "null"; }
std::string json(int64_t x) { return std::to_string(x); }
std::string json(int32_t x) { return std::to_string(x); }
std::string json(const std::vector<double>& list) {
  std::string out = "[";
  for (const double x : list) out += (out.size() > 1 ? ", " : "") + json(x);
  return out + "]";
}

class Object {
 public:
  template <class T>
  Object& add(const char* key, const T& value) {
    return raw(key, json(value));
  }
  Object& raw(const char* key, const std::string& value) {
    text_ += (text_.empty() ? "" : ", ") + quoted(key) + ": " + value;
    return *this;
  }
  std::string str() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

template <class T, class F>
std::string array_of(const std::vector<T>& list, F&& item) {  // one item per line
  std::string out;
  for (const T& x : list) out += (out.empty() ? "\n  " : ",\n  ") + item(x).str();
  return "[" + out + "]";
}

double mib(int64_t bytes) { return static_cast<double>(bytes) / 0x1p20; }

Object model_object(const NamedConfig& n) {
  const prt_model_config& c = n.config;
  Object o;
  o.add("name", n.name).add("dtype", "bf16").add("n_layer", c.n_layer).add("h_q", c.h_q).add("h_kv", c.h_kv).add("d_head", c.d_head);
  o.add("d_model", c.d_model).add("d_ff", c.d_ff).add("n_vocab", c.n_vocab).add("max_position", c.max_position);
  o.add("tied_embeddings", c.tied_embeddings).add("qkv_bias", c.qkv_bias).add("norm_eps", double{c.norm_eps});
  return o.add("rope_theta", double{c.rope_theta}).add("rope_factor", c.rope_kind == PRT_ROPE_LLAMA3 ? double{c.rope_factor} : 0.0);
}

// What the process takes besides weights, KV and its index: the CUDA context, kernels, workspace.
int64_t beyond(const Report& r) { return r.used_after - r.used_before - r.weight_bytes - r.kv_bytes - r.index_bytes; }

std::string to_json(const Report& r) {
  Object machine, ceilings, memory;
  machine.add("device", r.machine.device).add("name", r.machine.name).add("features", r.machine.features);
  machine.add("driver", r.machine.driver).add("cuda", r.machine.cuda).add("memory_total", r.machine.memory_total);
  machine.add("sm_mhz_max", r.machine.sm_mhz_max).add("memory_mhz_max", r.machine.memory_mhz_max);
  machine.add("power_limit_watts", r.machine.power_limit_watts);
  memory.add("weight_bytes", r.weight_bytes).add("kv_bytes", r.kv_bytes).add("workspace_bytes", r.workspace_bytes);
  if (r.index_bytes > 0) memory.add("index_bytes", r.index_bytes);
  if (r.used_after > 0)
    memory.add("used_before", r.used_before)
        .add("used_by_cuda", r.used_by_cuda)
        .add("used_after", r.used_after)
        .add("beyond_weights_and_kv", beyond(r));
  Object all;
  all.add("prt_bench", 1).add("version", prt_version()).add("commit", r.options.commit).add("date", r.date);
  all.raw("machine", machine.str())
      .raw("model", model_object(r.config).str())
      .raw("memory", memory.str())
      .add("load_seconds", r.load_seconds);
  if (r.ceilings) {
    ceilings.add("copy_gb_s", r.ceilings->copy_bytes / 1e9).add("read_gb_s", r.ceilings->read_bytes / 1e9);
    ceilings.add("bf16_tflops", r.ceilings->tensor_flops / 1e12)
        .add("sm_mhz", r.ceilings->sm_mhz)
        .add("memory_mhz", r.ceilings->memory_mhz);
    all.raw("ceilings", ceilings.str());
  }
  all.add("repetitions", r.options.repetitions).add("chunk", r.options.chunk);
  all.raw("tests", array_of(r.tests, [&](const Test& t) {
            const std::vector<double> rate = t.tok_s();
            Object o;
            o.add("test", t.name()).add("n_prompt", t.is_prompt ? t.n : int64_t{0}).add("n_gen", t.is_prompt ? int64_t{0} : t.n);
            o.add("depth", t.depth).add("batch", t.batch).add("tok_s_mean", mean(rate)).add("tok_s_sd", deviation(rate));
            o.add("bytes", t.bytes).add("flops", t.flops);
            if (!t.attention.empty())
              o.add("attention", t.attention)
                  .add("selected", t.selected)
                  .add("selected_rows", t.selected_rows)
                  .add("read_rows", t.read_rows)
                  .add("prompt_seconds", t.prompt_seconds)
                  .add("cluster_seconds", t.cluster_seconds);
            if (r.ceilings) o.add("share", r.share(t.mean_seconds(), t.bytes, t.flops));
            return o.add("tok_s", rate);
          }));
  all.raw("skipped", array_of(r.skipped, [](const Skipped& s) { return Object().add("test", s.test).add("why", s.why); }));
  all.raw("ops", array_of(r.ops, [&](const Op& op) {
            Object o;
            o.add("group", op.group).add("op", op.name).add("shape", op.shape).add("us", op.us).add("bytes", op.bytes);
            o.add("flops", op.flops).add("calls", op.calls);
            if (op.selected > 0) o.add("selected", op.selected).add("selected_rows", op.selected_rows);
            if (r.ceilings) o.add("share", r.share(op.us * 1e-6, op.bytes, op.flops));
            return o;
          }));
  return all.str() + "\n";
}

std::string to_csv(const Report& r) {
  std::string out = "test,n_prompt,n_gen,depth,batch,tok_s_mean,tok_s_sd\n";
  for (const Test& t : r.tests) {
    const std::vector<double> rate = t.tok_s();
    out += format("%s,%lld,%lld,%lld,%lld,%.2f,%.2f\n", t.name().c_str(), t.is_prompt ? static_cast<long long>(t.n) : 0LL,
                  t.is_prompt ? 0LL : static_cast<long long>(t.n), static_cast<long long>(t.depth), static_cast<long long>(t.batch),
                  mean(rate), deviation(rate));
  }
  if (r.ops.empty()) return out;
  out += "\ngroup,op,shape,us,gb_s,tflop_s,share,calls\n";
  for (const Op& op : r.ops)
    out += format("%s,%s,%s,%.2f,%.1f,%.2f,%.3f,%lld\n", op.group.c_str(), op.name.c_str(), op.shape.c_str(), op.us, op.bytes / op.us / 1e3,
                  op.flops / op.us / 1e6, r.share(op.us * 1e-6, op.bytes, op.flops), static_cast<long long>(op.calls));
  return out;
}

std::string to_markdown(const Report& r) {
  std::string out = format("%s, bf16 (%.2f GB of weights, random) on %s (%s)", r.config.name.c_str(), r.weight_bytes / 1e9,
                           r.machine.name.c_str(), r.machine.device.c_str());
  if (!r.machine.driver.empty()) out += ", driver " + r.machine.driver;
  if (!r.machine.cuda.empty()) out += ", CUDA " + r.machine.cuda;
  out += format(", pyruntime %s %s, %s\n", prt_version(), r.options.commit.c_str(), r.date.c_str());
  if (r.ceilings)
    out += format("ceilings: copy %.2f TB/s (read + write), read %.2f TB/s, bf16 tensor cores %.0f TFLOP/s (SM %d MHz, memory %d MHz)\n",
                  r.ceilings->copy_bytes / 1e12, r.ceilings->read_bytes / 1e12, r.ceilings->tensor_flops / 1e12, r.ceilings->sm_mhz,
                  r.ceilings->memory_mhz);
  if (!r.tests.empty()) {
    out += "\n| test | tok/s | ms per step | GB/s | TFLOP/s |";
    out += r.ceilings ? " of the ceiling |\n|---|---|---|---|---|---|\n" : "\n|---|---|---|---|---|\n";
  }
  for (const Test& t : r.tests) {
    const std::vector<double> rate = t.tok_s();
    const double seconds = t.mean_seconds();
    out += format("| %s | %.1f ± %.1f | %.3f | %.0f | %.1f |", t.name().c_str(), mean(rate), deviation(rate),
                  1e3 * seconds / static_cast<double>(t.is_prompt ? 1 : t.n), t.bytes / seconds / 1e9, t.flops / seconds / 1e12);
    out += r.ceilings ? format(" %.1f %% |\n", 100 * r.share(seconds, t.bytes, t.flops)) : "\n";
  }
  if (r.used_after > 0)
    out += format(
        "\nmemory: weights %.2f GB, KV %.2f GB, everything else %.0f MiB (CUDA itself %.0f, workspace %.0f, kernels and the rest %.0f)\n",
        r.weight_bytes / 1e9, r.kv_bytes / 1e9, mib(beyond(r)), mib(r.used_by_cuda - r.used_before), mib(r.workspace_bytes),
        mib(beyond(r) - (r.used_by_cuda - r.used_before) - r.workspace_bytes));
  for (const Test& t : r.tests)
    if (t.cluster_seconds > 0)
      out += format("%s: %.2f %% of the clustered rows, %.2f %% of all rows read; clustering %.3f s, %.1f %% of the prompts' %.2f s\n",
                    t.name().c_str(), 100 * t.selected_rows, 100 * t.read_rows, t.cluster_seconds,
                    100 * t.cluster_seconds / std::max(t.prompt_seconds, 1e-9), t.prompt_seconds);
    else if (!t.attention.empty()) out += format("%s: %.2f %% of the rows read\n", t.name().c_str(), 100 * t.read_rows);
  for (const Skipped& s : r.skipped) out += "skipped: " + s.test + ": " + s.why + "\n";
  std::string group;
  double step = 0;
  for (size_t i = 0; i < r.ops.size(); ++i) {
    const Op& op = r.ops[i];
    if (op.group != group) {
      out += "\n**" + op.group + "**\n\n| op | shape | us | GB/s | TFLOP/s | of the ceiling | calls |\n|---|---|---|---|---|---|---|\n";
      group = op.group;
      step = 0;
    }
    out += format("| %s | %s | %.2f | %.0f | %.1f |", op.name.c_str(), op.shape.c_str(), op.us, op.bytes / op.us / 1e3,
                  op.flops / op.us / 1e6);
    out += r.ceilings ? format(" %.1f %% |", 100 * r.share(op.us * 1e-6, op.bytes, op.flops)) : " |";
    out += op.calls ? format(" %lld |\n", static_cast<long long>(op.calls)) : " |\n";
    step += op.us * static_cast<double>(op.calls);
    if (step > 0 && (i + 1 == r.ops.size() || r.ops[i + 1].group != group)) out += format("\nsum of a step: %.3f ms\n", step / 1e3);
  }
  return out;
}

}  // namespace

std::string Test::name() const {
  std::string s = (is_prompt ? "pp" : "tg") + std::to_string(n);
  if (depth > 0) s += " @ d" + std::to_string(depth);
  if (batch > 1) s += " b" + std::to_string(batch);
  if (!attention.empty()) s += " " + attention;
  if (selected > 0) s += format(" %g %%", 100 * selected);
  return s;
}
std::vector<double> Test::tok_s() const {
  std::vector<double> rate;
  for (const double s : seconds) rate.push_back(static_cast<double>(n * batch) / s);
  return rate;
}
double Test::mean_seconds() const { return mean(seconds); }

double Report::share(double seconds, double bytes, double flops) const {
  if (!ceilings || seconds <= 0) return 0;
  return std::max(bytes / ceilings->copy_bytes, flops / ceilings->tensor_flops) / seconds;
}

std::string render_configs(const std::string& form) {
  std::string out;
  if (form != "json") {
    for (const NamedConfig& n : named_configs()) out += format("%-14s %s\n", n.name.c_str(), n.about.c_str());
    return out;
  }
  return array_of(named_configs(), [](const NamedConfig& n) { return model_object(n).add("about", n.about); }) + "\n";
}

std::string render(const Report& report, const std::string& form) {
  return form == "json" ? to_json(report) : form == "csv" ? to_csv(report) : to_markdown(report);
}

double mean(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v;
  return x.empty() ? 0 : sum / static_cast<double>(x.size());
}
double deviation(const std::vector<double>& x) {
  if (x.size() < 2) return 0;
  const double m = mean(x);
  double sum = 0;
  for (const double v : x) sum += (v - m) * (v - m);
  return std::sqrt(sum / static_cast<double>(x.size() - 1));
}
double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  const size_t n = x.size();
  return n == 0 ? 0 : n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

}  // namespace prt_bench
