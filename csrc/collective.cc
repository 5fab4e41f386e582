// The shared-memory group: see shared_memory.h for how it works.

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>

#include "shared_memory.h"
#include "table.h"

namespace plait {
namespace {

constexpr char kMagic[8] = {'p', 'l', 'a', 'i', 't', 's', 'u', 'm'};
constexpr uint32_t kVersion = 1;
constexpr int kMostRanks = 64;
constexpr int64_t kMostNumbers = int64_t{1} << 40;
constexpr int64_t kPage = 4096;

// A step of a large model takes milliseconds between two sums, a small one microseconds: spin for what is cheaper than
// a switch of threads, leave the core to whom it may belong for a while, then nap.
constexpr int64_t kSpinNs = 50'000;
constexpr int64_t kYieldNs = 2'000'000;
constexpr int64_t kFirstNapNs = 20'000, kLongestNapNs = 500'000;
// How often a waiting rank looks whether the others still live: a crash is noticed within a tenth of a second.
constexpr int64_t kLookNs = 20'000'000;

enum Reason : uint32_t { kEnded = 1, kSilent = 2, kLeft = 3, kOutOfStep = 4 };

constexpr int kNotOpened = -1, kNoProcessFd = -2;
constexpr int64_t kNoProcess = -1;

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// When a process began, in clock ticks since boot; kNoProcess if there is none, or only its remains. With the process
// id it names a process for good.
int64_t process_start(int64_t pid) {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(pid));
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return kNoProcess;
    char text[1024];
    const ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    if (size <= 0) return kNoProcess;
    text[size] = 0;
    // "pid (name) state ..." where the name may hold anything; the start is field 22, the state field 3.
    const char* at = std::strrchr(text, ')');
    if (!at || at[1] != ' ' || at[2] == 'Z' || at[2] == 'X') return kNoProcess;
    ++at;
    for (int field = 3; at && field <= 22; ++field) at = std::strchr(at + 1, ' ');
    long long start = kNoProcess;
    // `at` is the space after field 22: step back over its digits.
    if (!at) return kNoProcess;
    const char* begin = at;
    while (begin[-1] != ' ') --begin;
    std::sscanf(begin, "%lld", &start);
    return start;
}

}  // namespace

struct SharedMemoryCollective::Header {
    char magic[8];
    uint32_t version;
    int32_t ranks;
    int64_t max_floats, max_gather_bytes, region_bytes;
    alignas(128) std::atomic<uint64_t> failure;  // reason << 32 | rank; 0 while all is well
};

struct SharedMemoryCollective::Turn {
    alignas(128) std::atomic<uint64_t> count;  // turns whose content is written
    std::atomic<int64_t> sizes[2];             // of either buffer: numbers, or bytes
};

struct SharedMemoryCollective::Member {
    std::atomic<int64_t> pid;  // 0 until it has attached
    std::atomic<int64_t> start;
    Turn sum, gather;
};

struct SharedMemoryCollective::Layout {
    int64_t members, sums, sum_bytes, gathers, gather_bytes, end;

    Layout(int ranks, int64_t max_floats, int64_t max_gather_bytes) {
        members = kPage;
        sum_bytes = round_up(max_floats * static_cast<int64_t>(sizeof(float)), kPage);
        gather_bytes = round_up(max_gather_bytes, kPage);
        sums = round_up(members + ranks * static_cast<int64_t>(sizeof(Member)), kPage);
        gathers = sums + 2 * ranks * sum_bytes;
        end = gathers + 2 * ranks * gather_bytes;
    }
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free,
              "the counters are shared between processes");

namespace {

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

void check_sizes(int rank, int ranks, int64_t max_floats, int64_t max_gather_bytes) {
    if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks) {
        refuse("rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " is none: there may be 1 to " +
               std::to_string(kMostRanks) + " ranks");
    }
    if (max_floats < 1 || max_floats > kMostNumbers || max_gather_bytes < 1 || max_gather_bytes > kMostNumbers) {
        refuse("a group needs room for at least one number and one byte, and for at most 2^40");
    }
}

}  // namespace

void add_terms(const float* const* terms, int ranks, float* out, int64_t begin, int64_t end, float scale) {
    constexpr int64_t kBlock = 256;  // the running sums stay in the first-level cache
    float sum[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
        const int64_t count = end - at < kBlock ? end - at : kBlock;
        std::memcpy(sum, terms[0] + at, count * sizeof(float));
        for (int rank = 1; rank < ranks; ++rank) {
            const float* __restrict term = terms[rank] + at;
            for (int64_t i = 0; i < count; ++i) sum[i] += term[i];
        }
        float* __restrict target = out + at;
        for (int64_t i = 0; i < count; ++i) target[i] += scale * sum[i];
    }
}

void SharedMemoryCollective::prepare(int fd, int ranks, int64_t max_floats, int64_t max_gather_bytes) {
    static_assert(sizeof(Header) <= kPage);
    check_sizes(0, ranks, max_floats, max_gather_bytes);
    const Layout layout(ranks, max_floats, max_gather_bytes);
    struct stat found;
    if (fstat(fd, &found) != 0 || found.st_size != 0) {
        refuse("the memory of a group must come from a new and empty memfd");
    }
    // Sealed, so that no process can take pages away under another.
    if (ftruncate(fd, layout.end) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
        refuse("the shared memory cannot be made " + std::to_string(layout.end) +
               " bytes long and sealed: " + std::strerror(errno));
    }
    void* mapped = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) refuse(std::string("the shared memory cannot be mapped: ") + std::strerror(errno));
    auto* header = new (mapped) Header{};
    std::memcpy(header->magic, kMagic, sizeof kMagic);
    header->version = kVersion;
    header->ranks = ranks;
    header->max_floats = max_floats;
    header->max_gather_bytes = max_gather_bytes;
    header->region_bytes = layout.end;
    munmap(mapped, kPage);
}

SharedMemoryCollective::SharedMemoryCollective(int fd, int rank, int ranks, int64_t max_floats,
                                               int64_t max_gather_bytes, double timeout_s)
    : rank_(rank), ranks_(ranks), max_floats_(max_floats), max_gather_bytes_(max_gather_bytes), timeout_s_(timeout_s) {
    check_sizes(rank, ranks, max_floats, max_gather_bytes);
    if (!(timeout_s > 0 && timeout_s < 1e6)) refuse("the timeout of a group must be above 0 s");
    const Layout layout(ranks, max_floats, max_gather_bytes);
    struct stat found;
    if (fstat(fd, &found) != 0) refuse("the shared memory of the group is not open in this process");
    const int seals = fcntl(fd, F_GET_SEALS);
    if (found.st_size != layout.end || seals < 0 || !(seals & F_SEAL_SHRINK)) {
        refuse("the shared memory has " + std::to_string(found.st_size) + " bytes, and a group of " +
               std::to_string(ranks) + " ranks with these sizes has a sealed region of " + std::to_string(layout.end));
    }
    void* mapped = mmap(nullptr, layout.end, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) refuse(std::string("the shared memory cannot be mapped: ") + std::strerror(errno));
    region_ = static_cast<std::byte*>(mapped);
    region_bytes_ = layout.end;
    const auto& header = *reinterpret_cast<const Header*>(region_);
    std::string wrong;
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
        wrong = "the shared memory is not that of a group of ranks";
    } else if (header.version != kVersion) {
        wrong = "the shared memory has layout version " + std::to_string(header.version) +
                ", and this program writes " + std::to_string(kVersion) + ": start all ranks from one installation";
    } else if (header.ranks != ranks || header.max_floats != max_floats ||
               header.max_gather_bytes != max_gather_bytes || header.region_bytes != layout.end) {
        wrong = "the shared memory was made for other sizes than this rank was given";
    } else {
        int64_t nobody = 0;
        Member& own = member(rank);
        own.start.store(process_start(getpid()), std::memory_order_relaxed);
        if (!own.pid.compare_exchange_strong(nobody, getpid(), std::memory_order_release, std::memory_order_relaxed)) {
            wrong = "rank " + std::to_string(rank) + " of the group is process " + std::to_string(nobody) + " already";
        }
    }
    if (!wrong.empty()) {
        munmap(mapped, layout.end);
        refuse(wrong);
    }
    process_fds_.assign(ranks, kNotOpened);
    terms_.assign(ranks, nullptr);
}

SharedMemoryCollective::~SharedMemoryCollective() {
    leave();
    for (const int fd : process_fds_) {
        if (fd >= 0) close(fd);
    }
    munmap(region_, region_bytes_);
}

SharedMemoryCollective::Member& SharedMemoryCollective::member(int rank) const {
    return reinterpret_cast<Member*>(region_ + kPage)[rank];
}

float* SharedMemoryCollective::sums(int rank, uint64_t turn) const {
    const Layout layout(ranks_, max_floats_, max_gather_bytes_);
    const auto buffer = 2 * rank + static_cast<int64_t>(turn % 2);
    return reinterpret_cast<float*>(region_ + layout.sums + buffer * layout.sum_bytes);
}

std::byte* SharedMemoryCollective::gathers(int rank, uint64_t turn) const {
    const Layout layout(ranks_, max_floats_, max_gather_bytes_);
    const auto buffer = 2 * rank + static_cast<int64_t>(turn % 2);
    return region_ + layout.gathers + buffer * layout.gather_bytes;
}

float* SharedMemoryCollective::partial(int64_t floats) {
    return floats <= max_floats_ ? sums(rank_, sum_turn_ + 1) : nullptr;
}

bool SharedMemoryCollective::exchange(int64_t floats) {
    const uint64_t turn = ++sum_turn_;
    Turn& own = member(rank_).sum;
    own.sizes[turn % 2].store(floats, std::memory_order_relaxed);
    own.count.store(turn, std::memory_order_release);
    if (!wait_for_all(&Member::sum, turn)) return false;
    for (int peer = 0; peer < ranks_; ++peer) {
        if (member(peer).sum.sizes[turn % 2].load(std::memory_order_relaxed) != floats) return fail(kOutOfStep, peer);
        terms_[peer] = sums(peer, turn);
    }
    ++exchanges_;
    exchanged_floats_ += floats;
    return true;
}

void SharedMemoryCollective::add_sum(float* out, int64_t begin, int64_t end, float scale) {
    add_terms(terms_.data(), ranks_, out, begin, end, scale);
}

bool SharedMemoryCollective::gather(const void* bytes, int64_t size) {
    const uint64_t turn = ++gather_turn_;
    Turn& own = member(rank_).gather;
    std::memcpy(gathers(rank_, turn), bytes, size);
    own.sizes[turn % 2].store(size, std::memory_order_relaxed);
    own.count.store(turn, std::memory_order_release);
    return wait_for_all(&Member::gather, turn);
}

const std::byte* SharedMemoryCollective::gathered(int rank, int64_t* size) const {
    *size = member(rank).gather.sizes[gather_turn_ % 2].load(std::memory_order_relaxed);
    return gathers(rank, gather_turn_);
}

void SharedMemoryCollective::leave() { fail(kLeft, rank_); }

// ---- waiting --------------------------------------------------------------------------------------------------------

bool SharedMemoryCollective::wait_for_all(Turn Member::*kind, uint64_t turn) {
    if (has_failed()) return false;
    for (int peer = 0; peer < ranks_; ++peer) {
        if (peer != rank_ && !wait_for(peer, member(peer).*kind, turn)) return false;
    }
    return true;
}

bool SharedMemoryCollective::wait_for(int peer, const Turn& theirs, uint64_t turn) {
    const auto arrived = [&] { return theirs.count.load(std::memory_order_acquire) >= turn; };
    if (arrived()) return true;
    const int64_t began = now_ns();
    const int64_t deadline = began + static_cast<int64_t>(timeout_s_ * 1e9);
    int64_t look = began + kLookNs, nap = kFirstNapNs;
    while (true) {
        for (int i = 0; i < 32; ++i) {
            if (arrived()) return true;
            pause_core();
        }
        const int64_t now = now_ns();
        if (now - began < kSpinNs) continue;
        if (now >= look) {
            if (has_failed()) return false;
            // What it published before it ended still counts.
            if (peer_has_ended(peer) && !arrived()) return fail(kEnded, peer);
            look = now + kLookNs;
        }
        if (now >= deadline) return fail(kSilent, peer);
        if (now - began < kYieldNs) {
            sched_yield();
        } else {
            const timespec pause{0, static_cast<long>(nap)};
            nanosleep(&pause, nullptr);
            nap = nap * 2 < kLongestNapNs ? nap * 2 : kLongestNapNs;
        }
    }
}

bool SharedMemoryCollective::peer_has_ended(int peer) {
    const int64_t pid = member(peer).pid.load(std::memory_order_acquire);
    if (pid == 0) return false;  // not attached yet: the deadline watches it
    const int64_t start = member(peer).start.load(std::memory_order_relaxed);
    int& fd = process_fds_[peer];
    if (fd == kNotOpened) {
        fd = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
        if (fd < 0) fd = kNoProcessFd;
        // The number may have gone to another process before the descriptor was opened.
        if (fd >= 0 && process_start(pid) != start) return true;
    }
    if (fd == kNoProcessFd) return process_start(pid) != start;
    pollfd ended{fd, POLLIN, 0};
    return poll(&ended, 1, 0) > 0;
}

// The first failure of any rank stands; returns false.
bool SharedMemoryCollective::fail(uint32_t reason, int rank) {
    auto& failure = reinterpret_cast<Header*>(region_)->failure;
    uint64_t none = 0;
    failure.compare_exchange_strong(none, static_cast<uint64_t>(reason) << 32 | static_cast<uint32_t>(rank));
    describe_failure();
    return false;
}

bool SharedMemoryCollective::has_failed() {
    if (reinterpret_cast<const Header*>(region_)->failure.load(std::memory_order_relaxed) == 0) return false;
    describe_failure();
    return true;
}

void SharedMemoryCollective::describe_failure() {
    if (!error_.empty()) return;
    const uint64_t failure = reinterpret_cast<Header*>(region_)->failure.load();
    const auto rank = static_cast<int>(failure & 0xffffffff);
    const int64_t pid = rank < ranks_ ? member(rank).pid.load() : 0;
    const std::string name = "rank " + std::to_string(rank) + (pid ? " (process " + std::to_string(pid) + ")" : "");
    char limit[32];
    std::snprintf(limit, sizeof limit, "%g s", timeout_s_);
    switch (failure >> 32) {
        case kEnded: error_ = name + " has ended"; break;
        case kSilent:
            error_ = pid ? name + " has not answered for " + limit : name + " did not join the group within " + limit;
            break;
        case kLeft: error_ = name + " has left the group"; break;
        default: error_ = name + " brought another amount to a sum: the ranks do not run the same step"; break;
    }
}

}  // namespace plait
