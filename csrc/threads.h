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

// Calls body(piece) once for each of `pieces`, in any order, on at most `threads` threads.
template <class Body> static inline void parallel(int threads, int64_t pieces, const Body& body) {
    if (threads <= 1 || pieces <= 1) {
        for (int64_t i = 0; i < pieces; i++) body(i);
        return;
    }
    struct Shared {
        const Body& body;
        int64_t pieces;
        int64_t next;
    } shared{body, pieces, 0};
    // Always all threads: GNU OpenMP ends the threads that a smaller team leaves over, and starting one takes far longer than
    // finding nothing to do.
    on_threads(threads, [](void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED)) < s.pieces;) s.body(i);
    }, &shared);
}
