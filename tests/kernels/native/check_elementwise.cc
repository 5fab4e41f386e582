// The functions of elementwise.inl.

#include <algorithm>
#include <numeric>

#include "check.h"

namespace plait {
namespace {

// Rows of every kind of length: none, less than a vector, whole vectors, a bit more.
constexpr int64_t kWidths[] = {1, 7, 16, 31, 64, 200, 1000};

void check_norms(const KernelTable& table) {
    Check check(table, "norm_row");
    for (const int64_t width : kWidths) {
        const auto in = random_floats(width, 1, 3.0f), weight = random_floats(width, 2), bias = random_floats(width, 3);
        for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
            for (int parts = 0; parts < 3; ++parts) {
                const NormWork work = {kind, 1e-5f, parts > 0 ? weight.data() : nullptr, parts > 1 ? bias.data() : nullptr};
                std::vector<float> out(in.size());
                table.norm_row(work, in.data(), width, out.data());
                double mean = 0, square = 0;
                if (kind == NormKind::layer)
                    for (const float x : in) mean += x / static_cast<double>(width);
                for (const float x : in) square += (x - mean) * (x - mean) / static_cast<double>(width);
                for (size_t i = 0; i < in.size(); ++i) {
                    double want = (in[i] - mean) / std::sqrt(square + 1e-5);
                    if (parts > 0) want *= weight[i];
                    if (parts > 1) want += bias[i];
                    check.near(out[i], want, 1e-5, "width " + std::to_string(width));
                }
                check.digest(out);
            }
        }
    }
}

void check_rows(const KernelTable& table) {
    Check scale(table, "scale_row"), add(table, "add_row"), softcap(table, "softcap_row"), max(table, "row_max");
    for (const int64_t width : kWidths) {
        const auto in = random_floats(width, 4, 40.0f), other = random_floats(width, 5);
        auto scaled = in, sum = in, capped = in;
        table.scale_row(scaled.data(), width, 0.37f);
        table.add_row(sum.data(), other.data(), width, -1.7f);
        table.softcap_row(capped.data(), width, 30.0f);
        for (size_t i = 0; i < in.size(); ++i) {
            const float product = other[i] * -1.7f;
            scale.equal(scaled[i], in[i] * 0.37f, "element " + std::to_string(i));
            add.equal(sum[i], in[i] + product, "element " + std::to_string(i));
            softcap.near(capped[i], 30.0 * std::tanh(in[i] / 30.0), 1e-5, "element " + std::to_string(i));
        }
        const float most = table.row_max(in.data(), width);
        max.equal(most, *std::max_element(in.begin(), in.end()), "width " + std::to_string(width));
        scale.digest(scaled);
        add.digest(sum);
        softcap.digest(capped);
        max.digest(&most, sizeof(most));
    }
}

void check_rotations(const KernelTable& table) {
    Check check(table, "rotate");
    constexpr int64_t heads = 3;
    for (const auto& [dim, rotary] : {std::pair<int64_t, int64_t>{64, 64}, {128, 32}, {80, 20}}) {
        const auto before = random_floats(heads * dim, 6), cosines = random_floats(rotary / 2, 7),
                   sines = random_floats(rotary / 2, 8);
        auto row = before;
        table.rotate(row.data(), heads, dim, rotary, cosines.data(), sines.data());
        for (int64_t head = 0; head < heads; ++head) {
            for (int64_t j = 0; j < dim; ++j) {
                const int64_t half = rotary / 2, at = head * dim + j, pair = j % half;
                float want = before[at];
                if (j < half) {
                    const float a = before[at] * cosines[pair], b = before[at + half] * sines[pair];
                    want = a - b;
                } else if (j < rotary) {
                    const float a = before[at] * cosines[pair], b = before[at - half] * sines[pair];
                    want = a + b;
                }
                check.equal(row[at], want, "dim " + std::to_string(dim) + ", element " + std::to_string(j));
            }
        }
        check.digest(row);
    }
}

void check_small_linear(const KernelTable& table) {
    Check check(table, "small_linear");
    for (const auto& [columns, depth] : {std::pair<int64_t, int64_t>{1, 5}, {8, 64}, {37, 200}}) {
        const auto weights = random_floats(columns * depth, 9), bias = random_floats(columns, 10), in = random_floats(depth, 11);
        for (const float* added : {static_cast<const float*>(nullptr), bias.data()}) {
            std::vector<float> out(static_cast<size_t>(columns));
            table.small_linear(weights.data(), added, in.data(), columns, depth, out.data());
            for (int64_t n = 0; n < columns; ++n) {
                double want = added ? added[n] : 0.0;
                for (int64_t k = 0; k < depth; ++k) want += static_cast<double>(weights[n * depth + k]) * in[k];
                check.near(out[n], want, 1e-5, "column " + std::to_string(n));
            }
            check.digest(out);
        }
    }
}

// The ids of `values`, best first: not-a-number, then by value, then by id.
std::vector<int32_t> ranking(const std::vector<float>& values) {
    std::vector<int32_t> ids(values.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
        const bool a_is_nan = std::isnan(values[a]), b_is_nan = std::isnan(values[b]);
        return a_is_nan || b_is_nan ? a_is_nan && !b_is_nan : values[a] > values[b];
    });
    return ids;
}

void check_fold_top(const KernelTable& table) {
    Check check(table, "fold_top");
    for (const int64_t count : {1, 15, 130, 1000}) {
        auto values = random_floats(count, 12);
        for (float& value : values) value = std::round(value * 20);  // so that there are equal ones
        if (count == 1000) values[700] = std::nanf("");
        const auto order = ranking(values);
        for (const int64_t k : {1, 2, 40}) {
            std::vector<TopEntry> best(static_cast<size_t>(k));
            int64_t filled = 0;
            // In two pieces, as panels of a vocabulary come.
            const int64_t first = count / 3;
            table.fold_top(values.data() + first, count - first, static_cast<int32_t>(1000 + first), best.data(), k, &filled);
            table.fold_top(values.data(), first, 1000, best.data(), k, &filled);
            check.equal(static_cast<double>(filled), static_cast<double>(std::min(k, count)), "entries");
            for (int64_t i = 0; i < std::min(filled, count); ++i) {
                check.equal(best[i].id, 1000 + order[i], "id of rank " + std::to_string(i));
                check.digest(&best[i].id, sizeof(best[i].id));
            }
        }
    }
}

void check_routers(const KernelTable& table) {
    Check check(table, "route_row");
    constexpr int64_t experts = 40;
    const auto logits = random_floats(experts, 13, 4.0f), correction = random_floats(experts, 14, 0.5f);
    for (int variant = 0; variant < 16; ++variant) {
        RouterWork work;
        work.experts = experts;
        work.chosen = 6;
        work.sigmoid = variant & 1;
        work.renormalises = variant & 2;
        work.correction = variant & 4 ? correction.data() : nullptr;
        work.scale = 2.5f;
        if (variant & 8) {
            work.groups = 8;
            work.kept_groups = 3;
            work.best_two = variant & 1;
        }
        std::vector<double> scores(experts);
        double sum = 0;
        for (int64_t i = 0; i < experts; ++i) {
            const double e = std::exp(static_cast<double>(logits[i]));
            scores[i] = work.sigmoid ? e / (1 + e) : e;
            sum += e;
        }
        std::vector<float> ranked(experts);
        for (int64_t i = 0; i < experts; ++i) {
            if (!work.sigmoid) scores[i] /= sum;
            ranked[i] = static_cast<float>(scores[i] + (work.correction ? work.correction[i] : 0.0f));
        }
        const int64_t size = experts / work.groups;
        if (work.groups > 1) {
            std::vector<float> worth(static_cast<size_t>(work.groups));
            for (int64_t group = 0; group < work.groups; ++group) {
                std::vector<float> members(ranked.begin() + group * size, ranked.begin() + (group + 1) * size);
                std::sort(members.rbegin(), members.rend());
                worth[group] = members[0] + (work.best_two ? members[1] : 0.0f);
            }
            const auto order = ranking(worth);
            for (int64_t place = work.kept_groups; place < work.groups; ++place)
                std::fill_n(ranked.begin() + order[place] * size, size, -INFINITY);
        }
        const auto order = ranking(ranked);
        double total = 0;
        for (int64_t j = 0; j < work.chosen; ++j) total += scores[order[j]];
        std::vector<int32_t> chosen(static_cast<size_t>(work.chosen));
        std::vector<float> weights(chosen.size());
        table.route_row(work, logits.data(), chosen.data(), weights.data());
        for (int64_t j = 0; j < work.chosen; ++j) {
            const double want = scores[order[j]] * work.scale / (work.renormalises ? total : 1.0);
            check.equal(chosen[j], order[j], "expert, variant " + std::to_string(variant));
            check.near(weights[j], want, 1e-6 * work.scale, "weight, variant " + std::to_string(variant));
        }
        check.digest(chosen.data(), chosen.size() * sizeof(int32_t));
        check.digest(weights);
    }
}

}  // namespace

void check_elementwise(const KernelTable& table) {
    check_norms(table);
    check_rows(table);
    check_rotations(table);
    check_small_linear(table);
    check_fold_top(table);
    check_routers(table);
}

}  // namespace plait
