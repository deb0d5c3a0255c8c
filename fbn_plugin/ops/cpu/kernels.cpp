// CPU kernels of filtered batch and group normalization (Horváth and Al-afandi 2020, Eq. 2-13): plain C++ on raw
// pointers, no torch headers.
//
// Compiled for several instruction sets, chosen when the library is first called. OpenMP's runtime is the one that
// PyTorch has loaded: the library is built with -fopenmp but not linked to a runtime of its own, which would bring a
// second pool of threads.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

struct Shape {
    int64_t n, c, s;  // samples, channels, positions
    int64_t groups;   // 0: batch form
};

struct Options {
    double t_sigma, eps;
    double kappa;           // variance of a unit normal that is cut off at t_sigma, for the Gaussian correction; else 1
    int32_t channels_last;  // a tensor is (n, s, c) in memory; 0: (n, c, s)
    int32_t bfloat16;       // a tensor's values are bfloat16; 0: float32
    int32_t paper;          // the gradient as it is printed, Eq. 11; 0: the exact one
    int32_t threads;
};

struct Moments {  // one entry for each set
    float *mean, *var, *lower, *upper, *count;
    Moments(const Shape& d, float* all) {
        const int64_t sets = d.groups ? d.n * d.groups : d.c;
        mean = all, var = mean + sets, lower = var + sets, upper = lower + sets, count = upper + sets;
    }
};

constexpr int64_t TILE = 4096;  // values of a tile

// How many values are added in one lane in float before their sum is added to others in double. Each of them is rounded to
// the digits of the sum so far, and products of gradients with far outliers differ most.
constexpr int64_t CHAIN = 8, GRADIENT_CHAIN = 8;

// The squared distance of shift and mean, in variances, above which sums are taken again: it is what is lost of their
// digits, and the roundings of few values do not average out.
static double far_from_mean(double count) { return count > 64 ? 2 : 0.25; }

constexpr int PASSES = 4;  // at most; each leaves of that distance what its own rounding was

// Arrays of `n` each, one after the other, that start where a cache line does. Vectors that straddle two lines made the
// passes that write 1.5 times as slow on AMD Zen 5, wherever the tensor came from the third cache or from memory.
template <class Number>
struct Arrays {
    Number* first;
    int64_t stride;
    Arrays(int64_t arrays, int64_t n) : stride((n * sizeof(Number) + 63) / 64 * 64 / sizeof(Number)) {
        first = (Number*)aligned_alloc(64, arrays * stride * sizeof(Number));
    }
    ~Arrays() { free(first); }
    Arrays(const Arrays&) = delete;
    Number* operator[](int64_t i) const { return first + i * stride; }
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_INSTRUCTION_SETS
#endif

namespace generic {
#define VECTOR_BYTES 16
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace generic

#ifdef MANY_INSTRUCTION_SETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options

// FBN_CPU_CAPABILITY=generic or avx2 asks for less than the machine has, to test what others run.
static int instruction_set() {
    static const int level = [] {
        const char* asked = getenv("FBN_CPU_CAPABILITY");
        const int most = !asked ? 2 : !strcmp(asked, "generic") ? 0 : !strcmp(asked, "avx2") ? 1 : 2;
        __builtin_cpu_init();
        if (most > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return 2;
        return most > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
    }();
    return level;
}
#define DISPATCH(call)           \
    switch (instruction_set()) { \
        case 2:                  \
            avx512::call;        \
            break;               \
        case 1:                  \
            avx2::call;          \
            break;               \
        default:                 \
            generic::call;       \
    }
#else
static int instruction_set() { return 0; }
#define DISPATCH(call) generic::call
#endif

extern "C" {

const char* fbn_instruction_set() {
    static const char* names[] = {"generic", "AVX2", "AVX-512"};
    return names[instruction_set()];
}

// Output, moments and running statistics (Eq. 2-8). All arrays are dense; those that may be null are said to.
//
//   x             (n, c, s) or (n, s, c), read
//   y             like x, written
//   weight, bias  (c), or null: 1 and 0
//   moments       (5, sets), written: mean, variance, lower and upper edge of the band, number of values in it; the sets
//                 are the c channels, or in the group form n * groups, those of a sample one after the other
//   running_mean, running_var  (c), or null; a channel whose moments are not finite keeps its own; batch form only
//   momentum      NaN: the running statistics are the average of all batches that num_batches counts
//   num_batches   one number, counted up; or null
void fbn_forward(const Shape* d, const Options* o, const void* x, void* y, const float* weight, const float* bias,
                 float* moments, float* running_mean, float* running_var, double momentum, int64_t* num_batches) {
    const Moments m(*d, moments);
    DISPATCH(forward(*d, *o, x, y, weight, bias, m));
    if (num_batches) ++*num_batches;
    if (!running_mean || !running_var) return;
    if (momentum != momentum) momentum = 1.0 / (double)(num_batches ? *num_batches : 1);
    for (int64_t c = 0; c < d->c; ++c) {
        const double others = (double)m.count[c] - 1, unbiased = m.var[c] * (m.count[c] / (others > 1 ? others : 1));
        if (!std::isfinite(m.mean[c]) || !std::isfinite(unbiased)) continue;
        running_mean[c] = (float)((1 - momentum) * running_mean[c] + momentum * m.mean[c]);
        running_var[c] = (float)((1 - momentum) * running_var[c] + momentum * unbiased);
    }
}

// Gradients of the input and, summed over all samples and positions, of weight and bias.
//
//   g          like x, read: the gradient of y
//   x          (n, c, s) or (n, s, c), read
//   dx         like x, written
//   weight     (c), or null: 1
//   moments    (5, sets), as fbn_forward wrote them
//   d_weight, d_bias  (c), written, with or without a weight
void fbn_backward(const Shape* d, const Options* o, const void* g, const void* x, void* dx, const float* weight,
                  float* moments, float* d_weight, float* d_bias) {
    DISPATCH(backward(*d, *o, g, x, dx, weight, Moments(*d, moments), d_weight, d_bias));
}
}
