// Attention tiled in two dimensions, as FlashAttention does it (Dao et al. 2022, algorithm 1): what SlimAttention is
// measured against in bench/attention.py. Nothing else calls it. Products, weights and layouts are those of
// attention.inl, so that what differs is the tiling: 64 product rows by 512 keys, whose running sums are rescaled
// whenever a row's largest score changes.

template <KvFormat format>
static void attend_2d_as(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t row_begin,
                         int64_t row_end, std::byte* scratch) {
    const AttentionShape& shape = work.shape;
    const int64_t dim = shape.dim;
    Unit unit;
    unit.shape = &shape;
    unit.begin = first_key(shape, part.start + row_begin) / kTileTokens;
    unit.end = tiles_of(part.start + row_end);
    const int64_t rows = (row_end - row_begin) * (shape.heads / shape.kv_heads);
    lay_out(unit, format, dim, rows, unit.end - unit.begin, kPartitionTiles, scratch);
    *unit.count = {};
    find_rows(unit, work, part, kv_head, row_begin);
    find_tiles(unit, work, part, kv_head);
    pack_queries<format>(unit, work, part, kv_head, row_begin);
    for (int64_t i = 0; i < unit.rows; ++i) {
        unit.row[i].base = unit.row[i].peak;
        unit.row[i].sum = shape.sinks ? 1.0f : 0.0f;  // the sink's weight while nothing else has been seen
        clear_out(unit.row[i], dim);
    }
    for (unit.origin = unit.begin / kPartitionTiles * kPartitionTiles; unit.origin < unit.end;
         unit.origin += kPartitionTiles) {
        const int64_t tiles_end = smaller(unit.origin + kPartitionTiles, unit.end);
        clear_peaks(unit);
        for (int64_t tile = larger(unit.origin, unit.begin); tile < tiles_end; tile += kStripTiles)
            for (int64_t block = 0; block < unit.rows; block += kBlockRows)
                score_block<format>(unit, block, tile, smaller(tile + kStripTiles, tiles_end));
        for (int64_t block = 0; block < unit.rows; block += kBlockRows) {
            const int64_t block_rows = smaller(kBlockRows, unit.rows - block);
            const int64_t begin = larger(unit.origin, unit.row[block].first / kTileTokens);
            const int64_t end = smaller(tiles_end, tiles_of(unit.row[block + block_rows - 1].end));
            if (begin >= end) continue;
            for (int64_t r = block; r < block + block_rows; ++r) {
                ProductRow& row = unit.row[r];
                const float peak = larger_or(max_of(load_f(unit.peaks + 16 * r)), row.peak);
                if (peak == row.peak) continue;
                const float shrink = exp2_of(row.peak - peak);
                for (int64_t i = 0; i < dim; i += 16) store_f(row.out + i, load_f(row.out + i) * set_f(shrink));
                row.sum = row.sum * shrink;
                row.peak = row.base = peak;
            }
            float sums[kBlockRows];
            weigh_block<format>(unit, block, block_rows, begin, end, sums);
            multiply_block<format>(unit, block, block_rows, begin, begin, end, unit.partial, dim);
            for (int64_t r = 0; r < block_rows; ++r) {
                unit.row[block + r].sum = unit.row[block + r].sum + sums[r];
                add_to(unit.row[block + r].out, unit.partial + r * dim, dim);
            }
        }
    }
    for (int64_t i = 0; i < unit.rows; ++i) finish_row(unit.row[i], dim, false);
}

static void attend_2d(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t row_begin,
                      int64_t row_end, std::byte* scratch) {
    if (work.memory.layout.format == KvFormat::bf16)
        attend_2d_as<KvFormat::bf16>(work, part, kv_head, row_begin, row_end, scratch);
    else
        attend_2d_as<KvFormat::int8>(work, part, kv_head, row_begin, row_end, scratch);
}
