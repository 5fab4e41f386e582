// A group of processes on one host: sums and small gathers through one region of shared memory.
//
// The region is a memfd that rank 0 makes and the others inherit: it has no name and goes with the last process that
// maps it. Each rank has two buffers for sums and two for gathers, used in turn, and publishes "my n-th is written" in
// a counter on a cache line of its own. Two are enough: who writes its n-th has finished its exchange n - 1, so
// everyone has published n - 1, hence has read n - 2, whose buffer this is.
//
// Every rank adds all ranks' numbers itself, in rank order: the same bits everywhere, no second round.
//
// Waits spin, then give up the core, then sleep in short naps. They end with a deadline, with the death of the rank
// that is waited for, or when any rank has given up: the first failure is written into the region and is everybody's.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "collective.h"

namespace plait {

// out[i] += scale * (terms[0][i] + terms[1][i] + ...) for begin <= i < end.
void add_terms(const float* const* terms, int ranks, float* out, int64_t begin, int64_t end, float scale);

class SharedMemoryCollective final : public Collective {
  public:
    // Give an empty memfd its size and header, and seal its size. For rank 0, before any process attaches.
    // Throws std::invalid_argument.
    static void prepare(int fd, int ranks, int64_t max_floats, int64_t max_gather_bytes);

    // Attach as `rank`. `fd` may be closed afterwards. Throws std::invalid_argument if the region is not one that
    // `prepare` made for these sizes, or the rank is taken.
    SharedMemoryCollective(int fd, int rank, int ranks, int64_t max_floats, int64_t max_gather_bytes, double timeout_s);
    ~SharedMemoryCollective() override;
    SharedMemoryCollective(const SharedMemoryCollective&) = delete;
    SharedMemoryCollective& operator=(const SharedMemoryCollective&) = delete;

    int rank() const override { return rank_; }
    int ranks() const override { return ranks_; }
    float* partial(int64_t floats) override;
    bool exchange(int64_t floats) override;
    void add_sum(float* out, int64_t begin, int64_t end, float scale) override;
    const char* error() const override { return error_.c_str(); }

    // Every rank brings bytes, as many as it likes up to max_gather_bytes; returns when all have. False as `exchange`.
    bool gather(const void* bytes, int64_t size);
    // What `rank` brought to the latest gather; valid until the next one.
    const std::byte* gathered(int rank, int64_t* size) const;

    // End the group: every wait of every rank, now and later, fails with a sentence that names this rank.
    void leave();

    int64_t max_floats() const { return max_floats_; }
    int64_t max_gather_bytes() const { return max_gather_bytes_; }
    int64_t exchanges() const { return exchanges_; }
    int64_t exchanged_floats() const { return exchanged_floats_; }

  private:
    struct Header;
    struct Turn;
    struct Member;
    struct Layout;

    Member& member(int rank) const;
    float* sums(int rank, uint64_t turn) const;
    std::byte* gathers(int rank, uint64_t turn) const;
    bool wait_for_all(Turn Member::*kind, uint64_t turn);
    bool wait_for(int peer, const Turn& theirs, uint64_t turn);
    bool peer_has_ended(int peer);
    bool fail(uint32_t reason, int rank);
    bool has_failed();
    void describe_failure();

    int rank_, ranks_;
    int64_t max_floats_, max_gather_bytes_;
    double timeout_s_;
    std::byte* region_ = nullptr;
    int64_t region_bytes_ = 0;
    uint64_t sum_turn_ = 0, gather_turn_ = 0;
    int64_t exchanges_ = 0, exchanged_floats_ = 0;
    std::vector<int> process_fds_;  // of the peers, opened when first looked at
    std::vector<const float*> terms_;
    std::string error_;
};

}  // namespace plait
