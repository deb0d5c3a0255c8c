// ---- channels-last layout: rows of C values, one for each sample and position; a set is some columns of some rows

// Rows are cut into tiles that do not cross a sample where samples are apart (group form). "Part" is a sample, or the
// whole batch.
struct Rows {
    int64_t c, parts, rows_per_part, tiles_per_part, rows_per_tile;
    Rows(const Shape& d) : c(d.c), parts(d.groups ? d.n : 1), rows_per_part(d.groups ? d.s : d.n * d.s) {
        rows_per_tile = rows_per_part / 32 < 64 ? 64 : rows_per_part / 32 > 256 ? 256 : rows_per_part / 32;
        tiles_per_part = (rows_per_part + rows_per_tile - 1) / rows_per_tile;
    }
    int64_t tiles() const { return parts * tiles_per_part; }
    int64_t part(int64_t tile) const { return tile / tiles_per_part; }
    int64_t first(int64_t tile) const { return part(tile) * rows_per_part + tile % tiles_per_part * rows_per_tile; }
    int64_t count(int64_t tile) const {
        int64_t left = rows_per_part - tile % tiles_per_part * rows_per_tile;
        return left < rows_per_tile ? left : rows_per_tile;
    }
};

// The tiles that one thread works on in every pass. Each pass takes them in the opposite order to the one before, so
// that it begins with what is still in the thread's cache.
struct Share {
    int64_t begin, end;
    explicit Share(int64_t tiles) {
        const int64_t threads = omp_get_num_threads(), i = omp_get_thread_num();
        begin = tiles * i / threads, end = tiles * (i + 1) / threads;
    }
};

// What is known of one tile's columns: arrays of C for each tile.
struct Columns {
    Arrays<double> sums;
    Arrays<float> others;
    double *sum = sums[0], *square = sums[1];
    float *count = others[0], *low = others[1], *high = others[2];
    explicit Columns(int64_t n) : sums(2, n), others(3, n) {}
};

constexpr int64_t CHUNK = 32;  // vectors of a row that are worked on together: their sums stay in the first cache
constexpr int R = CHAIN;       // rows that are read side by side

// Runs `STEP(number of rows, pointer offset)` over all rows of a tile, R at a time and the last ones singly.
#define FOR_ROWS(rows, c, STEP)         \
    {                                   \
        int64_t r = 0;                  \
        for (; r + R <= rows; r += R) { \
            const int64_t row = r * c;  \
            STEP(R)                     \
        }                               \
        for (; r < rows; ++r) {         \
            const int64_t row = r * c;  \
            STEP(1)                     \
        }                               \
    }

// One vector of columns while its tile is read.
struct Measured {
    vfloat shift, low, high;
    WideVector sum, square;
};

template <class T, bool WHOLE, int ROWS>
static inline void measure_rows(const typename T::scalar* x, int64_t c, int64_t first, int64_t n, Measured* m) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = start_of(first + i, c);
        vfloat k = m[i].shift, s{}, q{}, lo = m[i].low, hi = m[i].high;
#pragma GCC unroll 8
        for (int j = 0; j < ROWS; ++j) {
            prefetch<T>(x + (R + j) * c + at, i);
            vfloat a = load_vector<T, WHOLE>(x + j * c + at, c), d = a - k;
            s += d, q += d * d, lo = smaller(lo, a), hi = larger(hi, a);
        }
        m[i].sum.add(s), m[i].square.add(q), m[i].low = lo, m[i].high = hi;
    }
}

template <class T, bool WHOLE>
static void measure_columns(const typename T::scalar* x, int64_t rows, int64_t c, const float* shift,
                            const Columns& out, int64_t tile) {
    Measured m[CHUNK];
    for (int64_t first = 0; first < vectors(c); first += CHUNK) {
        const int64_t n = vectors(c) - first < CHUNK ? vectors(c) - first : CHUNK;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = start_of(first + i, c);
            m[i].shift = load_vector<Float32, WHOLE>(shift + at, c), m[i].sum = m[i].square = WideVector{};
            m[i].low = m[i].high = load_vector<T, WHOLE>(x + at, c);
        }
#define STEP(ROWS) measure_rows<T, WHOLE, ROWS>(x + row, c, first, n, m);
        FOR_ROWS(rows, c, STEP)
#undef STEP
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = tile * c + start_of(first + i, c);
            m[i].sum.template store<WHOLE>(out.sum + at, c);
            m[i].square.template store<WHOLE>(out.square + at, c);
            store_vector<Float32, WHOLE>(out.count + at, c, splat((float)rows));
            store_vector<Float32, WHOLE>(out.low + at, c, m[i].low);
            store_vector<Float32, WHOLE>(out.high + at, c, m[i].high);
        }
    }
}

struct Kept {
    vfloat shift, lower, upper, count;
    WideVector sum, square;
    vint wanted;
    int64_t at;
};

template <class T, bool WHOLE, int ROWS>
static inline void measure_kept_rows(const typename T::scalar* x, int64_t c, int64_t n, Kept* m) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = m[i].at;
        vfloat k = m[i].shift, lo = m[i].lower, hi = m[i].upper, s{}, q{}, count{};
#pragma GCC unroll 8
        for (int j = 0; j < ROWS; ++j) {
            prefetch<T>(x + (R + j) * c + at, 0);
            vfloat a = load_vector<T, WHOLE>(x + j * c + at, c);
            vint kept = (a >= lo) & (a <= hi);
            vfloat d = only(kept, a - k);
            s += d, q += d * d, count += only(kept, splat(1.f));
        }
        m[i].sum.add(s), m[i].square.add(q), m[i].count += count;
    }
}

// Sum the kept values of those columns that `wanted` names, given where a vector of columns starts; how many vectors
// had one.
template <class T, bool WHOLE, class F>
static int64_t measure_kept_columns(const typename T::scalar* x, int64_t rows, int64_t c, const float* shift,
                                    const float* lower, const float* upper, const Columns& out, int64_t tile,
                                    F wanted) {
    Kept m[CHUNK];
    int64_t n = 0, measured = 0;
    for (int64_t v = 0; v < vectors(c); ++v) {
        const int64_t at = start_of(v, c);
        const vint lanes = wanted(at);
        if (any_of(lanes))
            m[n++] = {load_vector<Float32, WHOLE>(shift + at, c),
                      load_vector<Float32, WHOLE>(lower + at, c),
                      load_vector<Float32, WHOLE>(upper + at, c),
                      vfloat{},
                      WideVector{},
                      WideVector{},
                      lanes,
                      at};
        if (n < CHUNK && (v + 1 < vectors(c) || n == 0)) continue;
#define STEP(ROWS) measure_kept_rows<T, WHOLE, ROWS>(x + row, c, n, m);
        FOR_ROWS(rows, c, STEP)
#undef STEP
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = tile * c + m[i].at;
            for (int64_t j = 0; j < (WHOLE ? LANES : c); ++j) {
                if (!m[i].wanted[j]) continue;
                out.sum[at + j] = m[i].sum.lanes[j], out.square[at + j] = m[i].square.lanes[j];
                out.count[at + j] = m[i].count[j];
            }
        }
        measured += n, n = 0;
    }
    return measured;
}

// Add the tiles of one part's column.
template <class Number>
static inline void add_tiles(const Number* of, const Rows& rows, int64_t part, int64_t first, int64_t n, double* total) {
    for (int64_t i = 0; i < n; ++i) total[i] = 0;
    const Number* p = of + part * rows.tiles_per_part * rows.c + first;
    for (int64_t t = 0; t < rows.tiles_per_part; ++t, p += rows.c)
        for (int64_t i = 0; i < n; ++i) total[i] += p[i];
}

// One part's sets, a block of them at a time, and the columns that they are made of.
struct Blocks {
    int64_t channels, sets_per_part, sets_per_block, per_part;
    Blocks(const Shape& d) : channels(d.groups ? d.c / d.groups : 1), sets_per_part(d.c / channels) {
        sets_per_block = channels < 256 ? 256 / channels : 1;
        per_part = (sets_per_part + sets_per_block - 1) / sets_per_block;
    }
    int64_t part(int64_t block) const { return block / per_part; }
    int64_t first_set(int64_t block) const { return block % per_part * sets_per_block; }
    int64_t sets(int64_t block) const {
        int64_t left = sets_per_part - first_set(block);
        return left < sets_per_block ? left : sets_per_block;
    }
};

template <class T, bool WHOLE>
static void normalize_rows(const typename T::scalar* x, typename T::scalar* y, int64_t rows, int64_t c,
                           const float* mean, const float* scale, const float* offset) {
    for (int64_t r = 0; r < rows; ++r, x += c, y += c)
        for_vectors(c, [=](int64_t at) {
            vfloat m = load_vector<Float32, WHOLE>(mean + at, c), a = load_vector<Float32, WHOLE>(scale + at, c),
                   b = load_vector<Float32, WHOLE>(offset + at, c);
            store_vector<T, WHOLE>(y + at, c, (load_vector<T, WHOLE>(x + at, c) - m) * a + b);
        });
}

template <class T, bool WHOLE>
static void forward_channels_last(const Shape& d, const Options& o, const void* x_, void* y_, const float* weight,
                                  const float* bias, const Moments& out) {
    typedef typename T::scalar scalar;
    const scalar* x = (const scalar*)x_;
    scalar* y = (scalar*)y_;
    const Rows rows(d);
    const Blocks blocks(d);
    const int64_t C = d.c, all = rows.parts * C;
    Columns columns(rows.tiles() * C);
    const Arrays<double> doubles(3, all);
    double *const sums = doubles[0], *const squares = doubles[1], *const counts = doubles[2];
    const Arrays<float> floats(5, all);
    float *const shift = floats[0], *const lower = floats[1], *const upper = floats[2], *const scale = floats[3],
                 *const offset = floats[4];
    float* const mean = lower;           // the band is not needed once the moments are known
    const Arrays<int32_t> again(1, all);  // columns whose sums are to be taken anew: all ones, the others zero
    bool first_is_poor[PASSES] = {}, kept_is_poor[PASSES] = {};

    // The sums of set `j` of a block, from its tiles. Where they are poor: around the means that they give.
    auto total_of = [&](int64_t at, int64_t n) { return Total(sums + at, squares + at, counts + at, shift + at, n); };
    auto take_again = [&](int64_t at, int64_t n) {
        for (int64_t c = at; c < at + n; ++c) {
            if (counts[c] > 0) shift[c] = (float)(shift[c] + sums[c] / counts[c]);
            again.first[c] = -1;
        }
    };
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * vectors(C); ++i) {
            const int64_t part = i / vectors(C), at = start_of(i % vectors(C), C);
            const scalar* p = x + part * rows.rows_per_part * C + at;
            vfloat k =
                typical<vfloat>(rows.rows_per_part, [&](int64_t r) { return load_vector<T, WHOLE>(p + r * C, C); });
            store_vector<Float32, WHOLE>(shift + part * C + at, C, k);
        }
        const Share share(rows.tiles());
        auto measure_again = [&] {
            for (int64_t t = share.begin; t < share.end; ++t) {
                const int64_t part = rows.part(t) * C;
                measure_kept_columns<T, WHOLE>(
                    x + rows.first(t) * C, rows.count(t), C, shift + part, lower + part, upper + part, columns, t,
                    [&](int64_t at) { return (vint)load_vector<Float32, WHOLE>((float*)again.first + part + at, C); });
            }
        };
        for (int64_t t = share.begin; t < share.end; ++t)
            measure_columns<T, WHOLE>(x + rows.first(t) * C, rows.count(t), C, shift + rows.part(t) * C, columns, t);
        for (int pass = 0;; ++pass) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows.parts * blocks.per_part; ++i) {
                const int64_t part = blocks.part(i), n = blocks.channels, first = blocks.first_set(i) * n;
                add_tiles(columns.sum, rows, part, first, blocks.sets(i) * n, sums + part * C + first);
                add_tiles(columns.square, rows, part, first, blocks.sets(i) * n, squares + part * C + first);
                for (int64_t j = 0; j < blocks.sets(i); ++j) {
                    const int64_t at = part * C + first + j * n;
                    for (int64_t c = at; c < at + n; ++c) counts[c] = (double)rows.rows_per_part, again.first[c] = 0;
                    const Total t = total_of(at, n);
                    Set s;
                    if (pass + 1 < PASSES && t.is_poor()) {
                        take_again(at, n);
                        s.lower = -INFINITY, s.upper = INFINITY;
#pragma omp atomic write
                        first_is_poor[pass] = true;
                    } else {
                        set_band(s, t, o);
                    }
                    for (int64_t c = at; c < at + n; ++c) lower[c] = s.lower, upper[c] = s.upper;
                }
            }
            if (!first_is_poor[pass]) break;
            measure_again();
        }
        int64_t measured = 0;
        for (int64_t t = share.end; t-- > share.begin;) {
            const int64_t part = rows.part(t) * C;
            const float *low = columns.low + t * C, *high = columns.high + t * C;
            measured += measure_kept_columns<T, WHOLE>(
                x + rows.first(t) * C, rows.count(t), C, shift + part, lower + part, upper + part, columns, t,
                [&](int64_t at) {
                    return ~((load_vector<Float32, WHOLE>(low + at, C) >=
                              load_vector<Float32, WHOLE>(lower + part + at, C)) &
                             (load_vector<Float32, WHOLE>(high + at, C) <=
                              load_vector<Float32, WHOLE>(upper + part + at, C)));
                });
        }
        for (int pass = 0;; ++pass) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows.parts * blocks.per_part; ++i) {
                const int64_t part = blocks.part(i), n = blocks.channels, first = blocks.first_set(i) * n;
                add_tiles(columns.sum, rows, part, first, blocks.sets(i) * n, sums + part * C + first);
                add_tiles(columns.square, rows, part, first, blocks.sets(i) * n, squares + part * C + first);
                add_tiles(columns.count, rows, part, first, blocks.sets(i) * n, counts + part * C + first);
                for (int64_t j = 0; j < blocks.sets(i); ++j) {
                    const int64_t at = part * C + first + j * n;
                    if (pass > 0 && !again.first[at]) continue;
                    const Total t = total_of(at, n);
                    for (int64_t c = at; c < at + n; ++c) again.first[c] = 0;
                    if (pass + 1 < PASSES && t.is_poor()) {
                        take_again(at, n);
#pragma omp atomic write
                        kept_is_poor[pass] = true;
                        continue;
                    }
                    Set s;
                    s.lower = lower[at], s.upper = upper[at];
                    set_moments(s, t, o);
                    report(s, part * blocks.sets_per_part + blocks.first_set(i) + j, out);
                    const double rstd = 1 / sqrt(s.var + o.eps);
                    for (int64_t c = at; c < at + n; ++c) {
                        const double a = weight ? weight[c - part * C] * rstd : rstd;
                        mean[c] = (float)s.mean, scale[c] = (float)a;
                        offset[c] = (float)((bias ? bias[c - part * C] : 0.0) - (s.mean - (float)s.mean) * a);
                    }
                }
            }
            if (!kept_is_poor[pass]) break;
            measure_again();
        }
        const bool mostly = 2 * measured > (share.end - share.begin) * vectors(C);
        for (int64_t i = 0; i < share.end - share.begin; ++i) {
            const int64_t t = mostly ? share.begin + i : share.end - 1 - i;
            const int64_t part = rows.part(t) * C, start = rows.first(t) * C;
            normalize_rows<T, WHOLE>(x + start, y + start, rows.count(t), C, mean + part, scale + part, offset + part);
        }
    }
}

// One vector of columns while the sums of its gradients are taken.
struct Gradients {
    vfloat mean, lower, upper;
    WideVector sum, dot;
};

template <class T, bool WHOLE, bool PAPER, int ROWS>
static inline void gradient_rows(const typename T::scalar* g, const typename T::scalar* x, int64_t c, int64_t first,
                                 int64_t n, Gradients* of) {
    constexpr int chain = ROWS < GRADIENT_CHAIN ? ROWS : GRADIENT_CHAIN;
    const int64_t ahead = R * c > 2048 ? R * c : 2048;  // what is asked for before it is needed
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = start_of(first + i, c);
        const vfloat mean = of[i].mean;
#pragma GCC unroll 8
        for (int k = 0; k < ROWS; k += chain) {
            vfloat sum{}, dot{};
#pragma GCC unroll 8
            for (int j = k; j < k + chain; ++j) {
                prefetch<T>(x + j * c + at + ahead, i), prefetch<T>(g + j * c + at + ahead, i);
                vfloat a = load_vector<T, WHOLE>(x + j * c + at, c), ga = load_vector<T, WHOLE>(g + j * c + at, c);
                if (PAPER) ga = only((a >= of[i].lower) & (a <= of[i].upper), ga);
                sum += ga, dot += ga * (a - mean);
            }
            of[i].sum.add(sum), of[i].dot.add(dot);
        }
    }
}

template <class T, bool WHOLE, bool PAPER>
static void gradient_columns(const typename T::scalar* g, const typename T::scalar* x, int64_t rows, int64_t c,
                             const float* mean, const float* lower, const float* upper, const Columns& out,
                             int64_t tile) {
    for (int64_t first = 0; first < vectors(c); first += CHUNK) {
        const int64_t n = vectors(c) - first < CHUNK ? vectors(c) - first : CHUNK;
        Gradients of[CHUNK];
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = start_of(first + i, c);
            of[i].mean = load_vector<Float32, WHOLE>(mean + at, c);
            of[i].lower = load_vector<Float32, WHOLE>(lower + at, c);
            of[i].upper = load_vector<Float32, WHOLE>(upper + at, c);
        }
#define STEP(ROWS) gradient_rows<T, WHOLE, PAPER, ROWS>(g + row, x + row, c, first, n, of);
        FOR_ROWS(rows, c, STEP)
#undef STEP
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = tile * c + start_of(first + i, c);
            of[i].sum.template store<WHOLE>(out.sum + at, c);
            of[i].dot.template store<WHOLE>(out.square + at, c);
        }
    }
}

template <class T, bool WHOLE, bool PAPER, bool AHEAD>
static void write_gradient_rows(const typename T::scalar* g, const typename T::scalar* x, typename T::scalar* dx,
                                int64_t rows, int64_t c, const float* scale, const float* offset, const float* slope,
                                const float* mean, const float* lower, const float* upper) {
    constexpr int64_t ahead = 4096 / sizeof(typename T::scalar);
    for (int64_t r = 0; r < rows; ++r, g += c, x += c, dx += c)
        for_vectors(c, [=](int64_t at) {
            if (AHEAD) prefetch<T>(x + at + ahead, at / LANES), prefetch<T>(g + at + ahead, at / LANES);
            vfloat a = load_vector<Float32, WHOLE>(scale + at, c), b = load_vector<Float32, WHOLE>(offset + at, c),
                   k = load_vector<Float32, WHOLE>(slope + at, c), m = load_vector<Float32, WHOLE>(mean + at, c),
                   lo = load_vector<Float32, WHOLE>(lower + at, c), hi = load_vector<Float32, WHOLE>(upper + at, c);
            vfloat gi = load_vector<T, WHOLE>(g + at, c), xi = load_vector<T, WHOLE>(x + at, c);
            store_vector<T, WHOLE>(dx + at, c, input_gradient<PAPER>(gi, xi, a, b, k, m, lo, hi));
        });
}

template <class T, bool WHOLE, bool PAPER>
static void backward_channels_last(const Shape& d, const Options& o, const void* g_, const void* x_, void* dx_,
                                   const float* weight, const Moments& m, float* d_weight, float* d_bias) {
    typedef typename T::scalar scalar;
    const scalar *g = (const scalar*)g_, *x = (const scalar*)x_;
    scalar* dx = (scalar*)dx_;
    const Rows rows(d);
    const Blocks blocks(d);
    const int64_t C = d.c, all = rows.parts * C;
    Columns columns(rows.tiles() * C);
    const Arrays<double> doubles(2, all);
    double *const sums = doubles[0], *const dots = doubles[1];
    const Arrays<float> floats(6, all);
    float *const scale = floats[0], *const offset = floats[1], *const slope = floats[2], *const mean = floats[3],
                 *const lower = floats[4], *const upper = floats[5];
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * blocks.sets_per_part; ++i)
            for (int64_t c = i * blocks.channels; c < (i + 1) * blocks.channels; ++c)
                mean[c] = m.mean[i], lower[c] = m.lower[i], upper[c] = m.upper[i];
        const Share share(rows.tiles());
        for (int64_t t = share.begin; t < share.end; ++t) {
            const int64_t start = rows.first(t) * C, part = rows.part(t) * C;
            gradient_columns<T, WHOLE, PAPER>(g + start, x + start, rows.count(t), C, mean + part, lower + part,
                                              upper + part, columns, t);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * blocks.per_part; ++i) {
            const int64_t part = blocks.part(i), n = blocks.channels, first = blocks.first_set(i) * n;
            add_tiles(columns.sum, rows, part, first, blocks.sets(i) * n, sums + part * C + first);
            add_tiles(columns.square, rows, part, first, blocks.sets(i) * n, dots + part * C + first);
            for (int64_t j = 0; j < blocks.sets(i); ++j) {
                const int64_t at = part * C + first + j * n, set = at / n;
                const double rstd = 1 / sqrt((double)m.var[set] + o.eps);
                double sum_g = 0, sum_gx = 0;
                for (int64_t c = at; c < at + n; ++c) {
                    const double w = weight ? weight[c - part * C] : 1;
                    sum_g += w * sums[c], sum_gx += w * dots[c], dots[c] *= rstd;
                }
                const Line l = line_of(m, set, sum_g, sum_gx, o);
                for (int64_t c = at; c < at + n; ++c) {
                    scale[c] = weight ? l.scale * weight[c - part * C] : l.scale;
                    offset[c] = l.offset, slope[c] = l.slope;
                }
            }
        }
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < C; ++c) {
            double sum_g = 0, sum_gx = 0;
            for (int64_t p = 0; p < rows.parts; ++p) sum_g += sums[p * C + c], sum_gx += dots[p * C + c];
            d_bias[c] = (float)sum_g, d_weight[c] = (float)sum_gx;
        }
        // What is asked for ahead must fit into the first cache beside the six numbers of each column.
        auto write = C <= 1024 ? write_gradient_rows<T, WHOLE, PAPER, true> : write_gradient_rows<T, WHOLE, PAPER, false>;
        for (int64_t t = share.end; t-- > share.begin;) {
            const int64_t part = rows.part(t) * C, start = rows.first(t) * C;
            write(g + start, x + start, dx + start, rows.count(t), C, scale + part, offset + part, slope + part,
                  mean + part, lower + part, upper + part);
        }
    }
}

#undef FOR_ROWS
