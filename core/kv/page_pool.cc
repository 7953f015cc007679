#include "kv/page_pool.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"

namespace prt {

PagePool::PagePool(int32_t n_page, int64_t max_context)
    : max_context_(max_context), refs_(static_cast<size_t>(n_page), 0), segment_(refs_) {
  free_.resize(refs_.size());
  std::iota(free_.rbegin(), free_.rend(), 0);  // page 0 is taken first
}

Sequence& PagePool::find(int64_t seq) {
  const auto it = sequences_.find(seq);
  check(it != sequences_.end(), "sequence ", seq, " does not exist (", sequences_.size(), " sequences are alive)");
  return it->second;
}

const Sequence& PagePool::at(int64_t seq) const { return const_cast<PagePool*>(this)->find(seq); }

int32_t PagePool::take() {
  const int32_t page = free_.back();
  free_.pop_back();
  refs_[static_cast<size_t>(page)] = 1;
  segment_[static_cast<size_t>(page)] = 0;
  peak_ = std::max(peak_, n_page() - n_free());
  return page;
}

void PagePool::drop(int32_t page) {
  if (--refs_[static_cast<size_t>(page)] == 0) free_.push_back(page);
}

int64_t PagePool::create() {
  sequences_.emplace(next_id_, Sequence{});
  return next_id_++;
}

int64_t PagePool::fork(int64_t seq) {
  Sequence copy = find(seq);
  const int64_t id = next_id_;
  const auto& pages = sequences_.emplace(id, std::move(copy)).first->second.pages;
  for (int32_t p : pages) ++refs_[static_cast<size_t>(p)];
  ++next_id_;
  return id;
}

void PagePool::truncate(int64_t seq, int64_t n_token) {
  Sequence& s = find(seq);
  check(n_token >= 0 && n_token <= s.length, "truncate: n_token is ", n_token, ", sequence ", seq, " has ", s.length, " tokens");
  s.length = n_token;
  while (static_cast<int64_t>(s.pages.size()) > pages_for(n_token)) {
    drop(s.pages.back());
    s.pages.pop_back();
  }
}

void PagePool::free(int64_t seq) {
  truncate(seq, 0);
  sequences_.erase(seq);
}

void PagePool::grow(int32_t n_seq, const int64_t* seq, const int32_t* n_token, Growth& growth) {
  growth.items.clear();
  growth.copy_from.clear();
  growth.copy_to.clear();
  // First count, so that failing changes nothing. Sharers that write in this same batch are counted one by one: the last of them
  // owns the page and needs no copy.
  int64_t need = 0;
  left_.clear();
  for (int32_t i = 0; i < n_seq; ++i) {
    const Sequence& s = find(seq[i]);
    check(s.length + n_token[i] <= max_context_, "sequence ", seq[i], " has ", s.length, " tokens; ", n_token[i],
          " more do not fit max_context ", max_context_);
    need += pages_for(s.length + n_token[i]) - static_cast<int64_t>(s.pages.size());
    const int32_t page = s.length % PRT_PAGE_TOKENS ? s.pages[static_cast<size_t>(s.length / PRT_PAGE_TOKENS)] : -1;
    if (page >= 0 && refs_[static_cast<size_t>(page)] > 1) {
      auto it = std::find_if(left_.begin(), left_.end(), [&](const auto& x) { return x.first == page; });
      if (it == left_.end()) it = left_.insert(it, {page, refs_[static_cast<size_t>(page)]});
      if (it->second > 1) {
        ++need;
        --it->second;
      }
    }
  }
  if (need > n_free())
    fail(PRT_OUT_OF_PAGES, "the step needs ", need, " KV pages of ", PRT_PAGE_TOKENS, " tokens, ", n_free(), " of ", n_page(),
         " are free: free or truncate sequences, or create the session with a larger n_page");
  growth.items.reserve(static_cast<size_t>(n_seq));
  for (int32_t i = 0; i < n_seq; ++i) {
    Sequence& s = find(seq[i]);
    if (s.length % PRT_PAGE_TOKENS != 0) {
      int32_t& page = s.pages[static_cast<size_t>(s.length / PRT_PAGE_TOKENS)];
      if (refs_[static_cast<size_t>(page)] > 1) {
        const int32_t copy = take();
        growth.copy_from.push_back(page);
        growth.copy_to.push_back(copy);
        drop(page);
        page = copy;
        ++n_copy_;
      }
    }
    int32_t n_new = 0;
    for (; static_cast<int64_t>(s.pages.size()) < pages_for(s.length + n_token[i]); ++n_new) s.pages.push_back(take());
    growth.items.push_back({seq[i], n_token[i], n_new});
  }
}

void PagePool::commit(const Growth& growth) {
  for (const auto& item : growth.items) {
    Sequence& s = find(item.seq);
    s.length += item.n_token;
    s.prompt_ended |= item.n_token > 1;
  }
}

bool PagePool::own(int64_t seq, int64_t first, int64_t n, std::vector<int32_t>& copy_from, std::vector<int32_t>& copy_to) {
  copy_from.clear();
  copy_to.clear();
  Sequence& s = find(seq);
  const auto refs = [&](int64_t i) { return refs_[static_cast<size_t>(s.pages[static_cast<size_t>(i)])]; };
  if (refs(first) == refs(first + n - 1)) return true;  // everyone holds all of them, or nobody else any
  int64_t need = 0;
  for (int64_t i = first; i < first + n; ++i) need += refs(i) > 1;
  if (need > n_free()) return false;
  for (int64_t i = first; i < first + n; ++i) {
    if (refs(i) == 1) continue;
    int32_t& page = s.pages[static_cast<size_t>(i)];
    copy_from.push_back(page);
    drop(page);
    page = take();
    copy_to.push_back(page);
    ++n_copy_;
  }
  return true;
}

std::vector<int32_t> PagePool::reserve(int64_t n) {
  if (n > n_free())
    fail(PRT_OUT_OF_PAGES, "cutting a shared sequence needs ", n, " KV pages of ", PRT_PAGE_TOKENS, " tokens, ", n_free(), " of ", n_page(),
         " are free: free or truncate sequences, or create the session with a larger n_page");
  std::vector<int32_t> pages;
  while (static_cast<int64_t>(pages.size()) < n) pages.push_back(take());
  return pages;
}

void PagePool::swap_tail(int64_t seq, int64_t first, const std::vector<int32_t>& pages, int64_t n_token) {
  Sequence& s = find(seq);
  for (auto i = static_cast<size_t>(first); i < s.pages.size(); ++i) drop(s.pages[i]);
  s.pages.resize(static_cast<size_t>(first));
  s.pages.insert(s.pages.end(), pages.begin(), pages.end());
  s.length = n_token;
}

void PagePool::evict(int64_t seq, int64_t first, int64_t n) {
  Sequence& s = find(seq);
  const auto begin = s.pages.begin() + first, end = begin + n;
  std::for_each(begin, end, [&](int32_t page) { drop(page); });
  s.pages.erase(begin, end);
  s.length -= n * PRT_PAGE_TOKENS;
}

void PagePool::own_tail(int64_t seq, int64_t first, std::vector<int32_t>& copy_from, std::vector<int32_t>& copy_to) {
  copy_from.clear();
  copy_to.clear();
  Sequence& s = find(seq);
  for (auto i = static_cast<size_t>(first); i < s.pages.size(); ++i)
    if (shared(s.pages[i])) copy_from.push_back(s.pages[i]);
  copy_to = reserve(static_cast<int64_t>(copy_from.size()));
  for (size_t i = static_cast<size_t>(first), next = 0; i < s.pages.size(); ++i) {
    if (!shared(s.pages[i])) continue;
    drop(s.pages[i]);
    s.pages[i] = copy_to[next++];
    ++n_copy_;
  }
}

std::vector<int64_t> PagePool::ids() const {
  std::vector<int64_t> all;
  for (const auto& [id, s] : sequences_) all.push_back(id);
  std::sort(all.begin(), all.end());
  return all;
}

void PagePool::rollback(const Growth& growth) {
  for (const auto& item : growth.items) {
    Sequence& s = find(item.seq);
    for (int32_t i = 0; i < item.n_new_page; ++i) {
      drop(s.pages.back());
      s.pages.pop_back();
    }
  }
}

}  // namespace prt
