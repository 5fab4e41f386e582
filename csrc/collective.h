// Sums over the ranks of a tensor-parallel group, inside a forward pass.

#pragma once

#include <cstdint>

namespace plait {

// One reduction: every thread of every rank writes its share of partial(); then all threads of the rank's pool have met
// at a barrier; then thread 0 calls exchange(); then all meet again; then each thread calls add_sum over its share.
class Collective {
  public:
    virtual ~Collective() = default;
    virtual int rank() const = 0;
    virtual int ranks() const = 0;
    // Where this rank's partial sums of the next reduction go: room for `floats` numbers.
    virtual float* partial(int64_t floats) = 0;
    // Make `floats` partial sums visible to the others and wait for theirs. False after a timeout or a peer's death,
    // then and in every later call; error() says which rank and why.
    virtual bool exchange(int64_t floats) = 0;
    // out[i] += scale * (sum over ranks, in rank order, of their partial[i]) for begin <= i < end.
    virtual void add_sum(float* out, int64_t begin, int64_t end, float scale) = 0;
    virtual const char* error() const = 0;
};

}  // namespace plait
