// Products with packed matrices for Python: rows of activations as a format wants them, linear maps of them, and what
// the machine can do at most.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "pool.h"

namespace nb = nanobind;

namespace plait {
namespace {

using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstIds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Shown = nb::ndarray<nb::numpy, const T, nb::ndim<2>>;

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw nb::value_error(otherwise.c_str());
}

constexpr int64_t kMostSize = int64_t{1} << 31;  // products of sizes below do not overflow

WeightFormat weight_format(int format) {
    require(format >= 0 && format <= static_cast<int>(WeightFormat::int4_g128),
            "there is no weight format " + std::to_string(format));
    return static_cast<WeightFormat>(format);
}

// The value that `name` stands for.
template <class T, size_t count> T named(const char* const (&names)[count], const std::string& name, const char* what) {
    std::string known;
    for (size_t i = 0; i < count; ++i) {
        if (name == names[i]) return static_cast<T>(i);
        known += (i ? ", " : "") + std::string(names[i]);
    }
    throw nb::value_error(("there is no " + std::string(what) + " '" + name + "'; there are: " + known).c_str());
}
constexpr const char* kActivationNames[] = {"silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"};
constexpr const char* kEpilogueNames[] = {"store", "add", "gate_up", "activate"};

// task(thread) on every thread of the pool, or on this one alone.
template <class Task> void run_on(Pool* pool, const Task& task) {
    if (pool) return pool->run(task);
    Pool(1, nullptr, 0).run(task);  // for the way it treats denormal numbers
}
// task(unit) for every unit.
template <class Task> void for_units(Pool* pool, int64_t units, const Task& task) {
    const int threads = pool ? pool->threads() : 1;
    std::vector<WorkCounter> counters(static_cast<size_t>(threads));
    run_on(pool, [&](int thread) { take_units(counters.data(), threads, thread, units, task); });
}

// ---- activations ----------------------------------------------------------------------------------------------------

class QuantizedRows {
  public:
    QuantizedRows(const KernelTable& table, WeightFormat format, const ConstMatrix& values) : format_(format) {
        const auto rows = static_cast<int64_t>(values.shape(0));
        depth_ = static_cast<int64_t>(values.shape(1));
        require(rows < kMostSize && depth_ > 0 && depth_ < kMostSize,
                "rows of " + std::to_string(depth_) + " inputs cannot be quantised");
        out_.rows = rows;
        out_.padded_depth = round_up(depth_, depth_unit(format));
        row_bytes_ = out_.padded_depth * code_bytes(format);
        groups_ = group_size(format) ? out_.padded_depth / group_size(format) : format == WeightFormat::int8;
        codes_ = std::make_unique<std::byte[]>(static_cast<size_t>(rows * row_bytes_));
        scales_.resize(static_cast<size_t>(rows * groups_));
        eight_sums_.resize(group_size(format) ? scales_.size() : 0);
        finite_ = std::make_unique<bool[]>(static_cast<size_t>(rows));
        out_.codes = codes_.get();
        out_.scales = scales_.empty() ? nullptr : scales_.data();
        out_.eight_sums = eight_sums_.empty() ? nullptr : eight_sums_.data();
        const nb::gil_scoped_release released;
        for_units(nullptr, rows, [&](int64_t row) {
            finite_[row] = table.quantize_row(format, values.data() + row * depth_, depth_, out_, row);
        });
    }

    WeightFormat format() const { return format_; }
    int64_t depth() const { return depth_; }
    const ActivationRows& rows() const { return out_; }
    Shown<uint8_t> codes() const {
        return shown(reinterpret_cast<const uint8_t*>(codes_.get()), row_bytes_);
    }
    Shown<float> scales() const { return shown(scales_.data(), groups_); }
    Shown<int32_t> eight_sums() const { return shown(eight_sums_.data(), group_size(format_) ? groups_ : 0); }
    Shown<bool> finite() const { return shown(finite_.get(), 1); }

  private:
    template <class T> Shown<T> shown(const T* data, int64_t width) const {
        const size_t shape[] = {static_cast<size_t>(out_.rows), static_cast<size_t>(width)};
        return Shown<T>(data, 2, shape, nb::find(this));
    }

    WeightFormat format_;
    int64_t depth_, row_bytes_, groups_;
    std::unique_ptr<std::byte[]> codes_;
    std::vector<float> scales_;
    std::vector<int32_t> eight_sums_;
    std::unique_ptr<bool[]> finite_;
    ActivationRows out_;
};

void make_rows(QuantizedRows* rows, const ConstMatrix& values, int format, const std::string& isa) {
    new (rows) QuantizedRows(table_named(isa), weight_format(format), values);
}

// ---- products -------------------------------------------------------------------------------------------------------

PackedMatrix packed_matrix(const ConstBytes& memory, int64_t offset, int64_t columns, const QuantizedRows& rows) {
    PackedMatrix matrix;
    matrix.format = rows.format();
    matrix.columns = columns;
    matrix.depth = rows.depth();
    require(columns > 0 && columns < kMostSize, "a matrix has at least one column and less than 2^31");
    const auto bytes = static_cast<int64_t>(memory.shape(0));
    require(offset >= 0 && offset <= bytes && matrix.bytes() <= bytes - offset,
            "the packed matrix at byte " + std::to_string(offset) + " takes " + std::to_string(matrix.bytes()) +
                " bytes, more than the " + std::to_string(bytes) + " of its memory leave");
    matrix.data = reinterpret_cast<const std::byte*>(memory.data()) + offset;
    require(reinterpret_cast<uintptr_t>(matrix.data) % 64 == 0, "packed matrices are aligned to 64 bytes");
    return matrix;
}

void linear(const ConstBytes& memory, int64_t offset, int64_t columns, const QuantizedRows& rows, const Matrix& out,
            const std::string& epilogue, const std::string& activation, const std::optional<ConstRow>& bias,
            float scale, float swiglu_alpha, float swiglu_limit, const std::optional<ConstIds>& input_rows,
            int64_t unit_rows, Pool* pool, const std::string& isa) {
    const KernelTable& table = table_named(isa);
    const PackedMatrix matrix = packed_matrix(memory, offset, columns, rows);
    LinearWork work;
    work.weights = &matrix;
    work.inputs = rows.rows();
    work.rows = rows.rows().rows;
    if (input_rows) {
        work.rows = static_cast<int64_t>(input_rows->shape(0));
        work.input_rows = input_rows->data();
        for (int64_t row = 0; row < work.rows; ++row)
            require(work.input_rows[row] >= 0 && work.input_rows[row] < rows.rows().rows,
                    "there are " + std::to_string(rows.rows().rows) + " input rows and no row " +
                        std::to_string(work.input_rows[row]));
    }
    work.epilogue.kind = named<EpilogueKind>(kEpilogueNames, epilogue, "epilogue");
    work.epilogue.activation = named<Activation>(kActivationNames, activation, "activation");
    work.epilogue.scale = scale;
    work.epilogue.swiglu_alpha = swiglu_alpha;
    work.epilogue.swiglu_limit = swiglu_limit;
    const bool gated = work.epilogue.kind == EpilogueKind::gate_up;
    require(gated || work.epilogue.activation != Activation::clamped_swiglu,
            "clamped_swiglu wants gates and ups: 'gate_up'");
    require(!gated || columns % kPanelColumns == 0, "gates and ups come in whole panels of 64 columns");
    const int64_t width = gated ? columns / 2 : columns;
    require(static_cast<int64_t>(out.shape(0)) == work.rows && static_cast<int64_t>(out.shape(1)) == width,
            "out is [" + std::to_string(out.shape(0)) + ", " + std::to_string(out.shape(1)) + "], not [" +
                std::to_string(work.rows) + ", " + std::to_string(width) + "]");
    std::vector<float> padded_bias;
    if (bias) {
        require(static_cast<int64_t>(bias->shape(0)) == columns, "bias has " + std::to_string(bias->shape(0)) +
                                                                     " numbers, not one for each of the " +
                                                                     std::to_string(columns) + " columns");
        padded_bias.resize(static_cast<size_t>(matrix.panels() * kPanelColumns));
        std::copy_n(bias->data(), columns, padded_bias.data());
        work.epilogue.bias = padded_bias.data();
    }
    work.epilogue.out = out.data();
    work.epilogue.out_stride = width;
    require(unit_rows >= 0, "unit_rows is not negative");
    const int64_t unit = unit_rows ? unit_rows : std::max<int64_t>(work.rows, 1);
    const int64_t pieces = (work.rows + unit - 1) / unit;
    const nb::gil_scoped_release released;
    for_units(pool, matrix.panels() * pieces, [&](int64_t index) {
        const int64_t begin = index % pieces * unit;
        // linear_scratch_bytes is 0 for every format.
        table.linear_panel(work, index / pieces, begin, std::min(work.rows, begin + unit), nullptr);
    });
}

void bind_products(nb::module_& m) {
    nb::class_<QuantizedRows>(m, "QuantizedRows",
                              "Rows of activations as a weight format wants them; see ActivationRows in csrc/table.h.")
        .def("__init__", make_rows, nb::arg("values").noconvert(), nb::arg("format"), nb::arg("isa") = "",
             "From float32 [rows, inputs].")
        .def_prop_ro("codes", &QuantizedRows::codes, "The bytes of each row, padding included: uint8 [rows, bytes].")
        .def_prop_ro("scales", &QuantizedRows::scales, "float32 [rows, groups]; one group for int8, none for bf16.")
        .def_prop_ro("eight_sums", &QuantizedRows::eight_sums, "Eight times the sum of each int4 group's codes, int32.")
        .def_prop_ro("finite", &QuantizedRows::finite, "Whether all values of the row were: bool [rows, 1].");
    m.def("linear", linear, nb::arg("memory"), nb::arg("offset"), nb::arg("columns"), nb::arg("rows"),
          nb::arg("out").noconvert(), nb::arg("epilogue") = "store", nb::arg("activation") = "silu",
          nb::arg("bias").noconvert().none() = nb::none(), nb::arg("scale") = 1.0f, nb::arg("swiglu_alpha") = 0.0f,
          nb::arg("swiglu_limit") = 0.0f, nb::arg("input_rows").noconvert().none() = nb::none(),
          nb::arg("unit_rows") = 0, nb::arg("pool").none() = nb::none(), nb::arg("isa") = "",
          "The matrix of `columns` outputs packed at byte `offset` of `memory`, times rows of its format, into `out`, "
          "float32. Output row r is made from input row input_rows[r], or r. A unit of work has `unit_rows` rows, or all.");
}

// ---- measures -------------------------------------------------------------------------------------------------------

constexpr int64_t kStreamUnit = 1 << 20;

int64_t read_stream(const ConstBytes& memory, Pool* pool, const std::string& isa) {
    const KernelTable& table = table_named(isa);
    const int64_t units = static_cast<int64_t>(memory.shape(0)) / kStreamUnit;
    require(units > 0, "reading takes at least a mebibyte");
    const auto* data = reinterpret_cast<const std::byte*>(memory.data());
    std::atomic<int32_t> sum{0};
    const nb::gil_scoped_release released;
    for_units(pool, units, [&](int64_t unit) { sum ^= table.read_stream(data + unit * kStreamUnit, kStreamUnit); });
    return units * kStreamUnit;
}

int64_t repeat_dot(int format, int64_t dots, Pool* pool, const std::string& isa) {
    const KernelTable& table = table_named(isa);
    const WeightFormat known = weight_format(format);
    require(dots >= 0 && dots < kMostSize, "dots must lie in 0 .. 2^31 - 1");
    const int64_t threads = pool ? pool->threads() : 1;
    std::atomic<bool> used{false};
    const nb::gil_scoped_release released;
    run_on(pool, [&](int) { used = table.repeat_dot(known, dots) != 0.0f; });
    return threads * dots * 2 * (64 / code_bytes(known));
}

void bind_measures(nb::module_& m) {
    m.def("read_stream", read_stream, nb::arg("memory"), nb::arg("pool").none() = nb::none(), nb::arg("isa") = "",
          "Read all whole mebibytes of memory, from front to back; returns how many bytes that were.");
    m.def("repeat_dot", repeat_dot, nb::arg("format"), nb::arg("dots"), nb::arg("pool").none() = nb::none(),
          nb::arg("isa") = "",
          "Multiply registers as a format's products do, `dots` times a thread; returns how many operations that is.");
}

}  // namespace

void bind_linear(nb::module_& m) {
    bind_products(m);
    bind_measures(m);
}

}  // namespace plait
