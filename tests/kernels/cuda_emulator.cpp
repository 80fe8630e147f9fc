// The scheduler behind cuda_emulator.h. An error ends the launch, which cudaPeekAtLastError then reports as a GPU's would be,
// with a message:
//
//   launches that a GPU refuses   an empty grid, y or z past 65535, more than 1024 threads, more shared memory than 48 KB
//   divergence                    a thread of the block ended, or waits elsewhere, while others wait at a barrier or warp operation
//   memory                        SIGSEGV and SIGBUS (the tests' tensors and shared memory end at unreadable pages)
//   undefined behavior            what -fsanitize finds, with file and line: misaligned accesses, indices past an array, overflow
//
// Built as one library with the kernels. One launch at a time; nothing here is thread-safe.
#include "cuda_emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

// Fibers are switched in ten instructions on x86-64, and by swapcontext, a system call each time, elsewhere.
#if defined(__x86_64__) && !defined(PORTABLE_FIBERS)
#define OWN_SWITCH 1
#else
#define OWN_SWITCH 0
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;
int emulator::fault = 0;

namespace {

constexpr size_t PAGE = 4096, STACK = 64 * 1024, SHARED = 48 * 1024, MOST_THREADS = 1024;
enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };
enum Order { ASCENDING, DESCENDING, RANDOM };

struct Fiber {
    State state;
    int line;                // where it waits
    unsigned mask;           // of the warp operation that it waits at
    const char* operation;   // alike
    uint64_t value;          // what it brought there
    uint64_t received[32];
#if OWN_SWITCH
    void* stack_pointer;
#else
    ucontext_t context;
#endif
};

Fiber fibers[MOST_THREADS], scheduler;
size_t running;
char* stacks;
void (*thread_function)(void*);
void* thread_argument;

std::string kernel, message;
cudaError_t last_error = cudaSuccess;
bool is_in_kernel;
sigjmp_buf way_out;

Order order = ASCENDING;
uint64_t random_state = 1;
std::string launched;

struct Region {
    int id;
    char* end;  // the first byte past it is unreadable
    void* data;
    bool is_in_use;  // by the running block
};
std::vector<Region> regions;
size_t shared_bytes, dynamic_bytes;
void* dynamic_data;

uint64_t random_below(uint64_t n) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state % n;
}

// 0 to n - 1 in the order asked for.
void arrange(std::vector<size_t>& places, size_t n) {
    places.resize(n);
    for (size_t i = 0; i < n; i++) places[i] = order == DESCENDING ? n - 1 - i : i;
    if (order == RANDOM)
        for (size_t i = n; i > 1; i--) std::swap(places[i - 1], places[random_below(i)]);
}

char* map(size_t bytes, bool has_guard) {
    void* p = mmap(nullptr, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || (has_guard && mprotect(static_cast<char*>(p) + bytes, PAGE, PROT_NONE) != 0)) abort();
    return static_cast<char*>(p);
}

void set_thread(size_t i) {
    running = i;
    unsigned u = static_cast<unsigned>(i);
    threadIdx = dim3(u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y);
}

}  // namespace

#if OWN_SWITCH
// The registers that a function must keep, and the stack.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

namespace {

void switch_fibers(Fiber& from, Fiber& to) {
#if OWN_SWITCH
    emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
}

void fiber_main() {
    thread_function(thread_argument);
    fibers[running].state = DONE;
    switch_fibers(fibers[running], scheduler);
    abort();
}

void start_fiber(size_t i) {
    Fiber& fiber = fibers[i];
    fiber.state = READY;
    char* stack = stacks + i * STACK;
#if OWN_SWITCH
    // As if fiber_main had been called: aligned to 16 less the return address.
    // Staggered, so that stacks share no line of the cache.
    void** top = reinterpret_cast<void**>(stack + STACK - 64 * (i % 32)) - 2;
    top[0] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = top - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

void wait_as(State state) {
    Fiber& me = fibers[running];
    me.state = state;
    switch_fibers(me, scheduler);
}

std::string place(size_t i) {
    char text[160];
    unsigned u = static_cast<unsigned>(i);
    snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", u % blockDim.x, u / blockDim.x % blockDim.y,
        u / blockDim.x / blockDim.y, blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}

void refuse(cudaError_t error, const std::string& why) {
    last_error = error;
    message = kernel + ": " + why;
}

[[noreturn]] void leave(const std::string& what, size_t thread) {
    refuse(cudaErrorLaunchFailure, place(thread) + ": " + what);
    siglongjmp(way_out, 1);
}

std::string whereabouts(const Fiber& f) {
    if (f.state == DONE) return "has ended";
    return f.state == AT_BARRIER ? "waits at the barrier of line " + std::to_string(f.line) :
        std::string("waits at ") + f.operation + " of line " + std::to_string(f.line);
}

// Lets the lanes of warp operations go on that all lanes of their mask have reached; false where there was none.
bool exchange_values(size_t first, size_t lanes) {
    bool has_moved = false;
    for (size_t i = 0; i < lanes; i++) {
        Fiber& f = fibers[first + i];
        if (f.state != AT_EXCHANGE) continue;
        bool is_complete = true;
        for (size_t j = 0; j < 32 && is_complete; j++) {
            if (!(f.mask >> j & 1)) continue;
            if (j >= lanes)
                leave(std::string(f.operation) + " of line " + std::to_string(f.line) + " names lane " + std::to_string(j) +
                    ", and the warp has " + std::to_string(lanes), first + i);
            Fiber& other = fibers[first + j];
            is_complete = other.state == AT_EXCHANGE && other.mask == f.mask && other.line == f.line &&
                other.operation == f.operation;
        }
        if (!is_complete) continue;
        uint64_t values[32] = {};
        for (size_t j = 0; j < lanes; j++) values[j] = fibers[first + j].value;
        unsigned mask = f.mask;
        for (size_t j = 0; j < lanes; j++) {
            if (!(mask >> j & 1)) continue;
            memcpy(fibers[first + j].received, values, sizeof values);
            fibers[first + j].state = READY;
        }
        has_moved = true;
    }
    return has_moved;
}

// Runs a warp until each of its lanes has ended or waits at the block's barrier.
void run_warp(size_t first, size_t lanes, const std::vector<size_t>& places) {
    do {
        for (size_t place : places) {
            if (fibers[first + place].state != READY) continue;
            set_thread(first + place);
            switch_fibers(scheduler, fibers[first + place]);
        }
    } while (exchange_values(first, lanes));
    for (size_t i = 0; i < lanes; i++) {
        const Fiber& f = fibers[first + i];
        if (f.state != AT_EXCHANGE) continue;
        for (size_t j = 0; j < lanes; j++) {
            const Fiber& other = fibers[first + j];
            if (f.mask >> j & 1 && !(other.state == AT_EXCHANGE && other.mask == f.mask && other.line == f.line))
                leave(whereabouts(f) + " with mask " + std::to_string(f.mask) + ", but " + place(first + j) + " " +
                    whereabouts(other), first + i);
        }
    }
}

void run_block() {
    static std::vector<size_t> warps, lanes;
    size_t threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
    for (Region& r : regions) r.is_in_use = false;
    shared_bytes = dynamic_bytes;
    if (dynamic_bytes) memset(dynamic_data, 0xff, dynamic_bytes);
    for (size_t i = 0; i < threads; i++) start_fiber(i);
    for (;;) {
        arrange(warps, (threads + 31) / 32);
        for (size_t w : warps) {
            arrange(lanes, std::min<size_t>(32, threads - 32 * w));
            run_warp(32 * w, lanes.size(), lanes);
        }
        size_t done = 0;
        for (size_t i = 0; i < threads; i++) done += fibers[i].state == DONE;
        if (done == threads) return;
        size_t waiting = 0;
        while (fibers[waiting].state == DONE) waiting++;
        for (size_t i = 0; i < threads; i++)
            if (fibers[i].state == DONE || fibers[i].line != fibers[waiting].line)
                leave(whereabouts(fibers[waiting]) + ", but " + place(i) + " " + whereabouts(fibers[i]), waiting);
        for (size_t i = 0; i < threads; i++) fibers[i].state = READY;
    }
}

void on_signal(int number, siginfo_t* info, void*) {
    char text[96];
    snprintf(text, sizeof text, "%s at address %p", number == SIGSEGV ? "access outside of memory" :
        number == SIGBUS ? "bus error" : "arithmetic fault", info->si_addr);
    leave(text, running);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};

// Faults come back as errors while it lives.
struct Signals {
    struct sigaction before[3];
    stack_t stack_before;

    Signals() {
        static char* stack = map(STACK, false);
        stack_t mine = {};
        mine.ss_sp = stack, mine.ss_size = STACK;
        sigaltstack(&mine, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

}  // namespace

namespace emulator {

void fail(const char* format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    leave(text, running);
}

void* static_shared(int id, size_t bytes, size_t alignment) {
    auto found = std::find_if(regions.begin(), regions.end(), [&](const Region& r) { return r.id == id; });
    if (found == regions.end()) found = regions.insert(found, Region{id, map(SHARED, true) + SHARED, nullptr, false});
    if (!found->is_in_use) {
        shared_bytes += bytes;
        if (shared_bytes > SHARED)
            fail("%zu bytes of shared memory; a block has %zu unless the launch asks for more", shared_bytes, SHARED);
        found->data = found->end - (bytes + alignment - 1) / alignment * alignment;
        memset(found->data, 0xff, bytes);
        found->is_in_use = true;
    }
    return found->data;
}

void* dynamic_shared(size_t alignment) {
    if (reinterpret_cast<uintptr_t>(dynamic_data) % alignment)
        fail("dynamic shared memory of %zu bytes is no whole number of its elements", dynamic_bytes);
    return dynamic_data;
}

void check_bounds(unsigned most_threads) {
    if (blockDim.x * blockDim.y * blockDim.z > most_threads)
        fail("the block has %u threads and its launch bounds say %u", blockDim.x * blockDim.y * blockDim.z, most_threads);
}

unsigned lane() { return static_cast<unsigned>(running % 32); }

void barrier(int line) {
    fibers[running].line = line;
    wait_as(AT_BARRIER);
}

const uint64_t* exchange(unsigned mask, uint64_t value, const char* operation, int line) {
    Fiber& me = fibers[running];
    if (!(mask >> lane() & 1)) fail("%s of line %d with mask %08x, which leaves out the lane itself", operation, line, mask);
    me.line = line, me.mask = mask, me.operation = operation, me.value = value;
    wait_as(AT_EXCHANGE);
    return me.received;
}

void Launch::run(void (*thread)(void*), void* call) const {
    if (last_error != cudaSuccess) return;  // as after a fault on a GPU, until somebody asks for the error
    ::kernel = kernel;
    size_t threads = size_t{block.x} * block.y * block.z;
    auto text = [](dim3 d) { return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")"; };
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return refuse(cudaErrorInvalidConfiguration,
            "a grid of " + text(grid) + "; each size is 1 to 65535, the first to 2147483647");
    if (!threads || threads > MOST_THREADS || block.z > 64)
        return refuse(cudaErrorInvalidConfiguration,
            "blocks of " + text(block) + " threads; there may be 1 to 1024, and 64 along z");
    if (shared > SHARED)
        return refuse(cudaErrorInvalidValue, std::to_string(shared) + " bytes of shared memory; a block has " +
            std::to_string(SHARED) + " unless the launch asks for more");
    if (launched.find(::kernel + "\n") == std::string::npos) launched += ::kernel + "\n";
    if (!stacks) stacks = map(MOST_THREADS * STACK, false);
    static char* dynamic = map(SHARED, true);
    gridDim = grid, blockDim = block, thread_function = thread, thread_argument = call;
    dynamic_bytes = shared, dynamic_data = dynamic + SHARED - shared;

    Signals signals;
    if (sigsetjmp(way_out, 1) == 0) {
        is_in_kernel = true;
        uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, step = order == DESCENDING ? blocks - 1 : 1;
        uint64_t b = order == DESCENDING ? blocks - 1 : 0;
        if (order == RANDOM) {
            b = random_below(blocks);
            // A step with no divisor in common meets each block once.
            while (std::gcd(step = 1 + random_below(blocks), blocks) != 1) {}
        }
        for (uint64_t n = 0; n < blocks; n++, b = (b + step) % blocks) {
            blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y));
            run_block();
        }
    }
    is_in_kernel = false;
}

}  // namespace emulator

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorString(cudaError_t) { return message.c_str(); }

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}

// For the tests, by ctypes.
extern "C" __attribute__((visibility("default"))) void emulator_order(int which, uint64_t seed) {
    order = static_cast<Order>(which);
    random_state = seed * 2 + 1;
}

extern "C" __attribute__((visibility("default"))) void emulator_fault(int which) { emulator::fault = which; }

// The kernels launched so far, each once, with a line's end after each.
extern "C" __attribute__((visibility("default"))) const char* emulator_launched() { return launched.c_str(); }

// Bits to bits: 0 float to bfloat16, 1 float to half, 2 half to float.
extern "C" __attribute__((visibility("default"))) void emulator_convert(int what, const uint32_t* from, uint32_t* to,
    int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (what == 2) to[i] = emulator::bits<uint32_t>(__half2float(__half{static_cast<uint16_t>(from[i])}));
        else
            to[i] = what == 1 ? __float2half_rn(emulator::bits<float>(from[i])).raw :
                __float2bfloat16_rn(emulator::bits<float>(from[i])).raw;
    }
}

// What -fsanitize=undefined calls; the sanitizers' own library would print and go on, or end the process.
// Their data begin with a place.
namespace {

struct Place {
    const char* file;
    uint32_t line, column;
};

void on_undefined(const char* what, const void* data) {
    const Place* at = static_cast<const Place*>(data);
    if (!is_in_kernel) {
        fprintf(stderr, "%s:%u: %s\n", at->file, at->line, what);
        abort();
    }
    emulator::fail("%s:%u: %s", at->file, at->line, what);
}

}  // namespace

#define UNDEFINED(name, what) \
    extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(const void* data) { on_undefined(what, data); }

UNDEFINED(out_of_bounds_abort, "index outside of an array")
UNDEFINED(add_overflow_abort, "signed addition overflows")
UNDEFINED(sub_overflow_abort, "signed subtraction overflows")
UNDEFINED(mul_overflow_abort, "signed multiplication overflows")
UNDEFINED(negate_overflow_abort, "negation overflows")
UNDEFINED(divrem_overflow_abort, "division by zero or overflow")
UNDEFINED(shift_out_of_bounds_abort, "shift by more bits than there are")
UNDEFINED(load_invalid_value_abort, "a bool or enum with no value of its type")
UNDEFINED(pointer_overflow_abort, "pointer arithmetic leaves the address space, or starts at null")
UNDEFINED(missing_return, "a function ends without its value")
UNDEFINED(builtin_unreachable, "what cannot be reached is reached")

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(const void* data, uintptr_t address) {
    on_undefined(address == 0 ? "access through null" : "misaligned access", data);
}
