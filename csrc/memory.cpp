#include "memory.h"

#include <stdlib.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

void* allocate_bytes(size_t bytes) {
    void* p = malloc(bytes == 0 ? 1 : bytes);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}

void free_bytes(void* p) { free(p); }

void expect_writes(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    if (bytes < 2 * PAGE) return;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + PAGE - 1) / PAGE * PAGE;
    uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / PAGE * PAGE;
    // Advice only: where the system gives no large pages, nothing is lost.
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}
