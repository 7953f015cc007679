// The part of the contracts that looks into tensors: ids, slots, page tables. The CPU twins check it on every call. A GPU's tensors cannot
// be looked at without waiting for it, so there it is checked where the contents come from: by prt_op_run before they are copied over,
// and by the session, which writes them itself.
#pragma once
#include "ops/ops.h"

namespace prt {

void check_contents(const Embedding& a);
void check_contents(const RopeKvWrite& a);
void check_contents(const char* op, const Attention& a);
void check_contents(const TargetLogprob& a);
void check_contents(const Sample& a);
void check_contents(const PageCopy& a);

}  // namespace prt
