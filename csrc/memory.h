// Scratch memory, and what a large output asks of the operating system.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Throws std::bad_alloc.
void* allocate_bytes(size_t bytes);
void free_bytes(void*);
struct Workspace {
    // Inlined always: a copy of its own, compiled for AVX-512, could be the one that the linker keeps for every instruction set.
    float* data;
    __attribute__((always_inline)) explicit Workspace(int64_t floats)
        : data(static_cast<float*>(allocate_bytes(sizeof(float) * static_cast<size_t>(floats)))) {}
    __attribute__((always_inline)) ~Workspace() { free_bytes(data); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
};

// Asks for large pages under memory that is about to be written, where that is worth a system call. A large output is usually
// memory that this process never touched: 64 MB in pages of 4 KB take 37 ms of page faults where the copy into them takes 5.
void expect_writes(void* p, size_t bytes);
