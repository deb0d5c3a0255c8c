// Filtered normalization for one instruction set; kernels.cpp includes this file once for each, inside a namespace of its
// own.
//
// Everything works on vectors of VECTOR_BYTES. A statistic is summed in lanes around a value of its own set ("shift"),
// so that a large mean costs no digits, for at most a few thousand values (a "tile"), and the tiles are added up in
// double. The first pass also keeps each tile's smallest and largest value: a tile that lies within the band has its
// sums already, and only the others are read a second time, through the mask.

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(VECTOR_BYTES)));  // half as many
typedef float half_vfloat __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int32_t half_vint __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t vbfloat __attribute__((vector_size(VECTOR_BYTES / 2)));

constexpr int64_t LANES = VECTOR_BYTES / sizeof(float);

static inline vfloat splat(float v) { return v - vfloat{}; }
static inline vfloat smaller(vfloat a, vfloat b) { return a < b ? a : b; }
static inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }
static inline float smaller(float a, float b) { return a < b ? a : b; }
static inline float larger(float a, float b) { return a > b ? a : b; }
static inline vfloat only(vint mask, vfloat v) { return (vfloat)(mask & (vint)v); }

static inline vint lane_numbers() {
    vint lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i;
    return lanes;
}

template <class Half, class Whole>
static inline Half half(const Whole& v, int which) {
    Half h;
    memcpy(&h, (const char*)&v + which * sizeof h, sizeof h);
    return h;
}

static inline bool any_of(vint mask) {
    half_vint some = half<half_vint>(mask, 0) | half<half_vint>(mask, 1);
    int32_t any = 0;
    for (int i = 0; i < LANES / 2; ++i) any |= some[i];
    return any;
}

static inline double total(vfloat v) {
    vdouble wide = __builtin_convertvector(half<half_vfloat>(v, 0), vdouble) +
                   __builtin_convertvector(half<half_vfloat>(v, 1), vdouble);
    double even = 0, odd = 0;
    for (int i = 0; i < LANES / 2; i += 2) even += wide[i], odd += wide[i + 1];
    return even + odd;
}

static inline float smallest(vfloat v) {
    half_vfloat a = half<half_vfloat>(v, 0), b = half<half_vfloat>(v, 1), c = a < b ? a : b;
    float even = c[0], odd = c[1];
    for (int i = 2; i < LANES / 2; i += 2) even = smaller(even, c[i]), odd = smaller(odd, c[i + 1]);
    return smaller(even, odd);
}

struct Float32 {
    typedef float scalar;
    static vfloat load(const float* p) {
        vfloat v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static float load_one(const float* p) { return *p; }
    static void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
};

struct BFloat16 {
    typedef uint16_t scalar;
    static vfloat load(const uint16_t* p) {
        vbfloat v;
        memcpy(&v, p, sizeof v);
        return (vfloat)(__builtin_convertvector(v, vuint) << 16);
    }
    static float load_one(const uint16_t* p) {
        const uint32_t bits = (uint32_t)*p << 16;
        float v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    static void store(uint16_t* p, vfloat v) {
        vuint bits = (vuint)v;
        vuint rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
        vint nan = v != v;
        rounded = (vuint)((vint)rounded & ~nan) | (vuint)(nan & 0x7fc00000);
        vbfloat out = __builtin_convertvector(rounded >> 16, vbfloat);
        memcpy(p, &out, sizeof out);
    }
};

// The last, incomplete vector of a run, its missing lanes filled.
template <class T>
static inline vfloat load_some(const typename T::scalar* p, int64_t n, float fill) {
    typename T::scalar buffer[LANES] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    vfloat v = T::load(buffer);
    return lane_numbers() < (int32_t)n ? v : splat(fill);
}

template <class T>
static inline void store_some(typename T::scalar* p, int64_t n, vfloat v) {
    typename T::scalar buffer[LANES];
    T::store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// What is left of a run of `length` values from `i` on, in some lanes, and the others filled. Where it can, it reads
// whole vectors, which is much faster.
template <class T>
static inline vfloat load_rest(const typename T::scalar* p, int64_t i, int64_t length, float fill) {
    if (length < LANES) return load_some<T>(p + i, length - i, fill);
    return lane_numbers() >= (int32_t)(i + LANES - length) ? T::load(p + length - LANES) : splat(fill);
}

// A run of `n` values is written a vector at a time. Where the last one would be incomplete it overlaps the one before,
// which is cheaper than a mask; only a run of less than one vector is an incomplete vector (WHOLE is false).
static inline int64_t vectors(int64_t n) { return (n + LANES - 1) / LANES; }
static inline int64_t start_of(int64_t vector, int64_t n) {
    const int64_t at = vector * LANES;
    return at + LANES <= n ? at : n < LANES ? 0 : n - LANES;
}

template <class F>
static inline void for_vectors(int64_t n, F body) {
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES) body(at);
    if (at < n) body(n < LANES ? 0 : n - LANES);
}

template <class T, bool WHOLE>
static inline vfloat load_vector(const typename T::scalar* p, int64_t n) {
    return WHOLE ? T::load(p) : load_some<T>(p, n, 0.f);
}

template <class T, bool WHOLE>
static inline void store_vector(typename T::scalar* p, int64_t n, vfloat v) {
    if (WHOLE)
        T::store(p, v);
    else
        store_some<T>(p, n, v);
}

template <class V>
static inline V middle(V a, V b, V c) {
    return larger(smaller(a, b), smaller(larger(a, b), c));
}

// A value from the bulk of a set, even if some are far off: the median of three medians of three, `value(i)` being the
// i-th of `n`. The nine are not equally spaced, or they would all fall on outliers that are, such as a map's border.
template <class V, class F>
static inline V typical(int64_t n, F value) {
    static const int64_t places[] = {2203, 9137, 16811, 23561, 31013, 39119, 46237, 53887, 61909};  // of 65536
    V thirds[3];
    for (int64_t i = 0; i < 3; ++i)
        thirds[i] = middle<V>(value(n * places[3 * i] >> 16), value(n * places[3 * i + 1] >> 16),
                              value(n * places[3 * i + 2] >> 16));
    return middle<V>(thirds[0], thirds[1], thirds[2]);
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
    vfloat k = splat(shift), sum0{}, sum1{}, square0{}, square1{}, low = k, high = k;
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride) {
        int64_t i = 0;
        for (; i + 2 * LANES <= r.length; i += 2 * LANES) {
            vfloat a = T::load(x + i), b = T::load(x + i + LANES), da = a - k, db = b - k;
            sum0 += da, sum1 += db;
            square0 += da * da, square1 += db * db;
            low = smaller(low, smaller(a, b)), high = larger(high, larger(a, b));
        }
        for (; i < r.length; i += LANES) {
            vfloat a = i + LANES <= r.length ? T::load(x + i) : load_rest<T>(x, i, r.length, shift), da = a - k;
            sum0 += da, square0 += da * da;
            low = smaller(low, a), high = larger(high, a);
        }
    }
    return {total(sum0 + sum1), total(square0 + square1), double(r.runs * r.length), smallest(low), -smallest(-high)};
}

template <class T>
static Tile measure_kept(const typename T::scalar* x, Runs r, float shift, float lower, float upper) {
    vfloat k = splat(shift), lo = splat(lower), hi = splat(upper), one = splat(1.f);
    vfloat sum0{}, sum1{}, square0{}, square1{}, count0{}, count1{};
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride) {
        int64_t i = 0;
        for (; i + 2 * LANES <= r.length; i += 2 * LANES) {
            vfloat a = T::load(x + i), b = T::load(x + i + LANES);
            vint kept_a = (a >= lo) & (a <= hi), kept_b = (b >= lo) & (b <= hi);
            vfloat da = only(kept_a, a - k), db = only(kept_b, b - k);
            sum0 += da, sum1 += db, square0 += da * da, square1 += db * db;
            count0 += only(kept_a, one), count1 += only(kept_b, one);
        }
        for (; i < r.length; i += LANES) {
            vfloat a = i + LANES <= r.length ? T::load(x + i) : load_rest<T>(x, i, r.length, NAN);
            vint kept = (a >= lo) & (a <= hi);
            vfloat d = only(kept, a - k);
            sum0 += d, square0 += d * d, count0 += only(kept, one);
        }
    }
    return {total(sum0 + sum1), total(square0 + square1), total(count0 + count1), 0, 0};
}

template <class T, bool WHOLE>
static void normalize(const typename T::scalar* x, typename T::scalar* y, int64_t n, float mean, float scale,
                      float shift) {
    vfloat m = splat(mean), a = splat(scale), b = splat(shift);
    for_vectors(n, [=](int64_t i) { store_vector<T, WHOLE>(y + i, n, (load_vector<T, WHOLE>(x + i, n) - m) * a + b); });
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
    float shift = typical<float>(tiling.planes * tiling.length, [&](int64_t i) {
        return T::load_one(tiling.planes == 1 ? x + i : x + i / tiling.length * tiling.stride + i % tiling.length);
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

template <class T, bool WHOLE>
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
            const double rstd = 1 / sqrt(s.var + o.eps);
            const float mean = (float)s.mean;
            for (int64_t j = 0; j < (d.groups ? per_group : 1); ++j) {
                const int64_t c = d.groups ? i % d.groups * per_group + j : i;
                const double a = weight ? weight[c] * rstd : rstd, b = (bias ? bias[c] : 0.0) - (s.mean - mean) * a;
                for (int64_t k = 0; k < (d.groups ? 1 : d.n); ++k) {
                    const int64_t at = start + j * d.s + k * d.c * d.s;
                    normalize<T, WHOLE>(x + at, y + at, d.s, mean, (float)a, (float)b);
                }
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
    vfloat m = splat(mean), lo = splat(lower), hi = splat(upper), sum0{}, sum1{}, dot0{}, dot1{};
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride, g += r.stride) {
        int64_t i = 0;
        for (; i + 2 * LANES <= r.length; i += 2 * LANES) {
            vfloat a = T::load(x + i), b = T::load(x + i + LANES), ga = T::load(g + i), gb = T::load(g + i + LANES);
            if (PAPER) ga = only((a >= lo) & (a <= hi), ga), gb = only((b >= lo) & (b <= hi), gb);
            sum0 += ga, sum1 += gb;
            dot0 += ga * (a - m), dot1 += gb * (b - m);
        }
        for (; i < r.length; i += LANES) {
            bool whole = i + LANES <= r.length;
            vfloat a = whole ? T::load(x + i) : load_rest<T>(x, i, r.length, mean);
            vfloat ga = whole ? T::load(g + i) : load_rest<T>(g, i, r.length, 0.f);
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
static inline vfloat input_gradient(vfloat g, vfloat x, vfloat scale, vfloat offset, vfloat slope, vfloat mean,
                                    vfloat lower, vfloat upper) {
    vint kept = (x >= lower) & (x <= upper);
    vfloat line = slope * (x - mean);
    return PAPER ? scale * g - offset - only(kept, line) : scale * g - only(kept, offset + line);
}

template <class T, bool WHOLE, bool PAPER>
static void write_gradient(const typename T::scalar* g, const typename T::scalar* x, typename T::scalar* dx, int64_t n,
                           const Line& l) {
    vfloat a = splat(l.scale), b = splat(l.offset), k = splat(l.slope), m = splat(l.mean), lo = splat(l.lower),
           hi = splat(l.upper);
    for_vectors(n, [=](int64_t i) {
        vfloat gi = load_vector<T, WHOLE>(g + i, n), xi = load_vector<T, WHOLE>(x + i, n);
        store_vector<T, WHOLE>(dx + i, n, input_gradient<PAPER>(gi, xi, a, b, k, m, lo, hi));
    });
}

// The line of a set; its scale is still to be multiplied by a channel's weight.
static inline Line line_of(const Moments& m, int64_t set, double sum_g, double sum_gx, const Options& o) {
    double rstd = 1 / sqrt((double)m.var[set] + o.eps), count = m.count[set];
    return {(float)rstd,
            (float)(rstd * sum_g / count),
            (float)(rstd * rstd * rstd * sum_gx / (o.kappa * count)),
            m.mean[set],
            m.lower[set],
            m.upper[set]};
}

template <class T, bool WHOLE, bool PAPER>
static void backward_contiguous(const Shape& d, const Options& o, const void* g_, const void* x_, void* dx_,
                                const float* weight, const Moments& m, float* d_weight, float* d_bias) {
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
            Line l = line_of(m, c, w * sum_g, w * sum_gx, o);
            l.scale *= (float)w;
            for (int64_t n = 0; n < d.n; ++n) {
                int64_t at = start + n * d.c * d.s;
                write_gradient<T, WHOLE, PAPER>(g + at, x + at, dx + at, d.s, l);
            }
        }
        return;
    }
    const int64_t per_group = d.c / d.groups;
    double* by_plane_g = (double*)malloc(2 * sizeof(double) * d.n * d.c);
    double* by_plane_gx = by_plane_g + d.n * d.c;
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
            const Line line = line_of(m, i, sum_g, sum_gx, o);
            for (int64_t j = 0; j < per_group; ++j) {
                int64_t plane = i * per_group + j;
                Line l = line;
                if (weight) l.scale *= weight[plane % d.c];
                write_gradient<T, WHOLE, PAPER>(g + plane * d.s, x + plane * d.s, dx + plane * d.s, d.s, l);
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d.c; ++c) {
            double sum_g = 0, sum_gx = 0;
            for (int64_t n = 0; n < d.n; ++n) sum_g += by_plane_g[n * d.c + c], sum_gx += by_plane_gx[n * d.c + c];
            d_bias[c] = (float)sum_g, d_weight[c] = (float)sum_gx;
        }
    }
    free(by_plane_g);
}

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

// What is known of one tile's columns: arrays of C for each tile. A tile has so few rows that float can hold its sums.
struct Columns {
    float *sum, *square, *count, *low, *high;
    explicit Columns(int64_t n) {
        sum = (float*)malloc(n * 5 * sizeof(float));
        square = sum + n, count = square + n, low = count + n, high = low + n;
    }
    ~Columns() { free(sum); }
};

constexpr int64_t CHUNK = 32;  // vectors of a row that are worked on together:
                               // their sums stay in the first cache
constexpr int R = 4;           // rows that are read side by side

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

template <class T, bool WHOLE, int ROWS>
static inline void measure_rows(const typename T::scalar* x, int64_t c, int64_t first, int64_t n, const float* shift,
                                vfloat* sum, vfloat* square, vfloat* low, vfloat* high) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = start_of(first + i, c);
        vfloat k = load_vector<Float32, WHOLE>(shift + at, c), s{}, q{}, lo = low[i], hi = high[i];
#pragma GCC unroll 4
        for (int j = 0; j < ROWS; ++j) {
            vfloat a = load_vector<T, WHOLE>(x + j * c + at, c), d = a - k;
            s += d, q += d * d, lo = smaller(lo, a), hi = larger(hi, a);
        }
        sum[i] += s, square[i] += q, low[i] = lo, high[i] = hi;
    }
}

template <class T, bool WHOLE>
static void measure_columns(const typename T::scalar* x, int64_t rows, int64_t c, const float* shift,
                            const Columns& out, int64_t tile) {
    vfloat sum[CHUNK], square[CHUNK], low[CHUNK], high[CHUNK];
    for (int64_t first = 0; first < vectors(c); first += CHUNK) {
        const int64_t n = vectors(c) - first < CHUNK ? vectors(c) - first : CHUNK;
        for (int64_t i = 0; i < n; ++i) {
            sum[i] = square[i] = vfloat{};
            low[i] = high[i] = load_vector<T, WHOLE>(x + start_of(first + i, c), c);
        }
#define STEP(ROWS) measure_rows<T, WHOLE, ROWS>(x + row, c, first, n, shift, sum, square, low, high);
        FOR_ROWS(rows, c, STEP)
#undef STEP
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = tile * c + start_of(first + i, c);
            store_vector<Float32, WHOLE>(out.sum + at, c, sum[i]);
            store_vector<Float32, WHOLE>(out.square + at, c, square[i]);
            store_vector<Float32, WHOLE>(out.count + at, c, splat((float)rows));
            store_vector<Float32, WHOLE>(out.low + at, c, low[i]);
            store_vector<Float32, WHOLE>(out.high + at, c, high[i]);
        }
    }
}

template <class T, bool WHOLE, int ROWS>
static inline void measure_kept_rows(const typename T::scalar* x, int64_t c, const int64_t* columns, int64_t n,
                                     const float* shift, const float* lower, const float* upper, vfloat* sum,
                                     vfloat* square, vfloat* count) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = columns[i];
        vfloat k = load_vector<Float32, WHOLE>(shift + at, c), lo = load_vector<Float32, WHOLE>(lower + at, c),
               hi = load_vector<Float32, WHOLE>(upper + at, c), s{}, q{}, m{};
#pragma GCC unroll 4
        for (int j = 0; j < ROWS; ++j) {
            vfloat a = load_vector<T, WHOLE>(x + j * c + at, c);
            vint kept = (a >= lo) & (a <= hi);
            vfloat d = only(kept, a - k);
            s += d, q += d * d, m += only(kept, splat(1.f));
        }
        sum[i] += s, square[i] += q, count[i] += m;
    }
}

// Measure those vectors of columns again that hold a value outside the band; how many there were.
template <class T, bool WHOLE>
static int64_t measure_kept_columns(const typename T::scalar* x, int64_t rows, int64_t c, const float* shift,
                                    const float* lower, const float* upper, const Columns& out, int64_t tile) {
    vfloat sum[CHUNK], square[CHUNK], count[CHUNK];
    int64_t columns[CHUNK], n = 0, measured = 0;
    for (int64_t v = 0; v < vectors(c); ++v) {
        const int64_t at = start_of(v, c);
        vint outside =
            ~((load_vector<Float32, WHOLE>(out.low + tile * c + at, c) >= load_vector<Float32, WHOLE>(lower + at, c)) &
              (load_vector<Float32, WHOLE>(out.high + tile * c + at, c) <= load_vector<Float32, WHOLE>(upper + at, c)));
        if (any_of(outside)) columns[n++] = at;
        if (n < CHUNK && (v + 1 < vectors(c) || n == 0)) continue;
        for (int64_t i = 0; i < n; ++i) sum[i] = square[i] = count[i] = vfloat{};
#define STEP(ROWS) measure_kept_rows<T, WHOLE, ROWS>(x + row, c, columns, n, shift, lower, upper, sum, square, count);
        FOR_ROWS(rows, c, STEP)
#undef STEP
        for (int64_t i = 0; i < n; ++i) {
            store_vector<Float32, WHOLE>(out.sum + tile * c + columns[i], c, sum[i]);
            store_vector<Float32, WHOLE>(out.square + tile * c + columns[i], c, square[i]);
            store_vector<Float32, WHOLE>(out.count + tile * c + columns[i], c, count[i]);
        }
        measured += n, n = 0;
    }
    return measured;
}

// Add the tiles of one part's column.
static inline void add_tiles(const float* of, const Rows& rows, int64_t part, int64_t first, int64_t n, double* total) {
    for (int64_t i = 0; i < n; ++i) total[i] = 0;
    const float* p = of + part * rows.tiles_per_part * rows.c + first;
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

// The sums of a set of columns, each of them around a shift of its own, around the first one's.
struct Total {
    double sum, square, count;
    Total(const double* sums, const double* squares, const double* counts, const float* shift, int64_t channels)
        : sum(0), square(0), count(0) {
        for (int64_t c = 0; c < channels; ++c) {
            double d = (double)shift[c] - shift[0];
            sum += sums[c] + counts[c] * d, square += squares[c] + 2 * d * sums[c] + counts[c] * d * d;
            count += counts[c];
        }
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
    double* sums = (double*)malloc(3 * sizeof(double) * all);
    double *squares = sums + all, *counts = squares + all;
    float* shift = (float*)malloc(5 * sizeof(float) * all);
    float *lower = shift + all, *upper = lower + all, *scale = upper + all, *offset = scale + all;
    float* mean = lower;  // the band is not needed once the moments are known
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
        for (int64_t t = share.begin; t < share.end; ++t)
            measure_columns<T, WHOLE>(x + rows.first(t) * C, rows.count(t), C, shift + rows.part(t) * C, columns, t);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * blocks.per_part; ++i) {
            const int64_t part = blocks.part(i), n = blocks.channels, first = blocks.first_set(i) * n;
            add_tiles(columns.sum, rows, part, first, blocks.sets(i) * n, sums + part * C + first);
            add_tiles(columns.square, rows, part, first, blocks.sets(i) * n, squares + part * C + first);
            for (int64_t c = first; c < first + blocks.sets(i) * n; ++c)
                counts[part * C + c] = (double)rows.rows_per_part;
            for (int64_t j = 0; j < blocks.sets(i); ++j) {
                const int64_t at = part * C + first + j * n;
                Total t(sums + at, squares + at, counts + at, shift + at, n);
                Set s;
                draw_band(s, shift[at], t.sum, t.square, t.count, o);
                for (int64_t c = at; c < at + n; ++c) lower[c] = s.lower, upper[c] = s.upper;
            }
        }
        int64_t measured = 0;
        for (int64_t t = share.end; t-- > share.begin;) {
            const int64_t part = rows.part(t) * C;
            measured += measure_kept_columns<T, WHOLE>(x + rows.first(t) * C, rows.count(t), C, shift + part,
                                                       lower + part, upper + part, columns, t);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.parts * blocks.per_part; ++i) {
            const int64_t part = blocks.part(i), n = blocks.channels, first = blocks.first_set(i) * n;
            add_tiles(columns.sum, rows, part, first, blocks.sets(i) * n, sums + part * C + first);
            add_tiles(columns.square, rows, part, first, blocks.sets(i) * n, squares + part * C + first);
            add_tiles(columns.count, rows, part, first, blocks.sets(i) * n, counts + part * C + first);
            for (int64_t j = 0; j < blocks.sets(i); ++j) {
                const int64_t at = part * C + first + j * n;
                Total t(sums + at, squares + at, counts + at, shift + at, n);
                Set s;
                s.lower = lower[at], s.upper = upper[at];
                settle(s, shift[at], t.sum, t.square, t.count, o);
                report(s, part * blocks.sets_per_part + blocks.first_set(i) + j, out);
                const double rstd = 1 / sqrt(s.var + o.eps);
                for (int64_t c = at; c < at + n; ++c) {
                    const double a = weight ? weight[c - part * C] * rstd : rstd;
                    mean[c] = (float)s.mean, scale[c] = (float)a;
                    offset[c] = (float)((bias ? bias[c - part * C] : 0.0) - (s.mean - (float)s.mean) * a);
                }
            }
        }
        const bool mostly = 2 * measured > (share.end - share.begin) * vectors(C);
        for (int64_t i = 0; i < share.end - share.begin; ++i) {
            const int64_t t = mostly ? share.begin + i : share.end - 1 - i;
            const int64_t part = rows.part(t) * C, start = rows.first(t) * C;
            normalize_rows<T, WHOLE>(x + start, y + start, rows.count(t), C, mean + part, scale + part, offset + part);
        }
    }
    free(shift);
    free(sums);
}

template <class T, bool WHOLE, bool PAPER, int ROWS>
static inline void gradient_rows(const typename T::scalar* g, const typename T::scalar* x, int64_t c, int64_t first,
                                 int64_t n, const float* mean, const float* lower, const float* upper, vfloat* sum,
                                 vfloat* dot) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = start_of(first + i, c);
        vfloat m = load_vector<Float32, WHOLE>(mean + at, c), s{}, p{}, lo, hi;
        if (PAPER) lo = load_vector<Float32, WHOLE>(lower + at, c), hi = load_vector<Float32, WHOLE>(upper + at, c);
#pragma GCC unroll 4
        for (int j = 0; j < ROWS; ++j) {
            vfloat a = load_vector<T, WHOLE>(x + j * c + at, c), ga = load_vector<T, WHOLE>(g + j * c + at, c);
            if (PAPER) ga = only((a >= lo) & (a <= hi), ga);
            s += ga, p += ga * (a - m);
        }
        sum[i] += s, dot[i] += p;
    }
}

template <class T, bool WHOLE, bool PAPER>
static void gradient_columns(const typename T::scalar* g, const typename T::scalar* x, int64_t rows, int64_t c,
                             const float* mean, const float* lower, const float* upper, const Columns& out,
                             int64_t tile) {
    vfloat sum[CHUNK], dot[CHUNK];
    for (int64_t first = 0; first < vectors(c); first += CHUNK) {
        const int64_t n = vectors(c) - first < CHUNK ? vectors(c) - first : CHUNK;
        for (int64_t i = 0; i < n; ++i) sum[i] = dot[i] = vfloat{};
#define STEP(ROWS) gradient_rows<T, WHOLE, PAPER, ROWS>(g + row, x + row, c, first, n, mean, lower, upper, sum, dot);
        FOR_ROWS(rows, c, STEP)
#undef STEP
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = tile * c + start_of(first + i, c);
            store_vector<Float32, WHOLE>(out.sum + at, c, sum[i]);
            store_vector<Float32, WHOLE>(out.square + at, c, dot[i]);
        }
    }
}

template <class T, bool WHOLE, bool PAPER>
static void write_gradient_rows(const typename T::scalar* g, const typename T::scalar* x, typename T::scalar* dx,
                                int64_t rows, int64_t c, const float* scale, const float* offset, const float* slope,
                                const float* mean, const float* lower, const float* upper) {
    for (int64_t r = 0; r < rows; ++r, g += c, x += c, dx += c)
        for_vectors(c, [=](int64_t at) {
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
    double* sums = (double*)malloc(2 * sizeof(double) * all);
    double* dots = sums + all;
    float* scale = (float*)malloc(6 * sizeof(float) * all);
    float *offset = scale + all, *slope = offset + all, *mean = slope + all, *lower = mean + all, *upper = lower + all;
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
        for (int64_t t = share.end; t-- > share.begin;) {
            const int64_t part = rows.part(t) * C, start = rows.first(t) * C;
            write_gradient_rows<T, WHOLE, PAPER>(g + start, x + start, dx + start, rows.count(t), C, scale + part,
                                                 offset + part, slope + part, mean + part, lower + part, upper + part);
        }
    }
    free(scale);
    free(sums);
}

#undef FOR_ROWS

// ---- rows: a single position a sample, as in layer normalization over channels; a set is a run of channels

constexpr int64_t BLOCK = 256;  // rows whose gradients of weight and bias are summed in float

template <class T, bool WHOLE>
static void forward_rows(const Shape& d, const Options& o, const void* x_, void* y_, const float* weight,
                         const float* bias, const Moments& out) {
    typedef typename T::scalar scalar;
    const int64_t length = d.c / d.groups;
    const Tiling tiling(1, length, length);
#pragma omp parallel num_threads(o.threads)
    {
        Tile* tiles = (Tile*)malloc(sizeof(Tile) * tiling.tiles());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d.n * d.groups; ++i) {
            const scalar* x = (const scalar*)x_ + i * length;
            scalar* y = (scalar*)y_ + i * length;
            const Set s = filtered_set<T>(x, tiling, o, tiles);
            report(s, i, out);
            const vfloat mean = splat((float)s.mean), rest = splat((float)(s.mean - (float)s.mean)),
                         rstd = splat((float)(1 / sqrt(s.var + o.eps)));
            const int64_t c = i % d.groups * length;
            for_vectors(length, [=](int64_t at) {
                vfloat v = ((load_vector<T, WHOLE>(x + at, length) - mean) - rest) * rstd;
                if (weight) v *= load_vector<Float32, WHOLE>(weight + c + at, length);
                if (bias) v += load_vector<Float32, WHOLE>(bias + c + at, length);
                store_vector<T, WHOLE>(y + at, length, v);
            });
        }
        free(tiles);
    }
}

// One row's gradient of the input; the gradients of its channels' bias and weight are added to `d_bias` and `d_weight`.
template <class T, bool WHOLE, bool PAPER>
static void backward_row(const typename T::scalar* g, const typename T::scalar* x, typename T::scalar* dx, int64_t n,
                         int64_t set, const Options& o, const float* weight, const Moments& m, float* d_bias,
                         float* d_weight) {
    const vfloat mean = splat(m.mean[set]), lo = splat(m.lower[set]), hi = splat(m.upper[set]),
                 rstd = splat((float)(1 / sqrt((double)m.var[set] + o.eps)));
    vfloat sum{}, dot{};
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t at = start_of(i / LANES, n);
        vfloat a = load_vector<T, WHOLE>(x + at, n), ga = load_vector<T, WHOLE>(g + at, n);
        ga = lane_numbers() >= (int32_t)(i - at) ? ga : vfloat{};  // what the vector before has counted
        if (PAPER) ga = only((a >= lo) & (a <= hi), ga);
        const vfloat gx = ga * (a - mean);
        store_vector<Float32, WHOLE>(d_bias + at, n, load_vector<Float32, WHOLE>(d_bias + at, n) + ga);
        store_vector<Float32, WHOLE>(d_weight + at, n, load_vector<Float32, WHOLE>(d_weight + at, n) + gx * rstd);
        const vfloat w = weight ? load_vector<Float32, WHOLE>(weight + at, n) : splat(1.f);
        sum += ga * w, dot += gx * w;
    }
    const Line l = line_of(m, set, total(sum), total(dot), o);
    const vfloat offset = splat(l.offset), slope = splat(l.slope);
    for_vectors(n, [=](int64_t at) {
        const vfloat scale = weight ? rstd * load_vector<Float32, WHOLE>(weight + at, n) : rstd;
        vfloat v = input_gradient<PAPER>(load_vector<T, WHOLE>(g + at, n), load_vector<T, WHOLE>(x + at, n), scale,
                                         offset, slope, mean, lo, hi);
        store_vector<T, WHOLE>(dx + at, n, v);
    });
}

template <class T, bool WHOLE, bool PAPER>
static void backward_rows(const Shape& d, const Options& o, const void* g_, const void* x_, void* dx_,
                          const float* weight, const Moments& m, float* d_weight, float* d_bias) {
    typedef typename T::scalar scalar;
    const scalar *g = (const scalar*)g_, *x = (const scalar*)x_;
    scalar* dx = (scalar*)dx_;
    const int64_t length = d.c / d.groups, blocks = (d.n + BLOCK - 1) / BLOCK;
    float* parts = (float*)calloc(blocks * 2 * d.c, sizeof(float));
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            float *of_bias = parts + b * 2 * d.c, *of_weight = of_bias + d.c;
            for (int64_t n = b * BLOCK; n < d.n && n < (b + 1) * BLOCK; ++n)
                for (int64_t c = 0; c < d.c; c += length) {
                    const int64_t at = n * d.c + c;
                    backward_row<T, WHOLE, PAPER>(g + at, x + at, dx + at, length, at / length, o,
                                                  weight ? weight + c : nullptr, m, of_bias + c, of_weight + c);
                }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < d.c; ++c) {
            double of_bias = 0, of_weight = 0;
            for (int64_t b = 0; b < blocks; ++b) {
                of_bias += parts[b * 2 * d.c + c];
                of_weight += parts[b * 2 * d.c + d.c + c];
            }
            d_bias[c] = (float)of_bias, d_weight[c] = (float)of_weight;
        }
    }
    free(parts);
}

static bool are_rows(const Shape& d) { return d.groups && d.s == 1; }

template <class T, bool WHOLE>
static void forward_of(const Shape& d, const Options& o, const void* x, void* y, const float* weight, const float* bias,
                       const Moments& m) {
    auto run = are_rows(d)       ? forward_rows<T, WHOLE>
               : o.channels_last ? forward_channels_last<T, WHOLE>
                                 : forward_contiguous<T, WHOLE>;
    run(d, o, x, y, weight, bias, m);
}

template <class T, bool WHOLE>
static void backward_of(const Shape& d, const Options& o, const void* g, const void* x, void* dx, const float* weight,
                        const Moments& m, float* d_weight, float* d_bias) {
    auto rows = o.paper ? backward_rows<T, WHOLE, true> : backward_rows<T, WHOLE, false>;
    auto last = o.paper ? backward_channels_last<T, WHOLE, true> : backward_channels_last<T, WHOLE, false>;
    auto first = o.paper ? backward_contiguous<T, WHOLE, true> : backward_contiguous<T, WHOLE, false>;
    auto run = are_rows(d) ? rows : o.channels_last ? last : first;
    run(d, o, g, x, dx, weight, m, d_weight, d_bias);
}

static bool whole_vectors(const Shape& d, const Options& o) {
    return (are_rows(d) ? d.c / d.groups : o.channels_last ? d.c : d.s) >= LANES;
}

static void forward(const Shape& d, const Options& o, const void* x, void* y, const float* weight, const float* bias,
                    const Moments& m) {
    auto run = whole_vectors(d, o) ? (o.bfloat16 ? forward_of<BFloat16, true> : forward_of<Float32, true>)
                                   : (o.bfloat16 ? forward_of<BFloat16, false> : forward_of<Float32, false>);
    run(d, o, x, y, weight, bias, m);
}

static void backward(const Shape& d, const Options& o, const void* g, const void* x, void* dx, const float* weight,
                     const Moments& m, float* d_weight, float* d_bias) {
    auto run = whole_vectors(d, o) ? (o.bfloat16 ? backward_of<BFloat16, true> : backward_of<Float32, true>)
                                   : (o.bfloat16 ? backward_of<BFloat16, false> : backward_of<Float32, false>);
    run(d, o, g, x, dx, weight, m, d_weight, d_bias);
}
