// How a forward pass gets its threads, and how they meet.
//
// A run is one generation. The caller writes the task, counts the workers that have to finish, and raises the
// generation; a worker that sees it raised works and counts itself off. A worker that has waited long enough goes to
// sleep: it says so first and looks at the generation once more after, while the caller raises the generation first and
// looks for sleepers after. Both in sequentially consistent order, so one of them sees the other and no wake-up is
// lost; and where nobody sleeps, waking costs one load.
//
// Thread 0 is the thread that calls run, and is never pinned, whatever `cores` says: it is the engine's own thread,
// which does other work between runs, and where the others are pinned the system leaves it the core that remains.
//
// Denormal numbers count as zero in the workers, and in the caller while it is inside run: they cost a hundred times as
// much as others on some processors, and mean nothing here.

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace plait {
namespace {

// How long to wait on a busy core: a few times what waking a sleeper takes (some 20 us), and longer than most waits at
// a barrier inside a forward pass.
constexpr std::chrono::microseconds kSpinTime{75};

// Takes some ten to a hundred cycles, and leaves the core's resources to its other hardware thread.
inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // "yield" does nothing on most cores
#endif
}

// Looks again and again for kSpinTime. False if that was in vain.
template <class Ready>
bool spin(const Ready& ready) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point end{};  // unknown while the wait is too short to ask the clock
    for (;;) {
        for (int look = 0; look < 64; ++look) {
            if (ready()) return true;
            relax();
        }
        const Clock::time_point now = Clock::now();
        if (end == Clock::time_point{}) end = now + kSpinTime;
        if (now > end) return false;
    }
}

// Waits for what other running threads will do soon. They may have lost their core to this one: then it yields.
template <class Ready>
void wait_for_peers(const Ready& ready) {
    if (spin(ready)) return;
    while (!ready()) sched_yield();
}

// Lets denormal numbers count as zero on this thread while it lives.
class DenormalsAsZero {
  public:
#if defined(__x86_64__)
    DenormalsAsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
    ~DenormalsAsZero() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
    DenormalsAsZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | uint64_t{1} << 24));
    }
    ~DenormalsAsZero() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#endif
    DenormalsAsZero(const DenormalsAsZero&) = delete;
    DenormalsAsZero& operator=(const DenormalsAsZero&) = delete;

  private:
#if defined(__x86_64__)
    unsigned before_;
#elif defined(__aarch64__)
    uint64_t before_;
#endif
};

// A core that is not ours to have is no error: the thread then runs where the system lets it.
void pin_to(int core) {
#if defined(__linux__)
    if (core < 0 || core >= CPU_SETSIZE) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    static_cast<void>(core);
#endif
}

// Ends the task of a thread that waits for one that has failed.
struct Abandoned final : std::exception {
    const char* what() const noexcept override { return "another thread of the pool has failed"; }
};

}  // namespace

struct Pool::State {
    const int threads;
    const pid_t process = getpid();
    std::vector<std::thread> workers;
    std::mutex sleep_lock;
    std::condition_variable wake;

    // Written between runs.
    const std::function<void(int)>* task = nullptr;
    bool closing = false;
    std::exception_ptr failure;  // by the first thread whose task threw

    // Apart, since some threads write one while others wait on another.
    alignas(64) std::atomic<bool> busy{false};
    alignas(64) std::atomic<uint32_t> generation{0};
    alignas(64) std::atomic<int> sleepers{0};
    alignas(64) std::atomic<int> working{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> phase{0};  // barriers passed
    std::atomic<bool> failed{false};

    explicit State(int thread_count) : threads(thread_count) {}

    ~State() {
        closing = true;
        start_generation();
        for (std::thread& worker : workers) worker.join();
    }

    void start_generation() {
        generation.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst) == 0) return;
        { const std::lock_guard<std::mutex> none_is_between_looking_and_sleeping(sleep_lock); }
        wake.notify_all();
    }

    void work(int thread) {
        try {
            (*task)(thread);
        } catch (...) {
            if (!failed.exchange(true, std::memory_order_acq_rel)) failure = std::current_exception();
        }
    }

    void serve(int thread) {
        const DenormalsAsZero for_good;
        // The next run starts only after this worker has finished the last: it can never be behind by two.
        for (uint32_t seen = 0;; ++seen) {
            const auto started = [&] { return generation.load(std::memory_order_seq_cst) != seen; };
            if (!spin(started)) {
                std::unique_lock<std::mutex> lock(sleep_lock);
                sleepers.fetch_add(1, std::memory_order_seq_cst);
                wake.wait(lock, started);
                sleepers.fetch_sub(1, std::memory_order_relaxed);
            }
            if (closing) return;
            work(thread);
            working.fetch_sub(1, std::memory_order_release);
        }
    }
};

Pool::Pool(int threads, const int* cores, int core_count) {
    if (threads < 1) throw std::invalid_argument("a pool needs at least one thread");
    state_ = std::make_unique<State>(threads);
    for (int thread = 1; thread < threads; ++thread) {
        const int core = thread < core_count ? cores[thread] : -1;
        state_->workers.emplace_back([state = state_.get(), thread, core] {
            if (core >= 0) pin_to(core);
            state->serve(thread);
        });
    }
}

Pool::~Pool() {
    // In a forked child there is nobody to join, and locks may be held for ever: leave it all as it is.
    if (getpid() != state_->process) state_.release();
}

int Pool::threads() const { return state_->threads; }

void Pool::run(const std::function<void(int)>& task) {
    const DenormalsAsZero while_running;
    State& state = *state_;
    if (state.threads == 1) return task(0);
    if (getpid() != state.process)
        throw std::runtime_error("a pool's threads stay in the parent process when it forks; make a new pool");
    if (state.busy.exchange(true, std::memory_order_acquire))
        throw std::logic_error("this pool is in a run already; a pool does one run at a time");

    state.task = &task;
    state.failed.store(false, std::memory_order_relaxed);
    state.arrived.store(0, std::memory_order_relaxed);
    state.working.store(state.threads - 1, std::memory_order_relaxed);
    state.start_generation();
    state.work(0);
    wait_for_peers([&] { return state.working.load(std::memory_order_acquire) == 0; });

    state.task = nullptr;
    const std::exception_ptr failure = std::exchange(state.failure, nullptr);
    state.busy.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
}

void Pool::barrier() {
    State& state = *state_;
    if (state.threads == 1) return;
    const uint32_t before = state.phase.load(std::memory_order_relaxed);  // stays until this thread arrives
    if (state.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == state.threads) {
        state.arrived.store(0, std::memory_order_relaxed);
        state.phase.store(before + 1, std::memory_order_release);
        return;
    }
    const auto all_arrived = [&] { return state.phase.load(std::memory_order_acquire) != before; };
    wait_for_peers([&] { return all_arrived() || state.failed.load(std::memory_order_relaxed); });
    if (!all_arrived()) throw Abandoned();
}

// ---- memory ---------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// A whole number of huge pages, at least one.
int64_t mapped_bytes(int64_t bytes) {
    return bytes == 0 ? kHugePageBytes : (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
}

}  // namespace

Arena::Arena(int64_t bytes) : bytes_(bytes) {
    if (bytes < 0 || bytes > INT64_MAX - 2 * kHugePageBytes) throw std::bad_alloc();
    const int64_t wanted = mapped_bytes(bytes);
    // The system aligns to small pages only: map one huge page more, and give back what lies before and after.
    void* mapped = mmap(nullptr, wanted + kHugePageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    std::byte* start = static_cast<std::byte*>(mapped);
    const int64_t before = (kHugePageBytes - reinterpret_cast<intptr_t>(mapped) % kHugePageBytes) % kHugePageBytes;
    data_ = start + before;
    if (before > 0) munmap(start, before);
    if (before < kHugePageBytes) munmap(data_ + wanted, kHugePageBytes - before);
#if defined(__linux__)
    madvise(data_, wanted, MADV_HUGEPAGE);  // refused by a kernel without them: slower, not wrong
#endif
}

Arena::~Arena() { munmap(data_, mapped_bytes(bytes_)); }

}  // namespace plait
