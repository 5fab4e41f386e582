// The functions of linear.inl: packing, quantising rows, products.

#include <algorithm>

#include "check.h"

namespace plait {
namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4_g32, WeightFormat::int4_g128};
constexpr int64_t kDepths[] = {40, 264};
constexpr int64_t kColumns = 100;  // a whole panel and a part of one
constexpr int64_t kRows = 19;

bool is_int4(WeightFormat format) { return group_size(format) > 0; }

std::string named(WeightFormat format, int64_t depth) {
    const char* names[] = {"bf16", "int8", "int4_g32", "int4_g128"};
    return std::string(names[static_cast<int>(format)]) + ", depth " + std::to_string(depth);
}

// What table.h says a panel holds, read element by element.
struct Panel {
    WeightFormat format;
    int64_t padded_depth;
    const std::byte* data;

    int64_t group_bytes() const { return group_size(format) * kPanelColumns / 2 + kPanelColumns * 2; }
    // The integer code of the formats that have one.
    int code(int64_t column, int64_t k) const {
        if (!is_int4(format)) return read_at<int8_t>(data, (k / 4 * kPanelColumns + column) * 4 + k % 4);
        const int64_t group = k / group_size(format), inside = k % group_size(format), eighth = inside % 8;
        const std::byte* codes = data + group * group_bytes();
        const auto pair = read_at<uint8_t>(codes, (inside / 8 * kPanelColumns + column) * 4 + eighth % 4);
        return (eighth < 4 ? pair & 15 : pair >> 4) - 8;
    }
    float scale(int64_t column, int64_t k) const {
        if (!is_int4(format)) return read_at<float>(data, padded_depth * kPanelColumns + column * 4);
        const std::byte* group = data + k / group_size(format) * group_bytes();
        return from_bf16(read_at<uint16_t>(group, group_size(format) * kPanelColumns / 2 + column * 2));
    }
    int32_t correction(int64_t column) const {
        return read_at<int32_t>(data, padded_depth * kPanelColumns + (kPanelColumns + column) * 4);
    }
    float value(int64_t column, int64_t k) const {
        if (format == WeightFormat::bf16)
            return from_bf16(read_at<uint16_t>(data, ((k / 2 * kPanelColumns + column) * 2 + k % 2) * 2));
        return static_cast<float>(code(column, k)) * scale(column, k);
    }
};

struct Matrix {
    std::vector<float> source;  // [kColumns][depth]
    Buffer memory;
    PackedMatrix packed;

    Matrix(const KernelTable& table, WeightFormat format, int64_t depth, uint64_t seed)
        : source(random_floats(kColumns * depth, seed)), memory(bytes(format, depth)) {
        // The largest codes of both signs over a whole column, where sums of bytes saturate if they can.
        for (int64_t k = 0; k < depth; ++k) source[k] = k % 2 ? 0.5f : -0.5f, source[depth + k] = 0.5f;
        packed.format = format;
        packed.columns = kColumns;
        packed.depth = depth;
        packed.data = memory.data();
        for (int64_t panel = 0; panel < packed.panels(); ++panel) {
            int64_t rows[kPanelColumns];
            for (int64_t c = 0; c < kPanelColumns; ++c) {
                const int64_t column = panel * kPanelColumns + c;
                rows[c] = column < kColumns ? column : -1;
            }
            table.pack_panel(format, source.data(), false, depth, rows, depth, memory.data() + panel * packed.stride());
        }
    }
    Panel panel(int64_t index) const { return {packed.format, packed.padded_depth(), packed.panel(index)}; }

    static int64_t bytes(WeightFormat format, int64_t depth) {
        PackedMatrix sizes;
        sizes.format = format;
        sizes.columns = kColumns;
        sizes.depth = depth;
        return sizes.bytes();
    }
};

struct Rows {
    std::vector<float> source;  // [kRows][depth]
    Buffer codes, scales, sums;
    ActivationRows rows;

    Rows(const KernelTable& table, WeightFormat format, int64_t depth, uint64_t seed)
        : source(random_floats(kRows * depth, seed, 2.0f)),
          codes(kRows * round_up(depth, depth_unit(format)) * code_bytes(format)),
          scales(kRows * depth * 4 + 64), sums(kRows * depth * 4 + 64) {
        for (int64_t k = 0; k < depth; ++k) source[k] = 2.0f, source[depth + k] = k % 2 ? 2.0f : -2.0f;
        rows.codes = codes.data();
        rows.scales = scales.floats();
        rows.eight_sums = reinterpret_cast<int32_t*>(sums.data());
        rows.rows = kRows;
        rows.padded_depth = round_up(depth, depth_unit(format));
        for (int64_t row = 0; row < kRows; ++row)
            finite &= table.quantize_row(format, source.data() + row * depth, depth, rows, row);
    }
    bool finite = true;

    int64_t groups(WeightFormat format) const { return is_int4(format) ? rows.padded_depth / group_size(format) : 1; }
    float scale(WeightFormat format, int64_t row, int64_t k) const {
        return is_int4(format) ? rows.scales[row * groups(format) + k / group_size(format)] : rows.scales[row];
    }
    int code(WeightFormat format, int64_t row, int64_t k) const {
        const int64_t at = row * rows.padded_depth + k;
        return is_int4(format) ? read_at<int8_t>(rows.codes, at) : read_at<uint8_t>(rows.codes, at) - 128;
    }
    float half(int64_t row, int64_t k) const { return from_bf16(bits(row, k)); }
    uint16_t bits(int64_t row, int64_t k) const { return read_at<uint16_t>(rows.codes, (row * rows.padded_depth + k) * 2); }
};

// A group's scale is chosen: its codes are no further from the weights than with the scale that takes the largest to -8.
void check_group(Check& check, const Panel& panel, int64_t column, int64_t begin, const float* row, int64_t depth,
                 const std::string& what) {
    const int64_t end = std::min(depth, begin + group_size(panel.format));
    float largest = 0.0f;
    for (int64_t k = begin; k < end; ++k)
        if (std::abs(row[k]) > std::abs(largest)) largest = row[k];
    const double scale = from_bf16(to_bf16(largest * -0.125f));
    double error = 0, plain_error = 0;
    for (int64_t k = begin; k < end; ++k) {
        const double code = std::min(7.0, std::max(-8.0, std::nearbyint(row[k] / scale)));
        plain_error += (row[k] - code * scale) * (row[k] - code * scale);
        error += std::pow(static_cast<double>(row[k]) - panel.value(column, k), 2);
    }
    check.equal(error <= plain_error * 1.0001, true, what + ", error of a group");
}

void check_packing(const KernelTable& table) {
    Check pack(table, "pack_panel"), unpack(table, "unpack_panel"), column(table, "unpack_column");
    for (const WeightFormat format : kFormats) {
        for (const int64_t depth : kDepths) {
            const Matrix matrix(table, format, depth, 21);
            const std::string what = named(format, depth);
            pack.digest(matrix.packed.data, static_cast<size_t>(matrix.packed.bytes()));
            for (int64_t index = 0; index < matrix.packed.panels(); ++index) {
                const Panel panel = matrix.panel(index);
                std::vector<float> values(static_cast<size_t>(kPanelColumns * depth)), one(static_cast<size_t>(depth));
                table.unpack_panel(format, panel.data, depth, values.data());
                unpack.digest(values);
                for (int64_t c = 0; c < kPanelColumns; ++c) {
                    const int64_t from = index * kPanelColumns + c;
                    table.unpack_column(format, panel.data, c, depth, one.data());
                    column.same_bits(one.data(), values.data() + c * depth, one.size() * 4, what);
                    column.digest(one);
                    int32_t sum = 0;
                    for (int64_t k = 0; k < panel.padded_depth; ++k) {
                        const float want = from < kColumns && k < depth ? matrix.source[from * depth + k] : 0.0f;
                        const float got = panel.value(c, k);
                        // Half a step of rounding. int4 scales, which may be negative, are chosen for the whole group and may be
                        // as small as 0.84 of what takes its largest value to -8: then 8 / 0.84 is cut off to 7.
                        if (format == WeightFormat::bf16)
                            pack.equal(got, from_bf16(to_bf16(want)), what);
                        else if (want == 0.0f)
                            pack.equal(got, 0.0, what);
                        else
                            pack.near(got, want, std::abs(panel.scale(c, k)) * (is_int4(format) ? 2.6 : 0.5001), what);
                        if (k < depth) unpack.equal(values[c * depth + k], got, what);
                        if (format == WeightFormat::int8) sum += panel.code(c, k);
                    }
                    if (format == WeightFormat::int8) pack.equal(panel.correction(c), -128.0 * sum, what + ", correction");
                    if (!is_int4(format) || from >= kColumns) continue;
                    for (int64_t begin = 0; begin < depth; begin += group_size(format))
                        check_group(pack, panel, c, begin, matrix.source.data() + from * depth, depth, what);
                }
            }
            // From bfloat16, and rows taken in another order, with strides.
            std::vector<uint16_t> halves(static_cast<size_t>(kPanelColumns * (depth + 3)));
            std::vector<float> wide(halves.size());
            const auto numbers = random_floats(static_cast<int64_t>(halves.size()), 22);
            for (size_t i = 0; i < halves.size(); ++i) halves[i] = to_bf16(numbers[i]), wide[i] = from_bf16(halves[i]);
            int64_t order[kPanelColumns];
            for (int64_t c = 0; c < kPanelColumns; ++c) order[c] = c % 5 ? kPanelColumns - 1 - c : -1;
            Buffer a(matrix.packed.stride()), b(matrix.packed.stride());
            table.pack_panel(format, halves.data(), true, depth + 3, order, depth, a.data());
            table.pack_panel(format, wide.data(), false, depth + 3, order, depth, b.data());
            pack.same_bits(a.data(), b.data(), static_cast<size_t>(matrix.packed.stride()), what + ", from bfloat16");
            pack.digest(a.data(), static_cast<size_t>(matrix.packed.stride()));
        }
    }
}

void check_quantizing(const KernelTable& table) {
    Check check(table, "quantize_row");
    for (const WeightFormat format : kFormats) {
        for (const int64_t depth : kDepths) {
            Rows rows(table, format, depth, 23);
            const std::string what = named(format, depth);
            check.equal(rows.finite, true, what + ", finite");
            check.digest(rows.codes.data(), static_cast<size_t>(kRows * rows.rows.padded_depth * code_bytes(format)));
            for (int64_t row = 0; row < kRows; ++row) {
                int32_t sum = 0;
                for (int64_t k = 0; k < rows.rows.padded_depth; ++k) {
                    const float want = k < depth ? rows.source[row * depth + k] : 0.0f;
                    if (format == WeightFormat::bf16) {
                        check.equal(rows.bits(row, k), to_bf16(want), what);
                        continue;
                    }
                    const int code = rows.code(format, row, k);
                    const float scale = rows.scale(format, row, k);
                    check.near(static_cast<double>(code) * scale, want, scale * 0.5001, what);
                    check.equal(std::abs(code) <= 127, true, what + ", range");
                    if (!is_int4(format)) continue;
                    sum += code;
                    if ((k + 1) % group_size(format) == 0) {
                        const int64_t at = row * rows.groups(format) + k / group_size(format);
                        check.equal(rows.rows.eight_sums[at], 8.0 * sum, what + ", sum");
                        check.digest(rows.rows.eight_sums + at, 4);
                        check.digest(&scale, 4);
                        sum = 0;
                    }
                }
                if (format == WeightFormat::int8) check.digest(rows.rows.scales + row, 4);
            }
            std::vector<float> bad(static_cast<size_t>(depth), 1.0f), zero(bad.size(), 0.0f);
            check.equal(table.quantize_row(format, zero.data(), depth, rows.rows, 0), true, what + ", zeros");
            for (const float value : {INFINITY, -INFINITY, std::nanf("")}) {
                bad[depth - 1] = value;
                check.equal(table.quantize_row(format, bad.data(), depth, rows.rows, 0), false, what + ", not finite");
            }
        }
    }
}

// One output as the contract defines it, in that order of operations.
float product(const Matrix& matrix, const Rows& rows, int64_t column, int64_t row) {
    const WeightFormat format = matrix.packed.format;
    const Panel panel = matrix.panel(column / kPanelColumns);
    const int64_t c = column % kPanelColumns;
    if (format == WeightFormat::bf16) {
        float sum = 0.0f;
        for (int64_t k = 0; k < panel.padded_depth; k += 2) {
            sum = std::fma(panel.value(c, k + 1), rows.half(row, k + 1), sum);
            sum = std::fma(panel.value(c, k), rows.half(row, k), sum);
        }
        return sum;
    }
    const int64_t group = is_int4(format) ? group_size(format) : panel.padded_depth;
    float total = 0.0f;
    for (int64_t begin = 0; begin < panel.padded_depth; begin += group) {
        int32_t sum = 0;
        for (int64_t k = begin; k < begin + group; ++k) sum += panel.code(c, k) * rows.code(format, row, k);
        const float scale = panel.scale(c, begin) * rows.scale(format, row, begin);
        const float scaled = static_cast<float>(sum) * scale;
        total = is_int4(format) ? total + scaled : scaled;
    }
    return total;
}

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::gelu: return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh: return x * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return std::max(x, 0.0);
        default: return x / (1 + std::exp(-x));
    }
}
double gated(const Epilogue& epilogue, double gate, double up) {
    if (epilogue.activation != Activation::clamped_swiglu) return activated(epilogue.activation, gate) * up;
    const double limit = epilogue.swiglu_limit;
    gate = std::min(gate, limit);
    up = std::min(std::max(up, -limit), limit);
    return (up + 1) * gate / (1 + std::exp(-gate * epilogue.swiglu_alpha));
}

class Products {
  public:
    Products(const KernelTable& table, Check& check, const Matrix& matrix, const Rows& inputs)
        : table_(table), check_(check), matrix_(matrix), inputs_(inputs),
          what_(named(matrix.packed.format, matrix.packed.depth)),
          scratch_(table.linear_scratch_bytes(matrix.packed) + 64) {}

    // [rows][panels * 64] of one call a panel for each range of rows that `step` cuts; `out` is added to or overwritten.
    void run(const Epilogue& epilogue, int64_t rows, int64_t step, const int32_t* input_rows, std::vector<float>& out) {
        LinearWork work;
        work.weights = &matrix_.packed;
        work.inputs = inputs_.rows;
        work.input_rows = input_rows;
        work.rows = rows;
        work.epilogue = epilogue;
        work.epilogue.out = out.data();
        work.epilogue.out_stride = width();
        for (int64_t panel = 0; panel < matrix_.packed.panels(); ++panel)
            for (int64_t begin = 0; begin < rows; begin += step)
                table_.linear_panel(work, panel, begin, std::min(rows, begin + step), scratch_.data());
    }
    int64_t width() const { return matrix_.packed.panels() * kPanelColumns; }

    // Sums alone: the same bits as the definition, for every number of rows and however they are cut or chosen.
    std::vector<float> check_sums() {
        std::vector<float> want(static_cast<size_t>(kRows * width()));
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t column = 0; column < kColumns; ++column)
                want[row * width() + column] = product(matrix_, inputs_, column, row);
        std::vector<float> sums(want.size());
        for (int64_t rows = 1; rows <= kRows; ++rows) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            run({}, rows, rows, nullptr, sums);
            compare(sums, want, rows, "rows " + std::to_string(rows));
        }
        check_.digest(sums);
        std::vector<float> cut(want.size());
        run({}, kRows, 5, nullptr, cut);
        compare(cut, want, kRows, "in ranges of 5 rows");
        int32_t chosen[kRows];
        std::vector<float> moved(want.size()), moved_want(want.size());
        for (int64_t row = 0; row < kRows; ++row) {
            chosen[row] = static_cast<int32_t>((row * 7 + 3) % kRows);
            std::copy_n(want.begin() + chosen[row] * width(), width(), moved_want.begin() + row * width());
        }
        run({}, kRows, kRows, chosen, moved);
        compare(moved, moved_want, kRows, "rows chosen by input_rows");
        return want;
    }

    void check_epilogues(const std::vector<float>& sums) {
        const auto bias = random_floats(width(), 25), before = random_floats(kRows * width(), 26);
        for (const float* added : {static_cast<const float*>(nullptr), bias.data()}) {
            const auto sum = [&](int64_t row, int64_t column) {
                return sums[row * width() + column] + (added ? static_cast<double>(added[column]) : 0.0);
            };
            Epilogue epilogue;
            epilogue.bias = added;
            expect(epilogue, before, kColumns, sum, "store");
            epilogue.kind = EpilogueKind::add;
            epilogue.scale = 0.71f;
            expect(epilogue, before, kColumns, [&](int64_t row, int64_t column) {
                return before[row * width() + column] + sum(row, column) * static_cast<double>(epilogue.scale);
            }, "add");
            for (int activation = 0; activation <= 4; ++activation) {
                epilogue.activation = static_cast<Activation>(activation);
                epilogue.swiglu_alpha = 1.702f;
                epilogue.swiglu_limit = 2.5f;
                if (epilogue.activation != Activation::clamped_swiglu) {
                    epilogue.kind = EpilogueKind::activate;
                    expect(epilogue, before, kColumns, [&](int64_t row, int64_t column) {
                        return activated(epilogue.activation, sum(row, column));
                    }, "activate " + std::to_string(activation));
                }
                epilogue.kind = EpilogueKind::gate_up;
                // The second panel's ups, columns 96 and on, are there only in part.
                expect(epilogue, before, kPanelColumns / 2, [&](int64_t row, int64_t column) {
                    return gated(epilogue, sum(row, column), sum(row, column + kPanelColumns / 2));
                }, "gate_up " + std::to_string(activation));
            }
        }
    }

  private:
    void compare(const std::vector<float>& got, const std::vector<float>& want, int64_t rows, const std::string& how) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < kColumns; ++column)
                check_.equal(got[row * width() + column], want[row * width() + column],
                             what_ + ", " + how + ", row " + std::to_string(row) + ", column " + std::to_string(column));
    }
    template <class Want>
    void expect(const Epilogue& epilogue, const std::vector<float>& before, int64_t columns, const Want& want,
                const std::string& how) {
        auto got = before;
        run(epilogue, kRows, kRows, nullptr, got);
        for (int64_t row = 0; row < kRows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                const float found = got[row * width() + column];
                const double wanted = want(row, column);
                // Gated values are products of two sums: errors of either are multiplied by the other.
                check_.near(found, wanted, 2e-5 + 4e-6 * std::abs(wanted), what_ + ", " + how);
                check_.digest(&found, 4);
            }
        }
    }

    const KernelTable& table_;
    Check& check_;
    const Matrix& matrix_;
    const Rows& inputs_;
    const std::string what_;
    Buffer scratch_;
};

void check_products(const KernelTable& table) {
    Check check(table, "linear_panel");
    for (const WeightFormat format : kFormats) {
        for (const int64_t depth : kDepths) {
            const Matrix matrix(table, format, depth, 24);
            const Rows inputs(table, format, depth, 27);
            Products products(table, check, matrix, inputs);
            products.check_epilogues(products.check_sums());
        }
    }
}

// What benchmarks compare the products with.
void check_stream(const KernelTable& table) {
    Check check(table, "read_stream");
    constexpr int64_t bytes = 256 * 37;
    const Buffer buffer(bytes);
    Random random(28);
    uint32_t want = 0;
    for (int64_t at = 0; at < bytes; at += 4) {
        const uint32_t word = random.bits();
        std::memcpy(buffer.data() + at, &word, 4);
        want += word;
    }
    const int32_t sum = table.read_stream(buffer.data(), bytes);
    check.equal(sum, static_cast<int32_t>(want), "sum");
    check.digest(&sum, sizeof(sum));
}

}  // namespace

void check_linear(const KernelTable& table) {
    check_packing(table);
    check_quantizing(table);
    check_products(table);
    check_stream(table);
}

}  // namespace plait
