// Vectors of VECTOR_BYTES: loads, stores and what is left over at the end of a run, for float32 and bfloat16.

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

// As many doubles as a vector of floats has lanes; written as loops, which compilers turn into better code than
// conversions of vectors.
struct WideVector {
    alignas(VECTOR_BYTES) double lanes[LANES] = {};
    void add(vfloat v) {
        float one[LANES];
        memcpy(one, &v, sizeof v);
        for (int i = 0; i < LANES; ++i) lanes[i] += one[i];
    }
    double total() const {
        double even = 0, odd = 0;
        for (int i = 0; i < LANES; i += 2) even += lanes[i], odd += lanes[i + 1];
        return even + odd;
    }
    template <bool WHOLE>
    void store(double* p, int64_t n) const {
        memcpy(p, lanes, WHOLE ? sizeof lanes : n * sizeof(double));
    }
};

// A sum in lanes: `a` and `b` are added to in float, a few values each, and then put into double, where rounding does
// not show.
struct Lanes {
    vfloat a{}, b{};
    WideVector sum;
    void flush() { sum.add(a + b), a = b = vfloat{}; }
    double total() { return flush(), sum.total(); }
};

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

// Ask for what will be read soon. Of the vectors that share a cache line only the first one asks.
template <class T>
static inline void prefetch(const typename T::scalar* p, int64_t vector) {
    constexpr int64_t of_a_line = 64 / (LANES * sizeof(typename T::scalar));
    if (of_a_line <= 1 || vector % of_a_line == 0) __builtin_prefetch(p);
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
