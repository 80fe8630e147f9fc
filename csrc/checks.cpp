#include "checks.h"

#include <stdexcept>
#include <string>

namespace {

std::string text(int64_t x) { return std::to_string(x); }

[[noreturn]] void wrong(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

void check_paged_append(const PagedAppend& a) {
    for (int64_t t = 0; t < a.tokens; t++) {
        int64_t slot = a.slot_mapping[t];
        if (slot < -1 || slot >= a.num_blocks * a.block_size)
            wrong("paged_append: slot_mapping[" + text(t) + "] is " + text(slot) + "; a slot is -1 (skip) or 0 to " +
                text(a.num_blocks * a.block_size - 1));
        if (a.rotary.cos != nullptr && slot >= 0 && (a.positions[t] < 0 || a.positions[t] >= a.max_position))
            wrong("paged_append: positions[" + text(t) + "] is " + text(a.positions[t]) + ", but cos and sin have rows 0 to " +
                text(a.max_position - 1));
    }
}

void check_paged_attention(const PagedAttention& a) {
    const int32_t* bounds = a.cu_seqlens_q;
    if (bounds[0] != 0 || bounds[a.sequences] > a.rows)
        wrong("paged_attention: cu_seqlens_q runs from " + text(bounds[0]) + " to " + text(bounds[a.sequences]) +
            "; it must start at 0 and end at or before the " + text(a.rows) + " rows of q");
    for (int64_t b = 0; b < a.sequences; b++) {
        int64_t length = a.seq_lens[b], tokens = int64_t(bounds[b + 1]) - bounds[b];
        if (tokens < 0) wrong("paged_attention: cu_seqlens_q falls at sequence " + text(b) + "; it must not decrease");
        if (length < 0 || length > a.max_blocks * a.block_size)
            wrong("paged_attention: seq_lens[" + text(b) + "] is " + text(length) + ", but block_table has room for 0 to " +
                text(a.max_blocks * a.block_size) + " tokens");
        if (length > 0 && tokens > length)
            wrong("paged_attention: sequence " + text(b) + " has " + text(tokens) + " new tokens and seq_lens " + text(length) +
                "; seq_lens counts the new tokens too");
        if (a.rotary.cos != nullptr && length > a.max_position)
            wrong("paged_attention: seq_lens[" + text(b) + "] is " + text(length) + ", but cos and sin have " +
                text(a.max_position) + " rows");
        if (tokens == 0) continue;
        for (int64_t i = 0; i * a.block_size < length; i++) {
            int64_t block = a.block_table[b * a.table_stride + i];
            if (block < 0 || block >= a.num_blocks)
                wrong("paged_attention: block_table[" + text(b) + ", " + text(i) + "] is " + text(block) +
                    ", but the cache has blocks 0 to " + text(a.num_blocks - 1));
        }
    }
}
