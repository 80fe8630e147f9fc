// Runs pieces of a kernel on several threads. Pieces are fixed by the shapes alone, so who runs which cannot change a result.
#pragma once

#include <stdint.h>

// Lets the kernels use the OpenMP runtime that `library` (a path or a name, already loaded) depends on. Two runtimes in one
// process would fight for the cores: after each parallel region a runtime's threads spin, waiting for the next one of theirs.
// False where the library is not loaded or has no GNU OpenMP entry point; then a small pool of our own serves.
bool share_openmp(const char* library);
const char* threading();

// Calls task(context) on `threads` threads at once and waits for all.
void on_threads(int threads, void (*task)(void*), void* context);

// Calls body(piece) once for each of `pieces`, in any order, on at most `threads` threads. Each thread begins with a share of its
// own, the first with the first pieces, as torch's operators divide their work, so that a kernel mostly finds in a core's cache
// what this core wrote before; then it helps the others.
constexpr int MAX_SHARES = 64;
template <class Body> static inline void parallel(int threads, int64_t pieces, const Body& body) {
    if (threads <= 1 || pieces <= 1) {
        for (int64_t i = 0; i < pieces; i++) body(i);
        return;
    }
    struct alignas(64) Share {
        int64_t next;
    };
    struct Shared {
        const Body& body;
        int64_t pieces;
        int shares, arrived;
        Share share[MAX_SHARES];
    } shared{body, pieces, threads < MAX_SHARES ? threads : MAX_SHARES, 0, {}};
    // Always all threads: GNU OpenMP ends the threads that a smaller team leaves over, and starting one takes far longer than
    // finding nothing to do.
    on_threads(threads, [](void* context) {
        Shared& s = *static_cast<Shared*>(context);
        int mine = __atomic_fetch_add(&s.arrived, 1, __ATOMIC_RELAXED);
        for (int k = 0; k < s.shares; k++) {
            int64_t which = (mine + k) % s.shares, begin = s.pieces * which / s.shares, end = s.pieces * (which + 1) / s.shares;
            for (int64_t i; (i = begin + __atomic_fetch_add(&s.share[which].next, 1, __ATOMIC_RELAXED)) < end;) s.body(i);
        }
    }, &shared);
}
