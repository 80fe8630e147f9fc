// Work on many tensors at once, in pieces of each that follow from its size alone.
#pragma once

#include "../memory.h"
#include "../threads.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t LIST_PIECE = 1 << 13;  // elements
constexpr int64_t LIST_GRAIN = 1 << 14;  // elements below which one thread is faster

struct Pieces {
    const int64_t* sizes;  // elements of each tensor
    int64_t tensors, count = 0, elements = 0;

    __attribute__((always_inline)) Pieces(const int64_t* sizes, int64_t tensors) : sizes(sizes), tensors(tensors) {
        for (int64_t t = 0; t < tensors; t++) count += (sizes[t] + LIST_PIECE - 1) / LIST_PIECE, elements += sizes[t];
    }

    // body(piece, tensor, first element, elements) for each piece.
    template <class Body> __attribute__((always_inline)) void each(int threads, const Body& body) const {
        Workspace places(4 * count);  // of each its tensor and its first element in that, int64_t's in two floats' place
        int64_t *tensor = reinterpret_cast<int64_t*>(places.data), *first = tensor + count, piece = 0;
        for (int64_t t = 0; t < tensors; t++)
            for (int64_t begin = 0; begin < sizes[t]; begin += LIST_PIECE, piece++) tensor[piece] = t, first[piece] = begin;
        parallel(elements < LIST_GRAIN ? 1 : threads, count, [&](int64_t i) {
            int64_t rest = sizes[tensor[i]] - first[i];
            body(i, tensor[i], first[i], rest < LIST_PIECE ? rest : LIST_PIECE);
        });
    }
};

}  // namespace
}  // namespace PSANN_NAMESPACE
