#include "attention/registry.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "attention/oracle.h"
#include "attention/quest.h"
#include "attention/recycled.h"
#include "attention/streaming.h"
#include "attention/tactic.h"
#include "attention/token_select.h"

namespace prt {

namespace {

template <class P>
std::unique_ptr<Policy> make(const PolicyContext& x, const prt_attention& c) {
  return std::make_unique<P>(x, c);
}

#define PRT_ALL "window sinks min_context dense_layers measure "
#define PRT_TACTIC "p budget cluster segment iterations estimator tail selected seed " PRT_ALL
const PolicyInfo kPolicies[] = {
    {PRT_ATTENTION_FULL, "full", "", "", true, nullptr, nullptr},
    {PRT_ATTENTION_TACTIC, "tactic", PRT_TACTIC, "", true, make<Tactic>, index_page_bytes},
    {PRT_ATTENTION_RECYCLED, "recycled", "k budget stride check threshold group pool " PRT_ALL, "", true, make<Recycled>, nullptr},
    {PRT_ATTENTION_STREAMING, "streaming", "evict " PRT_ALL, "sinks=4,window=1020", true, make<Streaming>, nullptr},
    {PRT_ATTENTION_QUEST, "quest", "k budget " PRT_ALL, "dense_layers=2", true, make<Quest>, quest_page_bytes},
    {PRT_ATTENTION_TOKEN_SELECT, "token_select", "k budget threshold " PRT_ALL, "sinks=128,window=512", true, make<TokenSelect>, nullptr},
    {PRT_ATTENTION_ORACLE, "oracle", "p k budget " PRT_ALL, "", true, make<Oracle>, nullptr},
    {PRT_ATTENTION_TACTIC_RECYCLED, "tactic_recycled", "stride check threshold " PRT_TACTIC, "", true, make<Tactic>, index_page_bytes},
};

constexpr const char* kEstimators[] = {"fit", "moment", nullptr};
constexpr const char* kGroups[] = {"first", "max", nullptr};

enum class Kind { integer, share, flag, word };
struct Option {
  const char* name;
  Kind kind;
  int32_t prt_attention::* number = nullptr;
  float prt_attention::* real = nullptr;
  const char* const* words = nullptr;
  int64_t lo = 0, hi = 0;  // of a number
};
const Option kOptions[] = {
    {"p", Kind::share, nullptr, &prt_attention::p},
    {"cluster", Kind::integer, &prt_attention::cluster, nullptr, nullptr, 4, 64},
    {"segment", Kind::integer, &prt_attention::segment, nullptr, nullptr, 0, kMaxSegmentPages* kPageTokens},
    {"iterations", Kind::integer, &prt_attention::iterations, nullptr, nullptr, 1, 1000},
    {"estimator", Kind::word, &prt_attention::estimator, nullptr, kEstimators, 0, 1},
    {"tail", Kind::flag, &prt_attention::tail, nullptr, nullptr, 0, 1},
    {"sinks", Kind::integer, &prt_attention::sinks, nullptr, nullptr, 0, 1 << 16},
    {"window", Kind::integer, &prt_attention::window, nullptr, nullptr, 0, 1 << 16},
    {"min_context", Kind::integer, &prt_attention::min_context, nullptr, nullptr, 1, 1 << 24},
    {"dense_layers", Kind::integer, &prt_attention::dense_layers, nullptr, nullptr, 0, 1 << 16},
    {"measure", Kind::flag, &prt_attention::measure, nullptr, nullptr, 0, 1},
    {"selected", Kind::share, nullptr, &prt_attention::selected},
    {"seed", Kind::integer},  // 64 bits
    {"k", Kind::integer, &prt_attention::k, nullptr, nullptr, 0, 1 << 24},
    {"budget", Kind::share, nullptr, &prt_attention::budget},
    {"stride", Kind::integer, &prt_attention::stride, nullptr, nullptr, 0, 1 << 24},
    {"check", Kind::integer, &prt_attention::check, nullptr, nullptr, 0, 1 << 24},
    {"threshold", Kind::share, nullptr, &prt_attention::threshold},
    {"group", Kind::word, &prt_attention::group, nullptr, kGroups, 0, 1},
    {"pool", Kind::integer, &prt_attention::pool, nullptr, nullptr, 0, 63},
    {"evict", Kind::flag, &prt_attention::evict, nullptr, nullptr, 0, 1},
};

bool reads(const PolicyInfo& info, std::string_view option) {
  const std::string_view all = info.options;
  for (size_t at = all.find(option); at != std::string_view::npos; at = all.find(option, at + 1))
    if ((at == 0 || all[at - 1] == ' ') && all[at + option.size()] == ' ') return true;
  return false;
}

std::string policy_names() {
  std::string names;
  for (const PolicyInfo& p : kPolicies) names += (names.empty() ? "'" : ", '") + std::string(p.name) + "'";
  return names;
}

std::string option_names(const PolicyInfo& info) {
  std::string names;
  for (const Option& o : kOptions)
    if (reads(info, o.name)) names += (names.empty() ? "" : ", ") + std::string(o.name);
  return names;
}

// A whole word as a number; -1: it is none.
int64_t whole_number(const std::string& word) {
  if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos || word.size() > 19) return -1;
  return std::strtoll(word.c_str(), nullptr, 10);
}

void set_option(prt_attention& c, const Option& o, const std::string& word) {
  const std::string what = text("attention option ", o.name, " is '", word, "', expected ");
  if (o.kind == Kind::share) {
    char* end = nullptr;
    const float value = std::strtof(word.c_str(), &end);
    check(!word.empty() && *end == 0 && value > 0 && value <= 1, what, "a number above 0 and up to 1");
    c.*o.real = value;
  } else if (o.kind == Kind::word) {
    std::string names;
    for (int32_t i = 0; o.words[i]; ++i) {
      if (word == o.words[i]) return void(c.*o.number = i);
      names += (i ? " or '" : "'") + std::string(o.words[i]) + "'";
    }
    fail(PRT_INVALID_ARGUMENT, what, names);
  } else if (o.kind == Kind::flag) {
    const std::string low = [&] {
      std::string s = word;
      for (char& x : s) x = x >= 'A' && x <= 'Z' ? static_cast<char>(x - 'A' + 'a') : x;
      return s;
    }();
    const bool on = low == "1" || low == "true" || low == "on";
    check(on || low == "0" || low == "false" || low == "off", what, "true or false");
    c.*o.number = on;
  } else {
    const int64_t most = o.number ? INT32_MAX : INT64_MAX, value = whole_number(word);
    check(value >= 0 && value <= most, what, "an integer from 0 to ", most);
    if (o.number) c.*o.number = static_cast<int32_t>(value);
    else c.seed = static_cast<uint64_t>(value);
  }
}

void set_options(prt_attention& c, const PolicyInfo& info, std::string_view words, std::string_view whole) {
  std::string given = " ";
  while (!words.empty()) {
    const size_t comma = words.find(',');
    const std::string word(words.substr(0, comma));
    words = comma == std::string_view::npos ? std::string_view() : words.substr(comma + 1);
    if (word.empty()) continue;
    const size_t equals = word.find('=');
    check(equals != std::string::npos, "attention '", whole, "': '", word, "' is not of the form key=value");
    const std::string name = word.substr(0, equals);
    check(*info.options != 0, "attention '", info.name, "' takes no options, got ", name);
    check(reads(info, name), "attention '", info.name, "' has no option '", name, "', expected some of ", option_names(info));
    check(given.find(" " + name + " ") == std::string::npos, "attention '", whole, "': ", name, " is given twice");
    given += name + " ";
    for (const Option& o : kOptions)
      if (name == o.name) set_option(c, o, word.substr(equals + 1));
  }
}

prt_attention defaults_of(const PolicyInfo& info) {
  prt_attention c = PRT_ATTENTION_INIT;
  c.policy = info.id;
  set_options(c, info, info.defaults, info.defaults);
  return c;
}

}  // namespace

const PolicyInfo& policy_info(int32_t id) {
  for (const PolicyInfo& p : kPolicies)
    if (p.id == id) return p;
  fail(PRT_INVALID_ARGUMENT, "attention: policy is ", id, ", expected one of prt_attention_policy");
}

prt_attention parse_attention(std::string_view words) {
  const size_t colon = words.find(':');
  const std::string_view name = words.substr(0, colon);
  for (const PolicyInfo& p : kPolicies) {
    if (name != p.name) continue;
    prt_attention c = defaults_of(p);
    if (colon != std::string_view::npos) set_options(c, p, words.substr(colon + 1), words);
    return c;
  }
  fail(PRT_INVALID_ARGUMENT, "attention policy '", name, "' is unknown, expected one of ", policy_names());
}

void check_attention_config(const prt_attention& c) {
  const PolicyInfo& info = policy_info(c.policy);
  for (const Option& o : kOptions) {
    if (o.kind == Kind::share) {
      const bool none = &prt_attention::p != o.real && c.*o.real == 0;
      check(none || (c.*o.real > 0 && c.*o.real <= 1), "attention: ", o.name, " is ", c.*o.real, ", expected above 0 and up to 1");
    } else if (o.number) {
      check(c.*o.number >= o.lo && c.*o.number <= o.hi, "attention: ", o.name, " is ", c.*o.number, ", expected ", o.lo, "..", o.hi);
    }
    // A setting is never silently ignored. Full attention takes any, so that a program may keep its values and change the policy alone.
    const prt_attention init = PRT_ATTENTION_INIT;
    const bool other = o.real ? c.*o.real != init.*o.real : o.number ? c.*o.number != init.*o.number : c.seed != init.seed;
    check(!other || info.id == PRT_ATTENTION_FULL || reads(info, o.name), "attention '", info.name, "' does not read ", o.name,
          ", which is set");
  }
  check((c.cluster & (c.cluster - 1)) == 0, "attention: cluster is ", c.cluster, ", expected 4, 8, 16, 32 or 64");
  check(c.segment == 0 || (c.segment >= 256 && c.segment % kPageTokens == 0), "attention: segment is ", c.segment,
        ", expected 0 (everything there is when decoding begins) or a multiple of ", kPageTokens, " from 256 to ",
        kMaxSegmentPages * kPageTokens);
  check(c.k == 0 || c.budget == 0, "attention: k is ", c.k, " and budget ", c.budget, ": both say how many rows, give one of them");
  check(c.pool == 0 || c.pool % 2 == 1, "attention: pool is ", c.pool, ", expected an odd number");
  check(c.threshold == 0 || c.policy != PRT_ATTENTION_RECYCLED || c.check > 0, "attention: threshold is ", c.threshold,
        " without check: it is compared every `check` tokens");
  if (reads(info, "window") && !reads(info, "cluster"))
    check(c.window >= 1, "attention '", info.name, "': window is 0, expected at least 1: a token attends to itself");
}

}  // namespace prt
