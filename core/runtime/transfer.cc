// Sequences leave a session as bytes and come back: Session::export_sequence and import_sequence.
#include <algorithm>
#include <cstring>

#include "runtime/session.h"

namespace prt {

namespace {

constexpr int64_t kBytesAtOnce = 8 << 20;  // of the buffer between pages and caller: then a device waits for a copy a few times per layer

// What comes before the rows. `segments` follow it, then the rows: [n_layer][K, V][n_page][h_kv][64][d_head].
struct Header {
  char magic[8] = {'P', 'R', 'T', 'S', 'E', 'Q', '\r', '\n'};
  int32_t version = 1;
  int32_t dtype, n_layer, h_kv, d_head, page_tokens = kPageTokens;
  int64_t n_token;
  int64_t rope_context;  // the context that a dynamic rope is laid out for; else 0
  // Segments are pages from `first_page` on that are clustered, for a policy whose clusters depend on the numbers after them.
  int32_t prompt_ended, first_page, n_segment, cluster, segment, iterations, sinks, window;
  uint64_t seed;
};
static_assert(sizeof(Header) == 88, "no padding: the header is written as it is");

Header make_header(const ModelConfig& c, int32_t max_context) {
  Header h{};
  h.dtype = static_cast<int32_t>(c.weight_dtype());
  h.n_layer = c.n_layer;
  h.h_kv = c.h_kv;
  h.d_head = c.d_head;
  h.rope_context = c.rope_kind == PRT_ROPE_DYNAMIC ? std::max(max_context, c.rope_original_max_position) : 0;
  return h;
}

void check_header(const Header& found, const Header& own, const prt_session_config& session) {
  check(std::memcmp(found.magic, own.magic, sizeof own.magic) == 0, "import: this is not an exported sequence");
  if (found.version != own.version)
    fail(PRT_UNSUPPORTED, "import: the sequence has version ", found.version, " of the layout, this library knows ", own.version);
  const auto same = [](const char* what, int64_t a, int64_t b) { check(a == b, "import: ", what, " is ", a, ", the model has ", b); };
  same("dtype", found.dtype, own.dtype);
  same("n_layer", found.n_layer, own.n_layer);
  same("h_kv", found.h_kv, own.h_kv);
  same("d_head", found.d_head, own.d_head);
  same("page size", found.page_tokens, own.page_tokens);
  check(found.rope_context == own.rope_context, "import: the keys are rotated for a context of ", found.rope_context,
        " tokens, this session's for ", own.rope_context, ": give the max_context of the session that wrote them");
  check(found.n_token > 0 && found.n_token <= session.max_context, "import: the sequence has ", found.n_token, " tokens, expected 1..",
        session.max_context, " (max_context)");
  const int64_t n_full = found.n_token / kPageTokens;
  check(found.first_page >= 0 && found.n_segment >= 0 && found.first_page <= n_full && found.n_segment <= n_full - found.first_page,
        "import: ", found.n_segment, " segments from page ", found.first_page, " on do not fit ", found.n_token, " tokens");
}

}  // namespace

// Between `host` and n pages of one layer's K or V, [n][h_kv][64][d_head]; pages with consecutive numbers in one copy.
void Session::move_pages(bool to_host, const Tensor& pool_pages, const int32_t* pages, int64_t n, char* host) const {
  const int64_t tile = pool_pages.row_size() * dtype_size(pool_pages.dtype);
  for (int64_t i = 0, run; i < n; i += run) {
    for (run = 1; i + run < n && pages[i + run] == pages[i] + run;) ++run;
    char *at = pool_pages.row<char>(0) + pages[i] * tile, *there = host + i * tile;
    if (!on_cuda()) std::memcpy(to_host ? there : at, to_host ? at : there, static_cast<size_t>(run * tile));
    else if (to_host) copy_to_host(cuda_->stream(), there, at, run * tile);
    else copy_to_device(cuda_->stream(), at, there, run * tile);
  }
}

Buffer Session::transfer_buffer(int64_t bytes) const {
  return on_cuda() ? pinned_buffer(model_->device, bytes, "a copy of KV pages") : host_buffer(bytes, "a copy of KV pages", false);
}

void Session::export_sequence(int64_t seq, const std::function<void(const void*, int64_t)>& write) {
  const auto scope = device_scope();
  const ModelConfig& c = model_->config;
  const Sequence& s = pool.at(seq);
  check(s.length > 0, "export: sequence ", seq, " is empty");
  Header header = make_header(c, config_.max_context);
  header.n_token = s.length;
  header.prompt_ended = s.prompt_ended;
  std::vector<int32_t> segments;
  if (tactic_) {
    const prt_attention& a = tactic_->config();
    header.first_page = static_cast<int32_t>(std::min<int64_t>(tactic_->first_page(), s.length / kPageTokens));
    header.cluster = a.cluster, header.segment = a.segment, header.iterations = a.iterations;
    header.sinks = a.sinks, header.window = a.window, header.seed = a.seed;
    for (auto page = static_cast<size_t>(header.first_page); page < s.pages.size() && pool.segment(s.pages[page]) > 0;
         page += static_cast<size_t>(segments.back()))
      segments.push_back(pool.segment(s.pages[page]));
  }
  header.n_segment = static_cast<int32_t>(segments.size());
  write(&header, sizeof header);
  if (!segments.empty()) write(segments.data(), static_cast<int64_t>(segments.size() * sizeof(int32_t)));

  // Runs of pages: a segment is one, whose rows are put in the order of their tokens; other pages go as many at a time as fit.
  struct Run {
    int64_t first, n;
    bool closed;
  };
  const int64_t tile = kv_.k[0].row_size() * dtype_size(c.weight_dtype()), n_page = pages_for(s.length);
  const int64_t at_once = std::max<int64_t>(1, kBytesAtOnce / tile);
  std::vector<Run> runs;
  const auto open_until = [&](int64_t page, int64_t end) {
    for (; page < end; page += runs.back().n) runs.push_back({page, std::min(at_once, end - page), false});
  };
  open_until(0, segments.empty() ? 0 : header.first_page);
  int64_t page = segments.empty() ? 0 : header.first_page, longest = at_once;
  for (const int32_t n : segments) {
    runs.push_back({page, n, true});
    longest = std::max<int64_t>(longest, n);
    page += n;
  }
  open_until(page, n_page);

  longest = std::min(longest, n_page);
  const Buffer stored = transfer_buffer(longest * tile);
  std::vector<char> sorted;
  std::vector<uint16_t> order;
  const int64_t order_row = c.h_kv * kPageTokens, row = int64_t{c.d_head} * dtype_size(c.weight_dtype());
  for (size_t layer = 0; layer < kv_.k.size(); ++layer)
    for (const Tensor* part : {&kv_.k[layer], &kv_.v[layer]})
      for (const Run& run : runs) {
        const int32_t* pages = s.pages.data() + run.first;
        move_pages(true, *part, pages, run.n, stored.data());
        if (run.closed) {
          order.resize(static_cast<size_t>(run.n * order_row));
          move_pages(true, tactic_->order(static_cast<int64_t>(layer)), pages, run.n, reinterpret_cast<char*>(order.data()));
        }
        if (on_cuda()) synchronize(cuda_->stream());
        if (!run.closed) {
          const int64_t beyond = (run.first + run.n) * kPageTokens - s.length;  // rows that nobody wrote, or somebody else
          if (beyond > 0)
            for (int64_t h = 0; h < c.h_kv; ++h)
              std::memset(stored.data() + (run.n - 1) * tile + (h * kPageTokens + kPageTokens - beyond) * row, 0,
                          static_cast<size_t>(beyond * row));
          write(stored.data(), run.n * tile);
          continue;
        }
        sorted.resize(static_cast<size_t>(run.n * tile));
        for (int64_t i = 0; i < run.n; ++i)
          for (int64_t h = 0; h < c.h_kv; ++h)
            for (int64_t r = 0; r < kPageTokens; ++r) {
              const int64_t was = order[static_cast<size_t>(i * order_row + h * kPageTokens + r)];
              std::memcpy(sorted.data() + was / kPageTokens * tile + (h * kPageTokens + was % kPageTokens) * row,
                          stored.data() + i * tile + (h * kPageTokens + r) * row, static_cast<size_t>(row));
            }
        write(sorted.data(), run.n * tile);
      }
}

int64_t Session::import_sequence(const std::function<void(void*, int64_t)>& read) {
  const auto scope = device_scope();
  const ModelConfig& c = model_->config;
  Header header{};
  read(&header, sizeof header);
  check_header(header, make_header(c, config_.max_context), config_);
  std::vector<int32_t> segments(static_cast<size_t>(header.n_segment));
  if (!segments.empty()) read(segments.data(), static_cast<int64_t>(segments.size() * sizeof(int32_t)));
  int64_t left = header.n_token / kPageTokens - header.first_page;
  for (const int32_t n : segments) {
    check(n > 0 && n <= left && n <= kMaxSegmentPages, "import: a segment of ", n, " pages, expected 1..",
          std::min(left, kMaxSegmentPages));
    left -= n;
  }

  const int64_t seq = pool.create();
  try {
    const auto n_token = static_cast<int32_t>(header.n_token);
    pool.grow(1, &seq, &n_token, growth_);
    pool.commit(growth_);
    const Sequence& s = pool.at(seq);
    const int64_t tile = kv_.k[0].row_size() * dtype_size(c.weight_dtype()), n_page = pages_for(s.length);
    const int64_t at_once = std::min(n_page, std::max<int64_t>(1, kBytesAtOnce / tile));
    const Buffer buffer = transfer_buffer(at_once * tile);
    for (size_t layer = 0; layer < kv_.k.size(); ++layer)
      for (const Tensor* part : {&kv_.k[layer], &kv_.v[layer]})
        for (int64_t page = 0; page < n_page; page += at_once) {
          const int64_t n = std::min(at_once, n_page - page);
          read(buffer.data(), n * tile);
          move_pages(false, *part, s.pages.data() + page, n, buffer.data());
          if (on_cuda()) synchronize(cuda_->stream());
        }
    pool.end_prompt(seq);
    prt_attention written = PRT_ATTENTION_INIT;
    written.cluster = header.cluster, written.segment = header.segment, written.iterations = header.iterations;
    written.sinks = header.sinks, written.window = header.window, written.seed = header.seed;
    if (policy_ && policy_ == tactic_ && tactic_->same_clusters(written) &&
        (segments.empty() || header.first_page == tactic_->first_page())) {
      tactic_->restore(seq, segments);
      if (!header.prompt_ended) pool.close_prompt(seq);
    }
  } catch (...) {
    pool.free(seq);
    throw;
  }
  return seq;
}

}  // namespace prt
