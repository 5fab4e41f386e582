// One persistent pool of pinned threads for a worker's forward passes.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace plait {

// A counter on its own cache line, from which threads take units of work.
struct alignas(64) WorkCounter {
    std::atomic<int64_t> next{0};
    int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// work(unit) for those of `units` that this thread gets. Units are cut into as many shares as there are counters, each
// taken in order: a thread begins with the share of its own number and then helps with the others. With a share for
// each thread, what a thread reads is contiguous; with a single share, units start in order, whoever takes them.
template <class Work> void take_units(WorkCounter* counters, int shares, int thread, int64_t units, Work&& work) {
    for (int other = 0; other < shares; ++other) {
        const int share = (thread + other) % shares;
        const int64_t begin = units * share / shares, count = units * (share + 1) / shares - begin;
        for (int64_t unit = counters[share].take(); unit < count; unit = counters[share].take()) work(begin + unit);
    }
}

class Pool {
  public:
    // `threads` includes the caller of `run`, which is thread 0 and never pinned. `cores`: where to pin each of the others
    // (cores[0] is not used; empty: nowhere).
    Pool(int threads, const int* cores, int core_count);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const;
    // Calls task(thread) for thread = 0 .. threads - 1, number 0 on the calling thread, and returns when all have
    // returned. Workers wait by spinning a while, then sleeping.
    void run(const std::function<void(int)>& task);
    // To be called by every thread inside `run`; returns when all have called it. Spins, then yields the core. Throws if
    // another thread's task has thrown.
    void barrier();

  private:
    struct State;
    std::unique_ptr<State> state_;
};

// Zeroed memory of huge pages where the system has them; aligned to 2 MiB. Throws std::bad_alloc.
class Arena {
  public:
    explicit Arena(int64_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

  private:
    std::byte* data_;
    int64_t bytes_;
};

}  // namespace plait
