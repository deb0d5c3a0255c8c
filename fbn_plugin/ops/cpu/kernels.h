// Filtered normalization for one instruction set; kernels.cpp includes this file once for each, inside a namespace of its
// own.
//
//   vectors.h        vectors of VECTOR_BYTES, their loads and stores, a typical value of a set
//   moments.h        from sums to moments and band edges
//   contiguous.h     sets that are runs of consecutive values
//   channels_last.h  sets that are columns of rows
//   rows.h           sets that are a row, or a part of it
//
// A statistic is summed in lanes around a value of its own set ("shift"), so that a large mean costs no digits: a few
// values in float, the rest in double. Where the sums show that the shift lay far from the mean, which costs the digits
// after all, they are taken again around that mean. The first pass also keeps the smallest and largest value of each few
// thousand values (a "tile"): a tile that lies within the band has its sums already, and only the others are read a
// second time, through the mask.
//
// The arguments of forward and backward, below and in each file, are those of fbn_forward and fbn_backward in kernels.cpp,
// where their shapes are: x, y, g, dx a tensor; weight, bias, d_weight, d_bias (c); moments (5, sets). WHOLE says that a
// run of values is a vector long at least, PAPER which gradient it is.
//
// Squares of float32 overflow where values lie more than 1.8e19 apart (the moments are NaN then), and vanish where they
// differ by less than 1e-23: without eps, such a set has no deviation.

#include "vectors.h"
#include "moments.h"
#include "contiguous.h"
#include "channels_last.h"
#include "rows.h"

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
