// ---- contiguous layout: a set is a number of runs of consecutive values

struct Tile {
    double sum, square, count;
    float low, high;
};

// Runs that share a statistic: `runs` of them, `length` values each, `stride` values apart.
struct Runs {
    int64_t runs, stride, length;
};

// Calls `pair(i)` for two vectors from `i` on, `single(i)` for one that may be incomplete, and `flush()` each time that
// `MOST` values have been added in a lane.
template <int64_t MOST, class Pair, class Single, class Flush>
static inline void for_chains(int64_t length, int64_t& added, Pair pair, Single single, Flush flush) {
    int64_t i = 0;
    while (i + 2 * LANES <= length) {
        const int64_t left = (length - i) / (2 * LANES), n = left < MOST - added ? left : MOST - added;
        for (int64_t end = i + n * 2 * LANES; i < end; i += 2 * LANES) pair(i);
        if ((added += n) == MOST) flush(), added = 0;
    }
    for (; i < length; i += LANES) {
        single(i);
        if (++added == MOST) flush(), added = 0;
    }
}

template <class T>
static Tile measure(const typename T::scalar* x, Runs r, float shift) {
    vfloat k = splat(shift), low = k, high = k;
    Lanes sum, square;
    int64_t added = 0;
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride)
        for_chains<2 * CHAIN>(
            r.length, added,
            [&](int64_t i) {
                vfloat a = T::load(x + i), b = T::load(x + i + LANES), da = a - k, db = b - k;
                sum.a += da, sum.b += db;
                square.a += da * da, square.b += db * db;
                low = smaller(low, smaller(a, b)), high = larger(high, larger(a, b));
            },
            [&](int64_t i) {
                vfloat a = i + LANES <= r.length ? T::load(x + i) : load_rest<T>(x, i, r.length, shift), da = a - k;
                sum.a += da, square.a += da * da;
                low = smaller(low, a), high = larger(high, a);
            },
            [&] { sum.flush(), square.flush(); });
    return {sum.total(), square.total(), double(r.runs * r.length), smallest(low), -smallest(-high)};
}

template <class T>
static Tile measure_kept(const typename T::scalar* x, Runs r, float shift, float lower, float upper) {
    vfloat k = splat(shift), lo = splat(lower), hi = splat(upper), one = splat(1.f);
    Lanes sum, square, count;
    int64_t added = 0;
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride)
        for_chains<2 * CHAIN>(
            r.length, added,
            [&](int64_t i) {
                vfloat a = T::load(x + i), b = T::load(x + i + LANES);
                vint kept_a = (a >= lo) & (a <= hi), kept_b = (b >= lo) & (b <= hi);
                vfloat da = only(kept_a, a - k), db = only(kept_b, b - k);
                sum.a += da, sum.b += db, square.a += da * da, square.b += db * db;
                count.a += only(kept_a, one), count.b += only(kept_b, one);
            },
            [&](int64_t i) {
                vfloat a = i + LANES <= r.length ? T::load(x + i) : load_rest<T>(x, i, r.length, NAN);
                vint kept = (a >= lo) & (a <= hi);
                vfloat d = only(kept, a - k);
                sum.a += d, square.a += d * d, count.a += only(kept, one);
            },
            [&] { sum.flush(), square.flush(); });
    return {sum.total(), square.total(), count.total(), 0, 0};
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

static inline Total add_tiles(const Tile* tiles, int64_t n, float shift) {
    double sum = 0, square = 0, count = 0;
    for (int64_t t = 0; t < n; ++t) sum += tiles[t].sum, square += tiles[t].square, count += tiles[t].count;
    return Total(shift, sum, square, count);
}

template <class T>
static Set filtered_set(const typename T::scalar* x, const Tiling& tiling, const Options& o, Tile* tiles) {
    const int64_t n = tiling.tiles();
    Runs r;
    float shift = typical<float>(tiling.planes * tiling.length, [&](int64_t i) {
        return T::load_one(tiling.planes == 1 ? x + i : x + i / tiling.length * tiling.stride + i % tiling.length);
    });
    auto measure_all = [&] {
        for (int64_t t = 0; t < n; ++t) {
            const int64_t start = tiling.at(t, r);
            tiles[t] = measure<T>(x + start, r, shift);
        }
        return add_tiles(tiles, n, shift);
    };
    Total all = measure_all();
    for (int pass = 1; pass < PASSES && all.is_poor(); ++pass) shift = (float)all.mean, all = measure_all();
    Set s;
    set_band(s, all, o);
    auto measure_kept_where = [&](auto needed) {
        for (int64_t t = 0; t < n; ++t) {
            if (!needed(tiles[t])) continue;
            const int64_t start = tiling.at(t, r);
            tiles[t] = measure_kept<T>(x + start, r, shift, s.lower, s.upper);
        }
        return add_tiles(tiles, n, shift);
    };
    Total kept = measure_kept_where([&](const Tile& t) { return !(t.low >= s.lower && t.high <= s.upper); });
    for (int pass = 1; pass < PASSES && kept.is_poor(); ++pass) {
        shift = (float)kept.mean;
        kept = measure_kept_where([](const Tile&) { return true; });
    }
    set_moments(s, kept, o);
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
    vfloat m = splat(mean), lo = splat(lower), hi = splat(upper);
    Lanes sum, dot;
    int64_t added = 0;
    for (int64_t j = 0; j < r.runs; ++j, x += r.stride, g += r.stride)
        for_chains<GRADIENT_CHAIN>(
            r.length, added,
            [&](int64_t i) {
                vfloat a = T::load(x + i), b = T::load(x + i + LANES), ga = T::load(g + i), gb = T::load(g + i + LANES);
                if (PAPER) ga = only((a >= lo) & (a <= hi), ga), gb = only((b >= lo) & (b <= hi), gb);
                sum.a += ga, sum.b += gb;
                dot.a += ga * (a - m), dot.b += gb * (b - m);
            },
            [&](int64_t i) {
                const bool whole = i + LANES <= r.length;
                vfloat a = whole ? T::load(x + i) : load_rest<T>(x, i, r.length, mean);
                vfloat ga = whole ? T::load(g + i) : load_rest<T>(g, i, r.length, 0.f);
                if (PAPER) ga = only((a >= lo) & (a <= hi), ga);
                sum.a += ga, dot.a += ga * (a - m);
            },
            [&] { sum.flush(), dot.flush(); });
    return {sum.total(), dot.total()};
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
