#include "threads.h"

#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace {

// libgomp's stable entry point: runs task(context) on `threads` threads, the caller among them, and waits.
using GompParallel = void (*)(void (*task)(void*), void* context, unsigned threads, unsigned flags);
GompParallel gomp_parallel = nullptr;

// Workers sleep between calls. One call at a time; a second caller meanwhile runs its task alone, which gives the same result.
class Pool {
public:
    void run(int threads, void (*task)(void*), void* context) {
        std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (!mine) return task(context);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; workers_ < threads - 1; workers_++) std::thread([this, id = workers_] { work(id); }).detach();
            task_ = task;
            context_ = context;
            wanted_ = running_ = threads - 1;
            generation_++;
        }
        start_.notify_all();
        task(context);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

private:
    void work(int id) {
        std::unique_lock<std::mutex> lock(mutex_);
        // A worker is made inside the call that it is made for, before the generation moves on.
        for (unsigned long seen = generation_ - (id < wanted_);;) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (id >= wanted_) continue;
            lock.unlock();
            task_(context_);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable start_, done_;
    void (*task_)(void*) = nullptr;
    void* context_ = nullptr;
    int workers_ = 0, wanted_ = 0, running_ = 0;
    unsigned long generation_ = 0;
};

// Never destroyed: its workers may wait in it while the process exits.
Pool* pool = nullptr;
std::mutex making_pool;

Pool& the_pool() {
    std::lock_guard<std::mutex> lock(making_pool);
    if (pool == nullptr) {
        pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
        // A forked child has none of the workers, so it makes its own pool.
        static bool registered = false;
        if (!registered) pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
        registered = true;
#endif
    }
    return *pool;
}

}  // namespace

bool share_openmp(const char* library) {
    gomp_parallel = nullptr;
#if defined(__unix__) || defined(__APPLE__)
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return false;
    // A look-up through a handle searches what the library depends on, whatever its OpenMP runtime's file is called.
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
#endif
    return gomp_parallel != nullptr;
}

const char* threading() { return gomp_parallel != nullptr ? "openmp" : "own pool"; }

void on_threads(int threads, void (*task)(void*), void* context) {
    if (gomp_parallel != nullptr)
        gomp_parallel(task, context, static_cast<unsigned>(threads), 0);
    else
        the_pool().run(threads, task, context);
}
