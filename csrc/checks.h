// What only the values of index tensors can show to be wrong; a kernel that believed them would leave its memory. Each throws
// std::invalid_argument, which Python sees as ValueError.
#pragma once

#include "kernels.h"

void check_paged_append(const PagedAppend&);
void check_paged_attention(const PagedAttention&);
