// Filtered normalization for one instruction set; cpu.cpp includes this file once for each, inside a namespace of its
// own.
//
// Everything works on 16 lanes of float. A statistic is summed in lanes around a value of its own set ("shift"), so
// that a large mean costs no digits, for at most a few thousand values (a "tile"), and the tiles are added up in
// double. The first pass also keeps each tile's smallest and largest value: a tile that lies within the band has its
// sums already, and only the others are read a second time, through the mask.

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

constexpr int64_t LANES = 16;

static inline f16 splat(float v) { return v - f16{}; }
static inline f16 smaller(f16 a, f16 b) { return a < b ? a : b; }
static inline f16 larger(f16 a, f16 b) { return a > b ? a : b; }
static inline f16 only(i16 mask, f16 v) { return (f16)(mask & (i16)v); }

static inline double total(f16 v) {
    double t = 0;
    for (int i = 0; i < LANES; ++i) t += v[i];
    return t;
}

struct Float32 {
    typedef float scalar;
    static f16 load(const float* p) {
        f16 v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, f16 v) { memcpy(p, &v, sizeof v); }
};

struct BFloat16 {
    typedef uint16_t scalar;
    static f16 load(const uint16_t* p) {
        h16 v;
        memcpy(&v, p, sizeof v);
        return (f16)(__builtin_convertvector(v, u16) << 16);
    }
    static void store(uint16_t* p, f16 v) {
        u16 bits = (u16)v;
        u16 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
        i16 nan = v != v;
        rounded = (u16)((i16)rounded & ~nan) | (u16)(nan & 0x7fc00000);
        h16 out = __builtin_convertvector(rounded >> 16, h16);
        memcpy(p, &out, sizeof out);
    }
};

// The last, incomplete vector of a run, its missing lanes filled.
template <class T>
static inline f16 load_some(const typename T::scalar* p, int64_t n, float fill) {
    typename T::scalar buffer[LANES] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    f16 v = T::load(buffer);
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)n ? v : splat(fill);
}

template <class T>
static inline void store_some(typename T::scalar* p, int64_t n, f16 v) {
    typename T::scalar buffer[LANES];
    T::store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class T>
static inline float load_one(const typename T::scalar* p) {
    return load_some<T>(p, 1, 0.f)[0];
}

static inline float middle(float a, float b, float c) {
    float low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
}

// A value from the bulk of a set, even if some are far off: the median of three medians of three, `value(i)` being the
// i-th of `n`.
template <class F>
static inline float typical(int64_t n, F value) {
    float thirds[3];
    for (int64_t i = 0; i < 3; ++i)
        thirds[i] = middle(value((6 * i + 1) * n / 18), value((6 * i + 3) * n / 18), value((6 * i + 5) * n / 18));
    return middle(thirds[0], thirds[1], thirds[2]);
}

// What the moments of one set are, and what they normalize with.
struct Set {
    double mean, var, count;
    float lower, upper;
};

static inline void draw_band(Set& s, double shift, double sum, double square, double n, const Options& o) {
    double d = sum / n, var = square / n - d * d, mean = shift + d;
    double sigma = sqrt((var > 0 ? var : var == var ? 0 : var) + o.eps);
    // wide enough to hold a value even where the deviation is below the rounding of the mean
    double width = o.t_sigma * sigma, least = sigma + 16 * 1.1920929e-07 * (sigma + fabs(mean));
    if (!(width > least)) width = least;
    s.lower = (float)(mean - width);
    s.upper = (float)(mean + width);
}

static inline void settle(Set& s, double shift, double sum, double square, double n, const Options& o) {
    double d = sum / n, var = square / n - d * d;
    s.mean = shift + d;
    s.var = (var > 0 ? var : var == var ? 0 : var) / o.kappa;
    s.count = n;
}

static inline void report(const Set& s, int64_t i, const Moments& out) {
    out.mean[i] = (float)s.mean;
    out.var[i] = (float)s.var;
    out.lower[i] = s.lower;
    out.upper[i] = s.upper;
    out.count[i] = (float)s.count;
}

// ---- contiguous layout: a set is a number of runs of consecutive values
// -----------------------------------------------------------------------

struct Tile {
    double sum, square, count;
    float low, high;
};

// Runs that share a statistic: `runs` of them, `length` values each, `stride` values apart.
struct Runs {
    int64_t runs, stride, length;
};

template <class T>
static Tile measure(const typename T::scalar* x, Runs r, float shift) {
    f16 k = splat(shift), sum0{}, sum1{}, square0{}, square1{}, low = k, high = k;
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride) {
        int64_t i = 0;
        for (; i + 2 * LANES <= r.length; i += 2 * LANES) {
            f16 a = T::load(x + i), b = T::load(x + i + LANES), da = a - k, db = b - k;
            sum0 += da, sum1 += db;
            square0 += da * da, square1 += db * db;
            low = smaller(low, smaller(a, b)), high = larger(high, larger(a, b));
        }
        for (; i < r.length; i += LANES) {
            f16 a = i + LANES <= r.length ? T::load(x + i) : load_some<T>(x + i, r.length - i, shift), da = a - k;
            sum0 += da, square0 += da * da;
            low = smaller(low, a), high = larger(high, a);
        }
    }
    Tile t{total(sum0 + sum1), total(square0 + square1), double(r.runs * r.length), low[0], high[0]};
    for (int i = 1; i < LANES; ++i) {
        if (low[i] < t.low) t.low = low[i];
        if (high[i] > t.high) t.high = high[i];
    }
    return t;
}

template <class T>
static Tile measure_kept(const typename T::scalar* x, Runs r, float shift, float lower, float upper) {
    f16 k = splat(shift), lo = splat(lower), hi = splat(upper), sum{}, square{};
    i16 count{};
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride)
        for (int64_t i = 0; i < r.length; i += LANES) {
            f16 a = i + LANES <= r.length ? T::load(x + i) : load_some<T>(x + i, r.length - i, NAN);
            i16 kept = (a >= lo) & (a <= hi);
            f16 d = only(kept, a - k);
            sum += d, square += d * d, count -= kept;
        }
    Tile t{total(sum), total(square), 0, 0, 0};
    for (int i = 0; i < LANES; ++i) t.count += count[i];
    return t;
}

template <class T>
static void normalize(const typename T::scalar* x, typename T::scalar* y, int64_t n, float mean, float scale,
                      float shift) {
    f16 m = splat(mean), a = splat(scale), b = splat(shift);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) T::store(y + i, (T::load(x + i) - m) * a + b);
    if (i < n) store_some<T>(y + i, n - i, (load_some<T>(x + i, n - i, 0.f) - m) * a + b);
}

// How a set of planes is cut into tiles: several short planes make one, a long plane makes several.
struct Tiling {
    int64_t planes, stride, length, planes_per_tile, pieces, piece;
    Tiling(int64_t planes, int64_t stride, int64_t length) : planes(planes), stride(stride), length(length) {
        if (stride == length) this->length = length * planes, this->planes = 1;  // one run
        pieces = (this->length + TILE - 1) / TILE;
        piece = ((this->length + pieces - 1) / pieces + LANES - 1) / LANES * LANES;
        pieces = (this->length + piece - 1) / piece;
        planes_per_tile = TILE / this->length > 1 ? TILE / this->length : 1;
    }
    int64_t tiles() const { return pieces > 1 ? planes * pieces : (planes + planes_per_tile - 1) / planes_per_tile; }
    int64_t at(int64_t tile, Runs& r) const {
        r.stride = stride;
        if (pieces > 1) {
            int64_t start = tile % pieces * piece;
            r.runs = 1, r.length = length - start < piece ? length - start : piece;
            return tile / pieces * stride + start;
        }
        int64_t first = tile * planes_per_tile;
        r.runs = planes - first < planes_per_tile ? planes - first : planes_per_tile, r.length = length;
        return first * stride;
    }
};

template <class T>
static Set filtered_set(const typename T::scalar* x, const Tiling& tiling, const Options& o, Tile* tiles) {
    Runs r;
    int64_t n = tiling.tiles();
    float shift = typical(tiling.planes * tiling.length, [&](int64_t i) {
        return load_one<T>(x + i / tiling.length * tiling.stride + i % tiling.length);
    });
    double sum = 0, square = 0, count = 0;
    for (int64_t t = 0; t < n; ++t) {
        int64_t start = tiling.at(t, r);
        tiles[t] = measure<T>(x + start, r, shift);
        sum += tiles[t].sum, square += tiles[t].square, count += tiles[t].count;
    }
    Set s;
    draw_band(s, shift, sum, square, count, o);
    sum = square = count = 0;
    for (int64_t t = 0; t < n; ++t) {
        if (!(tiles[t].low >= s.lower && tiles[t].high <= s.upper)) {
            int64_t start = tiling.at(t, r);
            tiles[t] = measure_kept<T>(x + start, r, shift, s.lower, s.upper);
        }
        sum += tiles[t].sum, square += tiles[t].square, count += tiles[t].count;
    }
    settle(s, shift, sum, square, count, o);
    return s;
}

template <class T>
static void forward_contiguous(const Shape& d, const Options& o, const void* x_, void* y_, const float* weight,
                               const float* bias, const Moments& out) {
    typedef typename T::scalar scalar;
    const scalar* x = (const scalar*)x_;
    scalar* y = (scalar*)y_;
    const int64_t per_group = d.groups ? d.c / d.groups : 1, sets = d.groups ? d.n * d.groups : d.c;
    const Tiling tiling = d.groups ? Tiling(per_group, d.s, d.s) : Tiling(d.n, d.c * d.s, d.s);
#pragma omp parallel num_threads(o.threads)
    {
        Tile* tiles = (Tile*)malloc(sizeof(Tile) * tiling.tiles());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sets; ++i) {
            const int64_t start = d.groups ? i * per_group * d.s : i * d.s;
            Set s = filtered_set<T>(x + start, tiling, o, tiles);
            report(s, i, out);
            double rstd = 1 / sqrt(s.var + o.eps);
            float mean = (float)s.mean;
            const int64_t planes = d.groups ? per_group : d.n;
            for (int64_t j = 0; j < planes; ++j) {
                int64_t c = d.groups ? i % d.groups * per_group + j : i;
                double a = weight ? weight[c] * rstd : rstd, b = (bias ? bias[c] : 0.0) - (s.mean - mean) * a;
                int64_t at = start + j * (d.groups ? d.s : d.c * d.s);
                normalize<T>(x + at, y + at, d.s, mean, (float)a, (float)b);
            }
        }
        free(tiles);
    }
}

struct Sums {
    double g, gx;  // sum of dL/dy, and of dL/dy times (x - mean)
};

template <class T, bool PAPER>
static Sums gradient_sums(const typename T::scalar* g, const typename T::scalar* x, Runs r, float mean, float lower,
                          float upper) {
    f16 m = splat(mean), lo = splat(lower), hi = splat(upper), sum0{}, sum1{}, dot0{}, dot1{};
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride, g += r.stride) {
        int64_t i = 0;
        for (; i + 2 * LANES <= r.length; i += 2 * LANES) {
            f16 a = T::load(x + i), b = T::load(x + i + LANES), ga = T::load(g + i), gb = T::load(g + i + LANES);
            if (PAPER) ga = only((a >= lo) & (a <= hi), ga), gb = only((b >= lo) & (b <= hi), gb);
            sum0 += ga, sum1 += gb;
            dot0 += ga * (a - m), dot1 += gb * (b - m);
        }
        for (; i < r.length; i += LANES) {
            bool whole = i + LANES <= r.length;
            f16 a = whole ? T::load(x + i) : load_some<T>(x + i, r.length - i, mean);
            f16 ga = whole ? T::load(g + i) : load_some<T>(g + i, r.length - i, 0.f);
            if (PAPER) ga = only((a >= lo) & (a <= hi), ga);
            sum0 += ga, dot0 += ga * (a - m);
        }
    }
    return {total(sum0 + sum1), total(dot0 + dot1)};
}

// dx = scale * g - f * (offset + slope * (x - mean)); in paper mode the offset is not masked.
struct Line {
    float scale, offset, slope, mean, lower, upper;
};

template <bool PAPER>
static inline f16 input_gradient(f16 g, f16 x, f16 scale, f16 offset, f16 slope, f16 mean, f16 lower, f16 upper) {
    i16 kept = (x >= lower) & (x <= upper);
    f16 line = slope * (x - mean);
    return PAPER ? scale * g - offset - only(kept, line) : scale * g - only(kept, offset + line);
}

template <class T, bool PAPER>
static void write_gradient(const typename T::scalar* g, const typename T::scalar* x, typename T::scalar* dx, int64_t n,
                           const Line& l) {
    f16 a = splat(l.scale), b = splat(l.offset), k = splat(l.slope), m = splat(l.mean), lo = splat(l.lower),
        hi = splat(l.upper);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        T::store(dx + i, input_gradient<PAPER>(T::load(g + i), T::load(x + i), a, b, k, m, lo, hi));
    if (i < n) {
        f16 last =
            input_gradient<PAPER>(load_some<T>(g + i, n - i, 0.f), load_some<T>(x + i, n - i, 0.f), a, b, k, m, lo, hi);
        store_some<T>(dx + i, n - i, last);
    }
}

static inline Line line_of(const Moments& m, int64_t i, double weight, double sum_g, double sum_gx, const Options& o) {
    double rstd = 1 / sqrt((double)m.var[i] + o.eps), count = m.count[i];
    return {(float)(weight * rstd),
            (float)(rstd * sum_g / count),
            (float)(rstd * rstd * rstd * sum_gx / (o.kappa * count)),
            m.mean[i],
            m.lower[i],
            m.upper[i]};
}

template <class T, bool PAPER>
static void backward_contiguous(const Shape& d, const Options& o, const void* g_, const void* x_, void* dx_,
                                const float* weight, const Moments& m, float* d_weight, float* d_bias,
                                double* scratch) {
    typedef typename T::scalar scalar;
    const scalar *g = (const scalar*)g_, *x = (const scalar*)x_;
    scalar* dx = (scalar*)dx_;
    if (!d.groups) {
        const Tiling tiling(d.n, d.c * d.s, d.s);
#pragma omp parallel for num_threads(o.threads) schedule(static)
        for (int64_t c = 0; c < d.c; ++c) {
            const int64_t start = c * d.s;
            double sum_g = 0, sum_gx = 0, w = weight ? weight[c] : 1;
            for (int64_t t = 0; t < tiling.tiles(); ++t) {
                Runs r;
                int64_t at = start + tiling.at(t, r);
                Sums s = gradient_sums<T, PAPER>(g + at, x + at, r, m.mean[c], m.lower[c], m.upper[c]);
                sum_g += s.g, sum_gx += s.gx;
            }
            d_bias[c] = (float)sum_g;
            d_weight[c] = (float)(sum_gx / sqrt((double)m.var[c] + o.eps));
            const Line l = line_of(m, c, w, w * sum_g, w * sum_gx, o);
            for (int64_t n = 0; n < d.n; ++n) {
                int64_t at = start + n * d.c * d.s;
                write_gradient<T, PAPER>(g + at, x + at, dx + at, d.s, l);
            }
        }
        return;
    }
    const int64_t per_group = d.c / d.groups;
    double *by_plane_g = scratch, *by_plane_gx = scratch + d.n * d.c;
    const Tiling tiling(1, d.s, d.s);
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d.n * d.groups; ++i) {
            double rstd = 1 / sqrt((double)m.var[i] + o.eps), sum_g = 0, sum_gx = 0;
            for (int64_t j = 0; j < per_group; ++j) {
                int64_t plane = i * per_group + j;
                double g_sum = 0, gx_sum = 0, w = weight ? weight[plane % d.c] : 1;
                for (int64_t t = 0; t < tiling.tiles(); ++t) {
                    Runs r;
                    int64_t at = plane * d.s + tiling.at(t, r);
                    Sums s = gradient_sums<T, PAPER>(g + at, x + at, r, m.mean[i], m.lower[i], m.upper[i]);
                    g_sum += s.g, gx_sum += s.gx;
                }
                by_plane_g[plane] = g_sum, by_plane_gx[plane] = gx_sum * rstd;
                sum_g += w * g_sum, sum_gx += w * gx_sum;
            }
            for (int64_t j = 0; j < per_group; ++j) {
                int64_t plane = i * per_group + j;
                const Line l = line_of(m, i, weight ? weight[plane % d.c] : 1, sum_g, sum_gx, o);
                write_gradient<T, PAPER>(g + plane * d.s, x + plane * d.s, dx + plane * d.s, d.s, l);
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d.c; ++c) {
            double sum_g = 0, sum_gx = 0;
            for (int64_t n = 0; n < d.n; ++n) sum_g += by_plane_g[n * d.c + c], sum_gx += by_plane_gx[n * d.c + c];
            d_bias[c] = (float)sum_g, d_weight[c] = (float)sum_gx;
        }
    }
}

// ---- channels-last layout: rows of C values, one for each sample and position; a set is some columns of some rows
// ------------------------------

// Rows are cut into tiles that do not cross a sample where samples are apart (group form). "Part" is a sample, or the
// whole batch.
struct Rows {
    int64_t c, parts, rows_per_part, tiles_per_part, rows_per_tile;
    Rows(const Shape& d) : c(d.c), parts(d.groups ? d.n : 1), rows_per_part(d.groups ? d.s : d.n * d.s) {
        rows_per_tile = rows_per_part / 32 < 32 ? 32 : rows_per_part / 32 > 256 ? 256 : rows_per_part / 32;
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

// Sums of one tile's columns, for all channels of a layer: an array of C for each tile.
struct Columns {
    double *sum, *square, *count;
    float *low, *high;
    explicit Columns(int64_t n) {
        sum = (double*)malloc(n * (3 * sizeof(double) + 2 * sizeof(float)));
        square = sum + n, count = square + n, low = (float*)(count + n), high = low + n;
    }
    ~Columns() { free(sum); }
};

template <class T, bool WHOLE>
static inline f16 load_columns(const typename T::scalar* p, int64_t n) {
    return WHOLE ? T::load(p) : load_some<T>(p, n, 0.f);
}

template <class T, int V, bool WHOLE>
static void measure_columns(const typename T::scalar* x, int64_t rows, int64_t stride, int64_t n, const float* shift,
                            const Columns& out, int64_t at) {
    f16 k[V], sum[V], square[V], low[V], high[V];
    for (int v = 0; v < V; ++v) {
        k[v] = load_columns<Float32, WHOLE>(shift + v * LANES, n);
        sum[v] = square[v] = f16{}, low[v] = high[v] = load_columns<T, WHOLE>(x + v * LANES, n);
    }
    for (int64_t r = 0; r < rows; ++r, x += stride)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            f16 a = load_columns<T, WHOLE>(x + v * LANES, n), d = a - k[v];
            sum[v] += d, square[v] += d * d, low[v] = smaller(low[v], a), high[v] = larger(high[v], a);
        }
    for (int64_t i = 0; i < V * LANES && i < n; ++i) {
        out.sum[at + i] = sum[i / LANES][i % LANES], out.square[at + i] = square[i / LANES][i % LANES],
                     out.count[at + i] = (double)rows;
        out.low[at + i] = low[i / LANES][i % LANES], out.high[at + i] = high[i / LANES][i % LANES];
    }
}

template <class T, bool WHOLE>
static void measure_kept_columns(const typename T::scalar* x, int64_t rows, int64_t stride, int64_t n,
                                 const float* shift, const float* lower, const float* upper, const Columns& out,
                                 int64_t at) {
    f16 k = load_columns<Float32, WHOLE>(shift, n), lo = load_columns<Float32, WHOLE>(lower, n),
        hi = load_columns<Float32, WHOLE>(upper, n);
    f16 sum{}, square{};
    i16 count{};
    for (int64_t r = 0; r < rows; ++r, x += stride) {
        f16 a = load_columns<T, WHOLE>(x, n);
        i16 kept = (a >= lo) & (a <= hi);
        f16 d = only(kept, a - k);
        sum += d, square += d * d, count -= kept;
    }
    for (int64_t i = 0; i < LANES && i < n; ++i)
        out.sum[at + i] = sum[i], out.square[at + i] = square[i], out.count[at + i] = count[i];
}

// Runs `body(first channel, number of channels)` over blocks of 64 channels, then 16, then what is left.
#define FOR_BLOCKS(c, WIDE, NARROW, REST)              \
    {                                                  \
        int64_t at = 0;                                \
        for (; at + 4 * LANES <= c; at += 4 * LANES) { \
            const int64_t n = 4 * LANES;               \
            WIDE;                                      \
        }                                              \
        for (; at + LANES <= c; at += LANES) {         \
            const int64_t n = LANES;                   \
            NARROW;                                    \
        }                                              \
        if (at < c) {                                  \
            const int64_t n = c - at;                  \
            REST;                                      \
        }                                              \
    }

// Add the columns of a set around its first shift.
static inline void add_columns(const Columns& columns, const float* shift, const Rows& rows, int64_t part,
                               int64_t first, int64_t channels, double& sum, double& square, double& count) {
    sum = square = count = 0;
    for (int64_t c = first; c < first + channels; ++c) {
        double a = 0, b = 0, n = 0, d = (double)shift[part * rows.c + c] - shift[part * rows.c + first];
        for (int64_t t = 0; t < rows.tiles_per_part; ++t) {
            int64_t at = (part * rows.tiles_per_part + t) * rows.c + c;
            a += columns.sum[at], b += columns.square[at], n += columns.count[at];
        }
        sum += a + n * d, square += b + 2 * d * a + n * d * d, count += n;
    }
}

template <class T, bool WHOLE>
static inline void normalize_columns(const typename T::scalar* x, typename T::scalar* y, int64_t n, const float* mean,
                                     const float* scale, const float* shift) {
    f16 v = (load_columns<T, WHOLE>(x, n) - load_columns<Float32, WHOLE>(mean, n)) *
                load_columns<Float32, WHOLE>(scale, n) +
            load_columns<Float32, WHOLE>(shift, n);
    if (WHOLE)
        T::store(y, v);
    else
        store_some<T>(y, n, v);
}

template <class T>
static void forward_channels_last(const Shape& d, const Options& o, const void* x_, void* y_, const float* weight,
                                  const float* bias, const Moments& out) {
    typedef typename T::scalar scalar;
    const scalar* x = (const scalar*)x_;
    scalar* y = (scalar*)y_;
    const Rows rows(d);
    const int64_t C = d.c, channels = d.groups ? d.c / d.groups : 1, sets_per_part = C / channels;
    Columns columns(rows.tiles() * C);
    float* shift = (float*)malloc(sizeof(float) * rows.parts * C * 5);
    float *lower = shift + rows.parts * C, *upper = lower + rows.parts * C, *scale = upper + rows.parts * C,
          *offset = scale + rows.parts * C;
    float* mean = lower;  // the band is not needed once the moments are known
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * C; ++i) {
            const scalar* p = x + i / C * rows.rows_per_part * C + i % C;
            shift[i] = typical(rows.rows_per_part, [&](int64_t r) { return load_one<T>(p + r * C); });
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows.tiles(); ++t) {
            const scalar* p = x + rows.first(t) * C;
            const float* k = shift + rows.part(t) * C;
            int64_t r = rows.count(t);
            FOR_BLOCKS(C, (measure_columns<T, 4, true>(p + at, r, C, n, k + at, columns, t * C + at)),
                       (measure_columns<T, 1, true>(p + at, r, C, n, k + at, columns, t * C + at)),
                       (measure_columns<T, 1, false>(p + at, r, C, n, k + at, columns, t * C + at)))
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * sets_per_part; ++i) {
            int64_t part = i / sets_per_part, first = i % sets_per_part * channels;
            double sum, square, count;
            Set s;
            add_columns(columns, shift, rows, part, first, channels, sum, square, count);
            draw_band(s, shift[part * C + first], sum, square, count, o);
            for (int64_t c = first; c < first + channels; ++c)
                lower[part * C + c] = s.lower, upper[part * C + c] = s.upper;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows.tiles(); ++t) {
            const scalar* p = x + rows.first(t) * C;
            const int64_t part = rows.part(t) * C;
            for (int64_t at = 0; at < C; at += LANES) {
                int64_t n = C - at < LANES ? C - at : LANES;
                bool outlier = false;
                for (int64_t i = at; i < at + n; ++i)
                    outlier |=
                        !(columns.low[t * C + i] >= lower[part + i] && columns.high[t * C + i] <= upper[part + i]);
                if (!outlier) continue;
                if (n == LANES)
                    measure_kept_columns<T, true>(p + at, rows.count(t), C, n, shift + part + at, lower + part + at,
                                                  upper + part + at, columns, t * C + at);
                else
                    measure_kept_columns<T, false>(p + at, rows.count(t), C, n, shift + part + at, lower + part + at,
                                                   upper + part + at, columns, t * C + at);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * sets_per_part; ++i) {
            int64_t part = i / sets_per_part, first = i % sets_per_part * channels;
            double sum, square, count;
            Set s;
            s.lower = lower[part * C + first], s.upper = upper[part * C + first];
            add_columns(columns, shift, rows, part, first, channels, sum, square, count);
            settle(s, shift[part * C + first], sum, square, count, o);
            report(s, i, out);
            double rstd = 1 / sqrt(s.var + o.eps);
            for (int64_t c = first; c < first + channels; ++c) {
                double a = weight ? weight[c] * rstd : rstd;
                mean[part * C + c] = (float)s.mean, scale[part * C + c] = (float)a;
                offset[part * C + c] = (float)((bias ? bias[c] : 0.0) - (s.mean - (float)s.mean) * a);
            }
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows.tiles(); ++t) {
            const int64_t part = rows.part(t) * C;
            const float *m = mean + part, *a = scale + part, *b = offset + part;
            for (int64_t r = 0; r < rows.count(t); ++r) {
                const scalar* p = x + (rows.first(t) + r) * C;
                scalar* q = y + (rows.first(t) + r) * C;
                int64_t at = 0;
                for (; at + LANES <= C; at += LANES)
                    normalize_columns<T, true>(p + at, q + at, LANES, m + at, a + at, b + at);
                if (at < C) normalize_columns<T, false>(p + at, q + at, C - at, m + at, a + at, b + at);
            }
        }
    }
    free(shift);
}

template <class T, bool PAPER, int V, bool WHOLE>
static void gradient_columns(const typename T::scalar* g, const typename T::scalar* x, int64_t rows, int64_t stride,
                             int64_t n, const float* mean, const float* lower, const float* upper, const Columns& out,
                             int64_t at) {
    f16 m[V], lo[V], hi[V], sum[V], dot[V];
    for (int v = 0; v < V; ++v) {
        m[v] = load_columns<Float32, WHOLE>(mean + v * LANES, n);
        lo[v] = load_columns<Float32, WHOLE>(lower + v * LANES, n),
        hi[v] = load_columns<Float32, WHOLE>(upper + v * LANES, n);
        sum[v] = dot[v] = f16{};
    }
    for (int64_t r = 0; r < rows; ++r, x += stride, g += stride)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            f16 a = load_columns<T, WHOLE>(x + v * LANES, n), ga = load_columns<T, WHOLE>(g + v * LANES, n);
            if (PAPER) ga = only((a >= lo[v]) & (a <= hi[v]), ga);
            sum[v] += ga, dot[v] += ga * (a - m[v]);
        }
    for (int64_t i = 0; i < V * LANES && i < n; ++i)
        out.sum[at + i] = sum[i / LANES][i % LANES], out.square[at + i] = dot[i / LANES][i % LANES];
}

template <class T, bool PAPER, bool WHOLE>
static inline void write_gradient_columns(const typename T::scalar* g, const typename T::scalar* x,
                                          typename T::scalar* dx, int64_t n, const float* scale, const float* offset,
                                          const float* slope, const float* mean, const float* lower,
                                          const float* upper) {
    f16 v = input_gradient<PAPER>(load_columns<T, WHOLE>(g, n), load_columns<T, WHOLE>(x, n),
                                  load_columns<Float32, WHOLE>(scale, n), load_columns<Float32, WHOLE>(offset, n),
                                  load_columns<Float32, WHOLE>(slope, n), load_columns<Float32, WHOLE>(mean, n),
                                  load_columns<Float32, WHOLE>(lower, n), load_columns<Float32, WHOLE>(upper, n));
    if (WHOLE)
        T::store(dx, v);
    else
        store_some<T>(dx, n, v);
}

template <class T, bool PAPER>
static void backward_channels_last(const Shape& d, const Options& o, const void* g_, const void* x_, void* dx_,
                                   const float* weight, const Moments& m, float* d_weight, float* d_bias,
                                   double* scratch) {
    typedef typename T::scalar scalar;
    const scalar *g = (const scalar*)g_, *x = (const scalar*)x_;
    scalar* dx = (scalar*)dx_;
    const Rows rows(d);
    const int64_t C = d.c, channels = d.groups ? d.c / d.groups : 1, sets_per_part = C / channels;
    Columns columns(rows.tiles() * C);
    double *by_part_g = scratch, *by_part_gx = scratch + rows.parts * C;
    float* scale = (float*)malloc(sizeof(float) * rows.parts * C * 6);
    float *offset = scale + rows.parts * C, *slope = offset + rows.parts * C, *mean = slope + rows.parts * C;
    float *lower = mean + rows.parts * C, *upper = lower + rows.parts * C;
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * C; ++i) {
            int64_t set = i / C * sets_per_part + i % C / channels;
            mean[i] = m.mean[set], lower[i] = m.lower[set], upper[i] = m.upper[set];
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows.tiles(); ++t) {
            const int64_t start = rows.first(t) * C, part = rows.part(t) * C, r = rows.count(t);
            const float *k = mean + part, *lo = lower + part, *hi = upper + part;
            FOR_BLOCKS(C,
                       (gradient_columns<T, PAPER, 4, true>(g + start + at, x + start + at, r, C, n, k + at, lo + at,
                                                            hi + at, columns, t * C + at)),
                       (gradient_columns<T, PAPER, 1, true>(g + start + at, x + start + at, r, C, n, k + at, lo + at,
                                                            hi + at, columns, t * C + at)),
                       (gradient_columns<T, PAPER, 1, false>(g + start + at, x + start + at, r, C, n, k + at, lo + at,
                                                             hi + at, columns, t * C + at)))
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * sets_per_part; ++i) {
            int64_t part = i / sets_per_part, first = i % sets_per_part * channels;
            double rstd = 1 / sqrt((double)m.var[i] + o.eps), sum_g = 0, sum_gx = 0;
            for (int64_t c = first; c < first + channels; ++c) {
                double a = 0, b = 0, w = weight ? weight[c] : 1;
                for (int64_t t = 0; t < rows.tiles_per_part; ++t) {
                    int64_t at = (part * rows.tiles_per_part + t) * C + c;
                    a += columns.sum[at], b += columns.square[at];
                }
                by_part_g[part * C + c] = a, by_part_gx[part * C + c] = b * rstd;
                sum_g += w * a, sum_gx += w * b;
            }
            for (int64_t c = first; c < first + channels; ++c) {
                const Line l = line_of(m, i, weight ? weight[c] : 1, sum_g, sum_gx, o);
                scale[part * C + c] = l.scale, offset[part * C + c] = l.offset, slope[part * C + c] = l.slope;
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < C; ++c) {
            double sum_g = 0, sum_gx = 0;
            for (int64_t p = 0; p < rows.parts; ++p) sum_g += by_part_g[p * C + c], sum_gx += by_part_gx[p * C + c];
            d_bias[c] = (float)sum_g, d_weight[c] = (float)sum_gx;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows.tiles(); ++t) {
            const int64_t p = rows.part(t) * C;
            for (int64_t r = 0; r < rows.count(t); ++r) {
                const int64_t start = (rows.first(t) + r) * C;
                int64_t at = 0;
                for (; at + LANES <= C; at += LANES)
                    write_gradient_columns<T, PAPER, true>(g + start + at, x + start + at, dx + start + at, LANES,
                                                           scale + p + at, offset + p + at, slope + p + at,
                                                           mean + p + at, lower + p + at, upper + p + at);
                if (at < C)
                    write_gradient_columns<T, PAPER, false>(g + start + at, x + start + at, dx + start + at, C - at,
                                                            scale + p + at, offset + p + at, slope + p + at,
                                                            mean + p + at, lower + p + at, upper + p + at);
            }
        }
    }
    free(scale);
}

#undef FOR_BLOCKS

static void forward(const Shape& d, const Options& o, const void* x, void* y, const float* weight, const float* bias,
                    const Moments& m) {
    auto run = o.channels_last ? (o.bfloat16 ? forward_channels_last<BFloat16> : forward_channels_last<Float32>)
                               : (o.bfloat16 ? forward_contiguous<BFloat16> : forward_contiguous<Float32>);
    run(d, o, x, y, weight, bias, m);
}

template <class T>
static void backward_of(const Shape& d, const Options& o, const void* g, const void* x, void* dx, const float* weight,
                        const Moments& m, float* d_weight, float* d_bias, double* scratch) {
    auto run = o.channels_last ? (o.paper ? backward_channels_last<T, true> : backward_channels_last<T, false>)
                               : (o.paper ? backward_contiguous<T, true> : backward_contiguous<T, false>);
    run(d, o, g, x, dx, weight, m, d_weight, d_bias, scratch);
}

static void backward(const Shape& d, const Options& o, const void* g, const void* x, void* dx, const float* weight,
                     const Moments& m, float* d_weight, float* d_bias, double* scratch) {
    (o.bfloat16 ? backward_of<BFloat16> : backward_of<Float32>)(d, o, g, x, dx, weight, m, d_weight, d_bias, scratch);
}
