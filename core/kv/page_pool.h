// Which pages belong to which sequence. Pure bookkeeping: no device memory is touched here.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pyruntime.h"

namespace prt {

inline int64_t pages_for(int64_t n_token) { return (n_token + PRT_PAGE_TOKENS - 1) / PRT_PAGE_TOKENS; }

struct Sequence {
  std::vector<int32_t> pages;
  int64_t length = 0;  // tokens
  bool prompt_ended = false;  // tokens came several at once since close_prompt
};

// A reservation made by PagePool::grow. Until it is committed the lengths are unchanged and rollback() returns the new pages.
struct Growth {
  struct Item {
    int64_t seq;
    int64_t n_token;
    int32_t n_new_page;
  };
  std::vector<Item> items;
  std::vector<int32_t> copy_from, copy_to;  // pages to copy before anything is written (copy on write)
};

class PagePool {
 public:
  PagePool(int32_t n_page, int64_t max_context);

  int64_t create();
  int64_t fork(int64_t seq);                     // shares all pages
  void truncate(int64_t seq, int64_t n_token);
  void free(int64_t seq);
  const Sequence& at(int64_t seq) const;

  // Makes room for n_token[i] more tokens in seq[i], for all of them or, failing with PRT_OUT_OF_PAGES, for none.
  // The page that the first new token falls into is copied when another sequence also holds it.
  void grow(int32_t n_seq, const int64_t* seq, const int32_t* n_token, Growth& growth);
  void commit(const Growth& growth);
  // A copied page is kept: its former sharer may already have written into the original past its own end.
  void rollback(const Growth& growth);

  // Segments: runs of pages of one sequence that an attention policy keeps in an order of its own. The number of pages is kept with the
  // first one, until it is freed or set to 0. Within a segment, who holds a page also holds those before it.
  int32_t segment(int32_t page) const { return segment_[static_cast<size_t>(page)]; }
  void set_segment(int32_t page, int32_t n_page) { segment_[static_cast<size_t>(page)] = n_page; }
  bool shared(int32_t page) const { return refs_[static_cast<size_t>(page)] > 1; }
  // Before pages [first, first + n) of `seq` become segments: where somebody else holds only a part of them, they are exchanged for new
  // pages, into which the caller copies. False: there are too few free pages; nothing changed.
  bool own(int64_t seq, int64_t first, int64_t n, std::vector<int32_t>& copy_from, std::vector<int32_t>& copy_to);
  // Takes n pages that belong to nobody yet; swap_tail makes them the pages of `seq` from `first` on, the last ones it has.
  std::vector<int32_t> reserve(int64_t n);
  void swap_tail(int64_t seq, int64_t first, const std::vector<int32_t>& pages, int64_t n_token);
  // Gives up pages [first, first + n) of `seq`; the rows after them move up.
  void evict(int64_t seq, int64_t first, int64_t n);
  // Before pages [first, end of seq) are changed in place: those that others hold are exchanged for new ones, into which the caller copies.
  // Fails, and changes nothing, if there are too few.
  void own_tail(int64_t seq, int64_t first, std::vector<int32_t>& copy_from, std::vector<int32_t>& copy_to);
  void end_prompt(int64_t seq) { find(seq).prompt_ended = true; }
  void close_prompt(int64_t seq) { find(seq).prompt_ended = false; }
  std::vector<int64_t> ids() const;

  int32_t n_page() const { return static_cast<int32_t>(refs_.size()); }
  int32_t n_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t n_peak() const { return peak_; }
  int64_t n_copy() const { return n_copy_; }
  int32_t n_sequence() const { return static_cast<int32_t>(sequences_.size()); }

 private:
  Sequence& find(int64_t seq);
  int32_t take();
  void drop(int32_t page);

  int64_t max_context_;
  int64_t next_id_ = 1;
  std::vector<int32_t> refs_;  // [n_page] sequences that hold the page
  std::vector<int32_t> segment_;  // [n_page]
  std::vector<std::pair<int32_t, int32_t>> left_;  // grow(): (shared page, sequences that have not copied it yet)
  std::vector<int32_t> free_;  // a stack: the page freed last is the warmest
  int32_t peak_ = 0;
  int64_t n_copy_ = 0;
  std::unordered_map<int64_t, Sequence> sequences_;
};

}  // namespace prt
