#include "prt_bench/options.h"

#include <charconv>
#include <cstring>

namespace prt_bench {

namespace {

int64_t number(const std::string& option, const std::string& text, int64_t low, int64_t high) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size())
    throw Failure(2, option + ": '" + text + "' is not a whole number");
  if (value < low || value > high)
    throw Failure(2, option + ": " + text + " is out of range, expected " + std::to_string(low) + ".." + std::to_string(high));
  return value;
}

std::vector<int64_t> numbers(const std::string& option, const std::string& text, int64_t low, int64_t high) {
  std::vector<int64_t> list;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    list.push_back(number(option, text.substr(begin, comma - begin), low, high));
    begin = comma + 1;
  }
  return list;
}

std::vector<double> shares(const std::string& option, const std::string& text) {
  std::vector<double> list;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    double value = 0;
    const auto [end, error] = std::from_chars(text.data() + begin, text.data() + comma, value);
    if (error != std::errc() || end != text.data() + comma || !(value > 0 && value < 1))
      throw Failure(2, option + ": '" + text.substr(begin, comma - begin) + "' is not a share between 0 and 1");
    list.push_back(value);
    begin = comma + 1;
  }
  return list;
}

constexpr int64_t kMostTokens = 1 << 23, kMostSequences = 1024;

}  // namespace

std::string usage() {
  return R"(usage: prt-bench [options]       speed of the library with random weights, in llama-bench's words

  -c, --config NAME     shapes of a model (llama3.1-8b); --list-configs shows the names
  -p LIST               prompt tokens (512); 0: no prompt test
  -n LIST               generated tokens (128); 0: no generation test
  -d LIST               depth: tokens already in the cache (0)
  -b LIST               sequences side by side (1)
  -r N                  repetitions (5)
  -o md|json|csv        what to print (md)
  --out FILE            write the JSON to FILE as well
  --device ID           cpu, cuda:0, ... (the first usable GPU, else the CPU)
  -t, --threads N       CPU threads (one per core)
  --chunk N             rows of an internal step of the library (its own choice)
  --attention POLICY    also generate with this policy, beside dense attention: tactic, recycled:k=2048, quest, ...; may be given again
  --selected LIST       the shares of the clustered rows that clustered attention reads, whatever their mass, after the union over the query
                        heads of a kv head: 0.005,0.01,0.02. Attention over random weights is flat, and p would choose nearly all.
                        For tactic and tactic_recycled. With --ops also times selection and attention alone
  --structured          keys of the operations' caches lie in clusters, as real ones do, instead of being noise
  --ops                 also time every operation alone, as a share of the machine's ceilings (GPU)
  --ops-only            the same without the end-to-end tests
  --match TEXT          of the operations only the groups with this in their title: "decode attention"
  --no-ceilings         do not measure the machine's ceilings first
  --commit TEXT         the commit to record (the one it was built from)
  -q, --quiet           no progress on stderr
  --version, -h, --help

LIST is numbers with commas, every combination is measured: -p 512 -n 128 -d 0,8192 -b 1,8 gives eight rows.
)";
}

Options parse_options(int argc, char** argv) {
  Options o;
#ifdef PRT_COMMIT
  o.commit = PRT_COMMIT;
#endif
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i], inline_value;
    const size_t equals = name.rfind("--", 0) == 0 ? name.find('=') : std::string::npos;
    if (equals != std::string::npos) {
      inline_value = name.substr(equals + 1);
      name.resize(equals);
    }
    const auto value = [&]() -> std::string {
      if (equals != std::string::npos) return inline_value;
      if (++i >= argc) throw Failure(2, name + " needs a value");
      return argv[i];
    };
    if (name == "-h" || name == "--help") o.help = true;
    else if (name == "--version") o.version = true;
    else if (name == "--list-configs") o.list_configs = true;
    else if (name == "-q" || name == "--quiet") o.quiet = true;
    else if (name == "--ops") o.ops = true;
    else if (name == "--ops-only") o.ops = true, o.end_to_end = false;
    else if (name == "--no-ceilings") o.ceilings = false;
    else if (name == "-c" || name == "--config") o.config = find_config(value()).name;
    else if (name == "--device") o.device = value();
    else if (name == "--commit") o.commit = value();
    else if (name == "--out") o.out_file = value();
    else if (name == "-o" || name == "--output") o.output = value();
    else if (name == "-p" || name == "--n-prompt") o.n_prompt = numbers(name, value(), 0, kMostTokens);
    else if (name == "-n" || name == "--n-gen") o.n_gen = numbers(name, value(), 0, kMostTokens);
    else if (name == "-d" || name == "--n-depth") o.depth = numbers(name, value(), 0, kMostTokens);
    else if (name == "-b" || name == "--batch") o.batch = numbers(name, value(), 1, kMostSequences);
    else if (name == "-r" || name == "--repetitions") o.repetitions = number(name, value(), 1, 10000);
    else if (name == "-t" || name == "--threads") o.threads = number(name, value(), 1, 4096);
    else if (name == "--match") o.match = value();
    else if (name == "--selected") o.selected = shares(name, value());
    else if (name == "--structured") o.structured = true;
    else if (name == "--attention") {
      const std::string policy = value();
      prt_attention parsed = PRT_ATTENTION_INIT;
      if (prt_attention_parse(policy.c_str(), &parsed) != PRT_OK) throw Failure(2, prt_last_error());
      if (parsed.policy != PRT_ATTENTION_FULL) o.attention.push_back(policy);
    } else if (name == "--chunk") o.chunk = number(name, value(), 1, 1 << 16);
    else throw Failure(2, "'" + std::string(argv[i]) + "' is not an option; prt-bench --help lists them");
    if (equals != std::string::npos && inline_value.empty()) throw Failure(2, name + " needs a value");
  }
  if (o.output != "md" && o.output != "json" && o.output != "csv") throw Failure(2, "-o is '" + o.output + "', expected md, json or csv");
  return o;
}

}  // namespace prt_bench
