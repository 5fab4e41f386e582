// Norms, rotations, routers and the choice of the best: the parts of a forward pass that read no large matrix.
//
// Sums run over sixteen lanes, one accumulator, in the order of the row; the last, incomplete group of sixteen is
// filled up with what changes nothing. So a sum depends on its row alone.

// The first `count` of sixteen floats, the others `fill`.
INLINE F16 load_part(const float* p, int64_t count, float fill) {
    float lane[16];
    store_f(lane, set_f(fill));
    for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
    return load_f(lane);
}
INLINE void store_part(float* p, F16 a, int64_t count) {
    float lane[16];
    store_f(lane, a);
    for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
}

// ---- norms ----------------------------------------------------------------------------------------------------------

INLINE float sum_of_row(const float* row, int64_t width) {
    F16 sum = set_f(0.0f);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) sum = sum + load_f(row + i);
    if (i < width) sum = sum + load_part(row + i, width - i, 0.0f);
    return sum_of(sum);
}
// Sum of the squares of the distances from `centre`.
INLINE float sum_of_squares(const float* row, int64_t width, float centre) {
    const F16 middle = set_f(centre);
    F16 sum = set_f(0.0f);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const F16 distance = load_f(row + i) - middle;
        sum = sum + distance * distance;
    }
    if (i < width) {
        const F16 distance = load_part(row + i, width - i, centre) - middle;
        sum = sum + distance * distance;
    }
    return sum_of(sum);
}
// ((x - centre) * factor) * weight + bias, for as much of that as the work has. `out` may be `in`.
INLINE F16 normed(F16 x, F16 centre, F16 factor, const NormWork& work, F16 weight, F16 bias) {
    if (work.kind == NormKind::layer) x = x - centre;
    x = x * factor;
    if (work.weight) x = x * weight;
    return work.bias ? x + bias : x;
}
static void norm_row(const NormWork& work, const float* in, int64_t width, float* out) {
    const float count = static_cast<float>(width);
    const float mean = work.kind == NormKind::layer ? sum_of_row(in, width) / count : 0.0f;
    const F16 variance = set_f(sum_of_squares(in, width, mean) / count);
    const F16 factor = set_f(1.0f) / sqrt_f(variance + set_f(work.eps));
    const F16 centre = set_f(mean);
    const F16 none = set_f(0.0f);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const F16 weight = work.weight ? load_f(work.weight + i) : none;
        const F16 bias = work.bias ? load_f(work.bias + i) : none;
        store_f(out + i, normed(load_f(in + i), centre, factor, work, weight, bias));
    }
    if (i < width) {
        const int64_t left = width - i;
        const F16 weight = work.weight ? load_part(work.weight + i, left, 0.0f) : none;
        const F16 bias = work.bias ? load_part(work.bias + i, left, 0.0f) : none;
        store_part(out + i, normed(load_part(in + i, left, 0.0f), centre, factor, work, weight, bias), left);
    }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

static void rotate(float* row, int64_t heads, int64_t dim, int64_t rotary_dim, const float* cosines,
                   const float* sines) {
    const int64_t half = rotary_dim / 2;
    for (int64_t head = 0; head < heads; ++head) {
        float* first = row + head * dim;
        float* second = first + half;
        int64_t j = 0;
        for (; j + 16 <= half; j += 16) {
            const F16 a = load_f(first + j), b = load_f(second + j);
            const F16 cosine = load_f(cosines + j), sine = load_f(sines + j);
            store_f(first + j, a * cosine - b * sine);
            store_f(second + j, b * cosine + a * sine);
        }
        for (; j < half; ++j) {
            const float a = first[j], b = second[j];
            first[j] = a * cosines[j] - b * sines[j];
            second[j] = b * cosines[j] + a * sines[j];
        }
    }
}

static void scale_row(float* row, int64_t width, float factor) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store_f(row + i, load_f(row + i) * set_f(factor));
    for (; i < width; ++i) row[i] = row[i] * factor;
}

static void add_row(float* out, const float* in, int64_t width, float factor) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store_f(out + i, load_f(out + i) + load_f(in + i) * set_f(factor));
    for (; i < width; ++i) out[i] = out[i] + in[i] * factor;
}

static void softcap_row(float* row, int64_t width, float cap) {
    const F16 bound = set_f(cap);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store_f(row + i, tanh_f(load_f(row + i) / bound) * bound);
    if (i < width)
        store_part(row + i, tanh_f(load_part(row + i, width - i, 0.0f) / bound) * bound, width - i);
}

// The largest value, minus infinity of an empty row.
static float row_max(const float* row, int64_t width) {
    const float lowest = -__builtin_inff();
    F16 most = set_f(lowest);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) most = max_f(most, load_f(row + i));
    if (i < width) most = max_f(most, load_part(row + i, width - i, lowest));
    return max_of(most);
}

// ---- the best k -----------------------------------------------------------------------------------------------------

// Whether `a` comes before `b`: not-a-number first, that somebody notices it; then by value; equals by the smaller id.
INLINE bool comes_before(TopEntry a, TopEntry b) {
    if (a.value > b.value) return true;
    if (a.value < b.value) return false;
    const bool a_is_number = a.value == a.value, b_is_number = b.value == b.value;
    return a_is_number == b_is_number ? a.id < b.id : b_is_number;
}
INLINE int64_t entries_before(TopEntry entry, const TopEntry* best, int64_t count) {
    int64_t low = 0;
    while (low < count) {
        const int64_t middle = (low + count) / 2;
        if (comes_before(best[middle], entry))
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

static void fold_top(const float* values, int64_t count, int32_t first_id, TopEntry* best, int64_t k, int64_t* filled) {
    constexpr int64_t kBlock = kPanelColumns;  // which is passed over at once if it holds nothing good enough
    if (k < 1) return;
    int64_t used = *filled;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = begin + kBlock < count ? begin + kBlock : count;
        if (used == k && end - begin == kBlock) {
            const F16 worst = set_f(best[k - 1].value);
            F16 candidates = set_f(0.0f);  // all but those below the worst: an equal may win by its id
            for (int64_t i = begin; i < end; i += 16)
                candidates = candidates + select_gt_f(worst, load_f(values + i), set_f(0.0f), set_f(1.0f));
            if (sum_of(candidates) == 0.0f) continue;
        }
        for (int64_t i = begin; i < end; ++i) {
            if (used == k && values[i] < best[k - 1].value) continue;
            const TopEntry entry = {values[i], first_id + static_cast<int32_t>(i)};
            const int64_t before = entries_before(entry, best, used);
            if (before == k) continue;
            const int64_t moved = (used < k ? used : k - 1) - before;
            __builtin_memmove(best + before + 1, best + before, static_cast<size_t>(moved) * sizeof(TopEntry));
            best[before] = entry;
            used = used < k ? used + 1 : k;
        }
    }
    *filled = used;
}

// ---- routers --------------------------------------------------------------------------------------------------------

// Four columns at a time, for four independent chains of additions; each has its own accumulator, so the order of its
// sum does not depend on its neighbours.
static void small_linear(const float* weights, const float* bias, const float* in, int64_t columns, int64_t depth,
                         float* out) {
    const int64_t whole = depth / 16 * 16;
    const F16 last = load_part(in + whole, depth - whole, 0.0f);
    int64_t n = 0;
    for (; n + 4 <= columns; n += 4) {
        const float* rows[4] = {weights + n * depth, weights + (n + 1) * depth, weights + (n + 2) * depth,
                                weights + (n + 3) * depth};
        F16 a = set_f(0.0f), b = a, c = a, d = a;
        for (int64_t k = 0; k < whole; k += 16) {
            const F16 x = load_f(in + k);
            a = a + load_f(rows[0] + k) * x;
            b = b + load_f(rows[1] + k) * x;
            c = c + load_f(rows[2] + k) * x;
            d = d + load_f(rows[3] + k) * x;
        }
        const F16 sums[4] = {a, b, c, d};
        for (int64_t j = 0; j < 4; ++j) {
            const F16 product = load_part(rows[j] + whole, depth - whole, 0.0f) * last;
            out[n + j] = sum_of(sums[j] + product) + (bias ? bias[n + j] : 0.0f);
        }
    }
    for (; n < columns; ++n) {
        const float* row = weights + n * depth;
        F16 sum = set_f(0.0f);
        for (int64_t k = 0; k < whole; k += 16) sum = sum + load_f(row + k) * load_f(in + k);
        out[n] = sum_of(sum + load_part(row + whole, depth - whole, 0.0f) * last) + (bias ? bias[n] : 0.0f);
    }
}

// Scores of one row's experts: the logistic function of each logit, or softmax.
INLINE void score_experts(const RouterWork& work, const float* logits, float* scores) {
    const float most = work.sigmoid ? 0.0f : row_max(logits, work.experts);
    F16 sum = set_f(0.0f);
    for (int64_t i = 0; i < work.experts; i += 16) {
        const int64_t left = work.experts - i < 16 ? work.experts - i : 16;
        const F16 logit = load_part(logits + i, left, -__builtin_inff());  // whose exponential is 0
        const F16 score = work.sigmoid ? sigmoid_f(logit) : exp_f(logit - set_f(most));
        sum = sum + score;
        store_part(scores + i, score, left);
    }
    if (!work.sigmoid) {
        const F16 total = set_f(sum_of(sum));
        for (int64_t i = 0; i < work.experts; i += 16) {
            const int64_t left = work.experts - i < 16 ? work.experts - i : 16;
            store_part(scores + i, load_part(scores + i, left, 0.0f) / total, left);
        }
    }
}

// What a group of experts is worth: its best score, or the sum of its best two.
INLINE float group_worth(const float* ranked, int64_t size, bool best_two) {
    TopEntry best[2];
    int64_t filled = 0;
    fold_top(ranked, size, 0, best, best_two ? 2 : 1, &filled);
    return filled == 2 ? best[0].value + best[1].value : best[0].value;
}

// As plait.engine.moe.route, which names the sources; of equals the one with the lower index is taken.
static void route_row(const RouterWork& work, const float* logits, int32_t* experts, float* weights) {
    const size_t row_bytes = static_cast<size_t>(work.experts) * sizeof(float);
    float* scores = static_cast<float*>(__builtin_alloca(row_bytes));
    float* ranked = static_cast<float*>(__builtin_alloca(row_bytes));
    score_experts(work, logits, scores);
    for (int64_t i = 0; i < work.experts; ++i) ranked[i] = work.correction ? scores[i] + work.correction[i] : scores[i];

    if (work.groups > 1) {
        const int64_t size = work.experts / work.groups;
        float* worth = static_cast<float*>(__builtin_alloca(static_cast<size_t>(work.groups) * sizeof(float)));
        for (int64_t group = 0; group < work.groups; ++group)
            worth[group] = group_worth(ranked + group * size, size, work.best_two);
        auto* kept = static_cast<TopEntry*>(
            __builtin_alloca(static_cast<size_t>(work.kept_groups) * sizeof(TopEntry)));
        int64_t kept_count = 0;
        fold_top(worth, work.groups, 0, kept, work.kept_groups, &kept_count);
        for (int64_t group = 0; group < work.groups; ++group) {
            bool stays = false;
            for (int64_t j = 0; j < kept_count; ++j) stays = stays || kept[j].id == group;
            if (stays) continue;
            for (int64_t i = 0; i < size; ++i) ranked[group * size + i] = -__builtin_inff();
        }
    }

    auto* best = static_cast<TopEntry*>(__builtin_alloca(static_cast<size_t>(work.chosen) * sizeof(TopEntry)));
    int64_t chosen = 0;
    fold_top(ranked, work.experts, 0, best, work.chosen, &chosen);
    float sum = 0.0f;
    for (int64_t j = 0; j < chosen; ++j) {
        experts[j] = best[j].id;
        weights[j] = scores[best[j].id];
        sum = sum + weights[j];
    }
    for (int64_t j = 0; j < chosen; ++j) {
        if (work.renormalises) weights[j] = weights[j] / (sum + 1e-20f);
        weights[j] = weights[j] * work.scale;
    }
}
