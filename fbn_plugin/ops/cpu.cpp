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

struct Shape {
    int64_t n, c, s;  // samples, channels, positions
    int64_t groups;   // 0: batch form
};

struct Options {
    double t_sigma, eps, kappa;
    int32_t channels_last, bfloat16, paper, threads;
};

struct Moments {  // one entry for each set
    float *mean, *var, *lower, *upper, *count;
};

constexpr int64_t TILE = 4096;  // values summed in float before they are added up in double

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_INSTRUCTION_SETS
#endif

namespace generic {
#include "cpu_kernels.h"
}

#ifdef MANY_INSTRUCTION_SETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu_kernels.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#include "cpu_kernels.h"
}
#pragma GCC pop_options

static int instruction_set() {
    static const int level = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return 2;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
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

void fbn_forward(const Shape* d, const Options* o, const void* x, void* y, const float* weight, const float* bias,
                 const Moments* m) {
    DISPATCH(forward(*d, *o, x, y, weight, bias, *m));
}

// `scratch` holds 2 * n * c doubles.
void fbn_backward(const Shape* d, const Options* o, const void* g, const void* x, void* dx, const float* weight,
                  const Moments* m, float* d_weight, float* d_bias, double* scratch) {
    DISPATCH(backward(*d, *o, g, x, dx, weight, *m, d_weight, d_bias, scratch));
}
}
