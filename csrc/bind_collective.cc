// Groups of ranks for Python: one in shared memory, and one whose exchange is a Python function.

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "shared_memory.h"

namespace nb = nanobind;

namespace plait {
namespace {

using Numbers = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The exchange is a Python function: exchange(terms), terms float32 [ranks, numbers] with this rank's row filled; it
// fills the others or raises.
class CallbackCollective final : public Collective {
  public:
    CallbackCollective(nb::callable exchange, int rank, int ranks, int64_t max_floats)
        : callable_(std::move(exchange)), rank_(rank), ranks_(ranks), max_floats_(max_floats) {
        if (ranks < 1 || rank < 0 || rank >= ranks || max_floats < 1) {
            throw std::invalid_argument("a group needs 0 <= rank < ranks and room for at least one number");
        }
        // Not touched before it is used: most groups never see their largest step.
        terms_ = std::shared_ptr<float[]>(new float[static_cast<size_t>(ranks) * max_floats]);
        for (int peer = 0; peer < ranks; ++peer) rows_.push_back(terms_.get() + peer * max_floats);
    }

    int rank() const override { return rank_; }
    int ranks() const override { return ranks_; }
    float* partial(int64_t floats) override { return floats <= max_floats_ ? rows_[rank_] : nullptr; }

    bool exchange(int64_t floats) override {
        if (!error_.empty()) return false;
        nb::gil_scoped_acquire acquired;
        try {
            auto* kept = new std::shared_ptr<float[]>(terms_);
            nb::capsule owner(kept, [](void* held) noexcept { delete static_cast<std::shared_ptr<float[]>*>(held); });
            const size_t shape[] = {static_cast<size_t>(ranks_), static_cast<size_t>(floats)};
            const int64_t strides[] = {max_floats_, 1};
            callable_(nb::ndarray<nb::numpy, float>(terms_.get(), 2, shape, owner, strides));
            return true;
        } catch (nb::python_error& failure) {
            error_ = nb::str(failure.value()).c_str();
            if (error_.empty()) error_ = failure.what();
        } catch (const std::exception& failure) {
            error_ = failure.what();
        }
        return false;
    }

    void add_sum(float* out, int64_t begin, int64_t end, float scale) override {
        add_terms(rows_.data(), ranks_, out, begin, end, scale);
    }

    const char* error() const override { return error_.c_str(); }

  private:
    nb::callable callable_;
    int rank_, ranks_;
    int64_t max_floats_;
    std::shared_ptr<float[]> terms_;  // [ranks][max_floats]
    std::vector<float*> rows_;
    std::string error_;
};

void add_sum(Collective& group, const Numbers& numbers, const Sums& out, float scale) {
    const auto floats = static_cast<int64_t>(numbers.shape(0));
    if (static_cast<int64_t>(out.shape(0)) != floats) {
        throw std::invalid_argument("as many sums come out as numbers go in");
    }
    float* partial = group.partial(floats);
    if (!partial) throw std::invalid_argument("the group has no room for " + std::to_string(floats) + " numbers");
    nb::gil_scoped_release released;
    std::memcpy(partial, numbers.data(), floats * sizeof(float));
    if (!group.exchange(floats)) throw std::runtime_error(group.error());
    group.add_sum(out.data(), 0, floats, scale);
}

nb::list gather(SharedMemoryCollective& group, const nb::bytes& payload, bool wanted) {
    const auto size = static_cast<int64_t>(payload.size());
    if (size > group.max_gather_bytes()) {
        throw std::invalid_argument(std::to_string(size) + " bytes are more than the " +
                                    std::to_string(group.max_gather_bytes()) + " that a gather takes");
    }
    bool arrived = false;
    {
        nb::gil_scoped_release released;
        arrived = group.gather(payload.data(), size);
    }
    if (!arrived) throw std::runtime_error(group.error());
    nb::list brought;
    for (int rank = 0; wanted && rank < group.ranks(); ++rank) {
        int64_t bytes = 0;
        const std::byte* data = group.gathered(rank, &bytes);
        if (bytes < 0 || bytes > group.max_gather_bytes())
            throw std::runtime_error("rank " + std::to_string(rank) + " brought a size that cannot be");
        brought.append(nb::bytes(data, static_cast<size_t>(bytes)));
    }
    return brought;
}

}  // namespace

void bind_collective(nb::module_& m) {
    nb::class_<Collective>(m, "Collective", "A group of tensor-parallel ranks, as one of them sees it.")
        .def_prop_ro("rank", &Collective::rank)
        .def_prop_ro("ranks", &Collective::ranks)
        .def_prop_ro("error", [](const Collective& group) { return std::string(group.error()); },
                     "Which rank failed and why; empty while none has.")
        .def("add_sum", add_sum, nb::arg("numbers"), nb::arg("out"), nb::arg("scale") = 1.0f,
             "out += scale * (sum over ranks, in rank order, of their numbers), float32. RuntimeError: a rank failed.");

    nb::class_<SharedMemoryCollective, Collective>(m, "SharedMemoryCollective",
                                                   "Ranks on one host; see csrc/shared_memory.h.")
        .def(nb::init<int, int, int, int64_t, int64_t, double>(), nb::arg("fd"), nb::arg("rank"), nb::arg("ranks"),
             nb::arg("max_floats"), nb::arg("max_gather_bytes"), nb::arg("timeout_s"),
             "Attach to the memory behind `fd`, which may be closed then. ValueError if it is not a group's of these "
             "sizes.")
        .def_static("prepare", &SharedMemoryCollective::prepare, nb::arg("fd"), nb::arg("ranks"), nb::arg("max_floats"),
                    nb::arg("max_gather_bytes"), "Give a new memfd its size and header, before any rank attaches.")
        .def("gather", gather, nb::arg("payload"), nb::arg("wanted") = true,
             "What every rank brought, by rank, once all have; empty if not wanted here. RuntimeError: a rank failed.")
        .def("leave", &SharedMemoryCollective::leave, "End the group: what others wait for, now or later, fails.")
        .def_prop_ro("exchanges", &SharedMemoryCollective::exchanges, "Sums so far.")
        .def_prop_ro("exchanged_floats", &SharedMemoryCollective::exchanged_floats,
                     "Numbers that this rank brought to them.");

    nb::class_<CallbackCollective, Collective>(m, "CallbackCollective",
                                               "Ranks that exchange their numbers through a Python function.")
        .def(nb::init<nb::callable, int, int, int64_t>(), nb::arg("exchange"), nb::arg("rank"), nb::arg("ranks"),
             nb::arg("max_floats"),
             "exchange(terms) gets float32 [ranks, numbers] with row `rank` filled; it fills the others, or raises.");
}

}  // namespace plait
