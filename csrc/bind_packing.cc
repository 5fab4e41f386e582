// Weights into the layouts of table.h, panel by panel on several threads, and back.

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "bindings.h"
#include "pool.h"  // WorkCounter

namespace plait {
namespace {

namespace nb = nanobind;

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Source = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using Rows = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr nb::dlpack::dtype kBfloat16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw nb::value_error(otherwise.c_str());
}

WeightFormat weight_format(int format) {
    require(format >= 0 && format <= static_cast<int>(WeightFormat::int4_g128),
            "there is no weight format " + std::to_string(format));
    return static_cast<WeightFormat>(format);
}

PackedMatrix matrix_of(int format, int64_t columns, int64_t depth) {
    PackedMatrix matrix;
    matrix.format = weight_format(format);
    matrix.columns = columns;
    matrix.depth = depth;
    // Products of sizes below must not overflow.
    require(columns > 0 && depth > 0 && columns < (int64_t{1} << 31) && depth < (int64_t{1} << 31),
            "a matrix of " + std::to_string(columns) + " columns and " + std::to_string(depth) +
                " inputs cannot be packed");
    return matrix;
}

// The matrix at `offset` of `memory`, which must hold all of it.
PackedMatrix placed(PackedMatrix matrix, const uint8_t* memory, int64_t memory_bytes, int64_t offset) {
    require(offset >= 0 && offset <= memory_bytes && matrix.bytes() <= memory_bytes - offset,
            "the packed matrix at byte " + std::to_string(offset) + " takes " + std::to_string(matrix.bytes()) +
                " bytes, more than the " + std::to_string(memory_bytes) + " of its memory leave");
    matrix.data = reinterpret_cast<const std::byte*>(memory) + offset;
    require(reinterpret_cast<uintptr_t>(matrix.data) % 64 == 0, "packed matrices are aligned to 64 bytes");
    return matrix;
}

// Calls task(panel) for every panel, from up to `threads` threads; fewer where the system has no more to give.
void for_panels(int64_t panels, int64_t threads, const std::function<void(int64_t)>& task) {
    WorkCounter counter;
    const auto work = [&] {
        for (int64_t panel = counter.take(); panel < panels; panel = counter.take()) task(panel);
    };
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(threads));
        while (static_cast<int64_t>(others.size()) + 1 < threads) others.emplace_back(work);
    } catch (const std::system_error&) {
        // The calling thread does what is left.
    }
    work();
    for (std::thread& other : others) other.join();
}

int64_t packed_bytes(int format, int64_t columns, int64_t depth) { return matrix_of(format, columns, depth).bytes(); }

void pack_into(Bytes out, int64_t offset, Source source, Rows rows, int64_t depth_begin, int64_t depth, int format,
               int64_t threads, const std::string& isa) {
    const KernelTable& table = table_named(isa);
    const bool is_bf16 = source.dtype() == kBfloat16;
    require(is_bf16 || source.dtype() == nb::dtype<float>(), "weights are packed from bfloat16 or float32");
    require(source.shape(1) == 1 || source.stride(1) == 1, "the inputs of a row must lie side by side");
    const int64_t source_rows = static_cast<int64_t>(source.shape(0));
    const int64_t source_depth = static_cast<int64_t>(source.shape(1));
    require(depth_begin >= 0 && depth_begin <= source_depth && depth <= source_depth - depth_begin,
            "inputs " + std::to_string(depth_begin) + " to " + std::to_string(depth_begin + depth) +
                " do not lie in a source of " + std::to_string(source_depth));
    const int64_t columns = static_cast<int64_t>(rows.shape(0));
    require(columns % kPanelColumns == 0, "rows are named for whole panels of 64 columns");
    for (int64_t column = 0; column < columns; ++column) {
        require(rows(column) >= -1 && rows(column) < source_rows,
                "the source has " + std::to_string(source_rows) + " rows and no row " + std::to_string(rows(column)));
    }
    require(threads >= 1, "packing takes at least one thread");
    const PackedMatrix matrix = placed(matrix_of(format, columns, depth), out.data(),
                                       static_cast<int64_t>(out.shape(0)), offset);
    std::byte* packed = reinterpret_cast<std::byte*>(out.data()) + offset;
    const std::byte* first =
        static_cast<const std::byte*>(source.data()) + depth_begin * (is_bf16 ? 2 : 4);
    const int64_t stride = source_rows > 1 ? source.stride(0) : source_depth;

    // A thread costs about as much as packing this.
    constexpr int64_t kBytesPerThread = 1 << 18;
    const int64_t useful = std::min(matrix.panels(), 1 + matrix.bytes() / kBytesPerThread);
    nb::gil_scoped_release released;
    for_panels(matrix.panels(), std::min(threads, useful), [&](int64_t panel) {
        table.pack_panel(matrix.format, first, is_bf16, stride, rows.data() + panel * kPanelColumns, depth,
                         packed + panel * matrix.stride());
    });
}

nb::ndarray<nb::numpy, float> unpack_from(ConstBytes memory, int64_t offset, int64_t columns, int64_t depth, int format,
                                          const std::string& isa) {
    const KernelTable& table = table_named(isa);
    const PackedMatrix matrix =
        placed(matrix_of(format, columns, depth), memory.data(), static_cast<int64_t>(memory.shape(0)), offset);
    const int64_t rows = matrix.panels() * kPanelColumns;
    auto values = std::make_unique<float[]>(static_cast<size_t>(rows * depth));
    {
        nb::gil_scoped_release released;
        for (int64_t panel = 0; panel < matrix.panels(); ++panel) {
            table.unpack_panel(matrix.format, matrix.panel(panel), depth,
                               values.get() + panel * kPanelColumns * depth);
        }
    }
    float* data = values.release();
    const nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
    return {data, {static_cast<size_t>(columns), static_cast<size_t>(depth)}, owner};
}

}  // namespace

void bind_packing(nb::module_& m) {
    m.def("packed_bytes", packed_bytes, nb::arg("format"), nb::arg("columns"), nb::arg("depth"),
          "Memory of a packed matrix.");
    m.def("pack_into", pack_into, nb::arg("out"), nb::arg("offset"), nb::arg("source"), nb::arg("rows"),
          nb::arg("depth_begin"), nb::arg("depth"), nb::arg("format"), nb::arg("threads"), nb::arg("isa") = "",
          "Pack inputs depth_begin .. depth_begin + depth of `source` [n, k], bfloat16 or float32, at byte `offset` of "
          "`out`; packed column c is row rows[c], zero if that is -1. The panels are shared among the threads.");
    m.def("unpack_from", unpack_from, nb::arg("memory"), nb::arg("offset"), nb::arg("columns"), nb::arg("depth"),
          nb::arg("format"), nb::arg("isa") = "", "What a packed matrix means, float32 [columns, depth].");
}

}  // namespace plait
