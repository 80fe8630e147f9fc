// A branch of a residual block on its way back: h = x + alpha * branch; the definition is scaled_add.py's reference.
//
// Backward writes the branch's gradient and adds up alpha's in blocks that follow from the number of elements alone.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t BLOCK = 1 << 12;  // elements of a piece of work and of a partial sum
constexpr int64_t GRAIN = 1 << 14;  // elements below which one thread is faster

INLINE int64_t blocks(int64_t elements) { return (elements + BLOCK - 1) / BLOCK; }
INLINE int64_t end_of(int64_t block, int64_t elements) { return (block + 1) * BLOCK < elements ? (block + 1) * BLOCK : elements; }

// T: of x and h; B: of the branch.
template <class T, class B> static void forward(const ScaledAdd& a) {
    const T* x = static_cast<const T*>(a.x);
    const B* branch = static_cast<const B*>(a.branch);
    T* h = static_cast<T*>(a.h);
    parallel(a.elements < GRAIN ? 1 : a.threads, blocks(a.elements), [&](int64_t block) {
        each_vector(block * BLOCK, end_of(block, a.elements), [&](int64_t c, int64_t count) INLINE_LAMBDA {
            give(h + c, fma(take(branch + c, count), all(*a.alpha), take(x + c, count)), count);
        });
    });
}

template <class T, class B> static void backward(const ScaledAddBackward& a) {
    const T* dh = static_cast<const T*>(a.dh);
    const B* branch = static_cast<const B*>(a.branch);
    B* dbranch = static_cast<B*>(a.dbranch);
    Workspace partial(blocks(a.elements));
    parallel(a.elements < GRAIN ? 1 : a.threads, blocks(a.elements), [&](int64_t block) {
        Float products = {};
        each_vector(block * BLOCK, end_of(block, a.elements), [&](int64_t c, int64_t count) INLINE_LAMBDA {
            Float d = take(dh + c, count);
            products = fma(d, take(branch + c, count), products);
            give(dbranch + c, d * *a.alpha, count);
        });
        partial.data[block] = sum(products);
    });
    double total = 0.0;
    for (int64_t block = 0; block < blocks(a.elements); block++) total += static_cast<double>(partial.data[block]);
    *a.dalpha = static_cast<float>(total);
}

}  // namespace

void scaled_add(const ScaledAdd& a) {
    if (a.type == Type::BFLOAT16) return forward<bf16, bf16>(a);
    if (a.type == Type::FLOAT16) return forward<fp16, fp16>(a);
    with_type(a.branch_type, [&](auto b) { forward<float, decltype(b)>(a); });
}

void scaled_add_backward(const ScaledAddBackward& a) {
    if (a.type == Type::BFLOAT16) return backward<bf16, bf16>(a);
    if (a.type == Type::FLOAT16) return backward<fp16, fp16>(a);
    with_type(a.branch_type, [&](auto b) { backward<float, decltype(b)>(a); });
}

}  // namespace PSANN_NAMESPACE
