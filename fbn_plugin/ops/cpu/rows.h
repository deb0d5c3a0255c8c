// ---- rows: a single position a sample, as in layer normalization over channels; a set is a run of channels

constexpr int64_t BLOCK = 16;  // rows whose gradients of weight and bias are summed in float

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
    Lanes sum, dot;
    int64_t added = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t at = start_of(i / LANES, n);
        vfloat a = load_vector<T, WHOLE>(x + at, n), ga = load_vector<T, WHOLE>(g + at, n);
        ga = lane_numbers() >= (int32_t)(i - at) ? ga : vfloat{};  // what the vector before has counted
        if (PAPER) ga = only((a >= lo) & (a <= hi), ga);
        const vfloat gx = ga * (a - mean);
        store_vector<Float32, WHOLE>(d_bias + at, n, load_vector<Float32, WHOLE>(d_bias + at, n) + ga);
        store_vector<Float32, WHOLE>(d_weight + at, n, load_vector<Float32, WHOLE>(d_weight + at, n) + gx * rstd);
        const vfloat w = weight ? load_vector<Float32, WHOLE>(weight + at, n) : splat(1.f);
        sum.a += ga * w, dot.a += gx * w;
        if (++added == GRADIENT_CHAIN) sum.flush(), dot.flush(), added = 0;
    }
    const Line l = line_of(m, set, sum.total(), dot.total(), o);
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
    const Arrays<float> parts(2 * blocks, d.c);
#pragma omp parallel num_threads(o.threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            float *of_bias = parts[2 * b], *of_weight = parts[2 * b + 1];
            memset(of_bias, 0, d.c * sizeof(float)), memset(of_weight, 0, d.c * sizeof(float));
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
            for (int64_t b = 0; b < blocks; ++b) of_bias += parts[2 * b][c], of_weight += parts[2 * b + 1][c];
            d_bias[c] = (float)of_bias, d_weight[c] = (float)of_weight;
        }
    }
}
