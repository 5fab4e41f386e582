// The thread pool and memory for Python, and the small kernels of one table for tests.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "pool.h"

namespace nb = nanobind;

namespace plait {
namespace {

// The functions of vmath.inl are no part of a table. Every table has the bits of the plain loops, so their accuracy is
// that of all.
#define INLINE static inline __attribute__((always_inline))
#include "simd_portable.inl"
#include "vmath.inl"

using Row = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Array = nb::ndarray<nb::numpy, float, nb::ndim<1>>;
using IdArray = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;
using Memory = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

constexpr int kMostThreads = 1024;
constexpr int64_t kMostExperts = 1 << 16;  // route_row keeps their scores on the stack

void require(bool holds, const std::string& sentence) {
    if (!holds) throw nb::value_error(sentence.c_str());
}
template <class Vector>
int64_t length(const Vector& vector) { return static_cast<int64_t>(vector.shape(0)); }

// A numpy array that owns what it shows.
template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> as_array(std::vector<T> values) {
    auto* kept = new std::vector<T>(std::move(values));
    const nb::capsule owner(kept, [](void* held) noexcept { delete static_cast<std::vector<T>*>(held); });
    const size_t shape[] = {kept->size()};
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), 1, shape, owner);
}

// `row`, if there is one, has to have `width` numbers.
const float* numbers_of(const std::optional<ConstRow>& row, int64_t width, const char* name) {
    if (!row) return nullptr;
    require(length(*row) == width, std::string(name) + " has " + std::to_string(length(*row)) + " numbers, not " +
                                       std::to_string(width));
    return row->data();
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <F16 function(F16)>
Array mapped(const ConstRow& values) {
    std::vector<float> out(values.data(), values.data() + values.size());
    for (size_t i = 0; i < out.size(); i += 16) {
        const size_t count = std::min<size_t>(16, out.size() - i);
        float lanes[16] = {};
        std::memcpy(lanes, &out[i], count * sizeof(float));
        store_f(lanes, function(load_f(lanes)));
        std::memcpy(&out[i], lanes, count * sizeof(float));
    }
    return as_array(std::move(out));
}

Array norm(const ConstRow& row, const std::string& kind, float eps, const std::optional<ConstRow>& weight,
           const std::optional<ConstRow>& bias, const std::string& isa) {
    require(kind == "rms" || kind == "layer", "a norm is 'rms' or 'layer', not '" + kind + "'");
    require(eps >= 0.0f, "eps must not be negative");
    NormWork work;
    work.kind = kind == "rms" ? NormKind::rms : NormKind::layer;
    work.eps = eps;
    work.weight = numbers_of(weight, length(row), "weight");
    work.bias = numbers_of(bias, length(row), "bias");
    std::vector<float> out(row.size());
    table_named(isa).norm_row(work, row.data(), length(row), out.data());
    return as_array(std::move(out));
}

void rotate_heads(const Row& row, int64_t heads, int64_t dim, const ConstRow& cosines, const ConstRow& sines,
                  const std::string& isa) {
    const int64_t pairs = length(cosines);
    require(heads >= 0 && dim > 0 && dim <= length(row) && heads * dim == length(row),
            "row has " + std::to_string(length(row)) + " numbers, not heads * dim");
    require(length(sines) == pairs, "there must be as many sines as cosines");
    require(2 * pairs <= dim, "cosines and sines turn more than the head's " + std::to_string(dim) + " numbers");
    table_named(isa).rotate(row.data(), heads, dim, 2 * pairs, cosines.data(), sines.data());
}

void add(const Row& out, const ConstRow& row, float factor, const std::string& isa) {
    require(length(out) == length(row), "out and row differ in length");
    table_named(isa).add_row(out.data(), row.data(), length(row), factor);
}

Array small_product(const ConstMatrix& weights, const std::optional<ConstRow>& bias, const ConstRow& row,
                    const std::string& isa) {
    const auto columns = static_cast<int64_t>(weights.shape(0)), depth = static_cast<int64_t>(weights.shape(1));
    require(length(row) == depth, "row has " + std::to_string(length(row)) + " numbers, not the " +
                                      std::to_string(depth) + " inputs of weights");
    std::vector<float> out(static_cast<size_t>(columns));
    const float* added = numbers_of(bias, columns, "bias");
    table_named(isa).small_linear(weights.data(), added, row.data(), columns, depth, out.data());
    return as_array(std::move(out));
}

std::pair<IdArray, Array> route(const ConstRow& logits, int64_t chosen, bool sigmoid, bool renormalises, float scale,
                                int64_t groups, int64_t kept_groups, bool best_two,
                                const std::optional<ConstRow>& correction, const std::string& isa) {
    const int64_t experts = length(logits);
    require(experts >= 1 && experts <= kMostExperts, "there must be 1 to " + std::to_string(kMostExperts) + " experts");
    require(groups >= 1 && experts % groups == 0, "groups must divide the experts");
    require(kept_groups >= 1 && kept_groups <= groups, "kept_groups must lie in 1 .. groups");
    require(chosen >= 1 && chosen <= (groups > 1 ? experts / groups * kept_groups : experts),
            "chosen must lie in 1 .. the experts of the kept groups");
    RouterWork work;
    work.experts = experts;
    work.chosen = chosen;
    work.groups = groups;
    work.kept_groups = kept_groups;
    work.sigmoid = sigmoid;
    work.renormalises = renormalises;
    work.best_two = best_two;
    work.scale = scale;
    work.correction = numbers_of(correction, experts, "correction");
    std::vector<int32_t> ids(static_cast<size_t>(chosen));
    std::vector<float> weights(static_cast<size_t>(chosen));
    table_named(isa).route_row(work, logits.data(), ids.data(), weights.data());
    return {as_array(std::move(ids)), as_array(std::move(weights))};
}

int64_t fold(const ConstRow& values, int32_t first_id, const Row& best_values, const Ids& best_ids, int64_t filled,
             const std::string& isa) {
    const int64_t k = length(best_values);
    require(length(best_ids) == k, "best_values and best_ids differ in length");
    require(filled >= 0 && filled <= k, "filled must lie in 0 .. the length of best_values");
    require(first_id >= 0 && length(values) <= INT32_MAX - first_id, "ids must lie in 0 .. 2^31 - 1");
    std::vector<TopEntry> best(static_cast<size_t>(k));
    for (int64_t i = 0; i < filled; ++i) best[i] = {best_values.data()[i], best_ids.data()[i]};
    table_named(isa).fold_top(values.data(), length(values), first_id, best.data(), k, &filled);
    for (int64_t i = 0; i < filled; ++i) {
        best_values.data()[i] = best[i].value;
        best_ids.data()[i] = best[i].id;
    }
    return filled;
}

void bind_kernels(nb::module_& m) {
    const nb::arg_v isa = nb::arg("isa") = "";
    m.def("exp", mapped<exp_f>, nb::arg("values"), "e^x of float32 numbers as the kernels have it.");
    m.def("sigmoid", mapped<sigmoid_f>, nb::arg("values"), "1 / (1 + e^-x) of float32 numbers as the kernels have it.");
    m.def("tanh", mapped<tanh_f>, nb::arg("values"), "tanh(x) of float32 numbers as the kernels have it.");
    m.def("erf", mapped<erf_f>, nb::arg("values"), "The error function of float32 numbers as the kernels have it.");
    m.def("norm_row", norm, nb::arg("row").noconvert(), nb::arg("kind"), nb::arg("eps"),
          nb::arg("weight").noconvert().none() = nb::none(), nb::arg("bias").noconvert().none() = nb::none(), isa,
          "The RMS ('rms') or layer ('layer') norm of a float32 row.");
    m.def("rotate", rotate_heads, nb::arg("row").noconvert(), nb::arg("heads"), nb::arg("dim"),
          nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(), isa,
          "Turn the pairs (j, j + len(cosines)) of each head of a float32 row [heads * dim], in place.");
    m.def(
        "scale_row",
        [](const Row& row, float factor, const std::string& isa) {
            table_named(isa).scale_row(row.data(), length(row), factor);
        },
        nb::arg("row").noconvert(), nb::arg("factor"), isa, "row *= factor");
    m.def("add_row", add, nb::arg("out").noconvert(), nb::arg("row").noconvert(), nb::arg("factor"), isa,
          "out += row * factor");
    m.def(
        "softcap_row",
        [](const Row& row, float cap, const std::string& isa) {
            require(cap > 0.0f, "the cap must be positive");
            table_named(isa).softcap_row(row.data(), length(row), cap);
        },
        nb::arg("row").noconvert(), nb::arg("cap"), isa, "row = tanh(row / cap) * cap");
    m.def(
        "row_max",
        [](const ConstRow& row, const std::string& isa) { return table_named(isa).row_max(row.data(), length(row)); },
        nb::arg("row").noconvert(), isa, "The largest number of a float32 row; minus infinity if it is empty.");
    m.def("small_linear", small_product, nb::arg("weights").noconvert(), nb::arg("bias").noconvert().none(),
          nb::arg("row").noconvert(), isa, "weights [columns, depth] @ row [depth] + bias [columns], float32.");
    m.def("route_row", route, nb::arg("logits").noconvert(), nb::arg("chosen"), nb::arg("sigmoid") = false,
          nb::arg("renormalises") = false, nb::arg("scale") = 1.0f, nb::arg("groups") = 1, nb::arg("kept_groups") = 1,
          nb::arg("best_two") = false, nb::arg("correction").noconvert().none() = nb::none(), isa,
          "One token's experts (int32) and their weights (float32) from router logits, as plait.engine.moe.route.");
    m.def("fold_top", fold, nb::arg("values").noconvert(), nb::arg("first_id"), nb::arg("best_values").noconvert(),
          nb::arg("best_ids").noconvert(), nb::arg("filled"), isa,
          "Fold values with ids first_id .. into the best so far, which are `filled`; return how many they are now.");
}

// ---- threads and memory ---------------------------------------------------------------------------------------------

void make_pool(Pool* pool, int threads, const std::vector<int>& cores) {
    require(threads >= 1 && threads <= kMostThreads,
            "a pool has 1 to " + std::to_string(kMostThreads) + " threads, not " + std::to_string(threads));
    require(cores.empty() || cores.size() == static_cast<size_t>(threads),
            "cores names one core for each of the " + std::to_string(threads) + " threads, or none at all; there are " +
                std::to_string(cores.size()));
    for (const int core : cores) require(core >= 0, "a core's number is not negative");
    new (pool) Pool(threads, cores.data(), static_cast<int>(cores.size()));
}

void run_in_python(Pool& pool, const nb::callable& task) {
    const nb::gil_scoped_release others_run_python;
    pool.run([&](int thread) {
        const nb::gil_scoped_acquire this_one_does;
        task(thread);
    });
}

// How often a thread, after a barrier, saw another that had not yet arrived at it: never, if barriers work.
int64_t exercise(Pool& pool, int64_t runs, int64_t barriers) {
    struct alignas(64) Slot {
        std::atomic<int64_t> step{-1};
    };
    std::vector<Slot> slots(static_cast<size_t>(pool.threads()));
    std::atomic<int64_t> missed{0};
    for (int64_t run = 0; run < runs; ++run) {
        pool.run([&](int thread) {
            for (int64_t step = run * (barriers + 1); step < run * (barriers + 1) + barriers; ++step) {
                slots[thread].step.store(step, std::memory_order_relaxed);
                pool.barrier();
                for (const Slot& slot : slots) missed += slot.step.load(std::memory_order_relaxed) < step;
            }
            slots[thread].step.store(run * (barriers + 1) + barriers, std::memory_order_relaxed);
        });
        for (const Slot& slot : slots) missed += slot.step.load() != run * (barriers + 1) + barriers;
    }
    return missed;
}

void bind_threads_and_memory(nb::module_& m) {
    using without_gil = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Pool>(m, "Pool", "Threads that wait for a forward pass; see csrc/pool.h.")
        .def("__init__", make_pool, nb::arg("threads"), nb::arg("cores") = std::vector<int>(),
             "`threads` counts the one that runs a pass. `cores`: where each is pinned; the first, of that one, is not "
             "used.")
        .def_prop_ro("threads", &Pool::threads)
        .def("run", run_in_python, nb::arg("task"),
             "task(thread) on every thread; returns when all have. Raises what the first that failed raised; "
             "RuntimeError in a forked child and during another run.")
        .def("barrier", &Pool::barrier, without_gil(),
             "Inside a run: wait until all threads have called it. RuntimeError if another has failed.");
    m.def("exercise_pool", exercise, nb::arg("pool"), nb::arg("runs"), nb::arg("barriers"), without_gil(),
          "Runs with barriers; returns how often a thread passed one before another had arrived.");

    nb::class_<Arena>(m, "Arena", "Zeroed memory, of huge pages where the system has them. MemoryError if it is short.")
        .def(
            "__init__",
            [](Arena* arena, int64_t bytes) {
                require(bytes >= 0, "an arena has no negative size");
                new (arena) Arena(bytes);
            },
            nb::arg("bytes"))
        .def_prop_ro("bytes", &Arena::bytes)
        .def_prop_ro(
            "memory",
            [](nb::handle_t<Arena> self) {
                const Arena& arena = nb::cast<const Arena&>(self);
                const size_t shape[] = {static_cast<size_t>(arena.bytes())};
                return Memory(arena.data(), 1, shape, self);
            },
            "All of it as uint8 [bytes]; the array keeps the arena.");
}

}  // namespace

void bind_elementwise(nb::module_& m) {
    bind_kernels(m);
    bind_threads_and_memory(m);
}

}  // namespace plait
