// Filtered normalization for NVIDIA GPUs (Horváth and Al-afandi 2020, Eq. 2-13): one launch forward, one backward, the data
// kept on the chip between the passes over them.
//
// A "set" is what shares a mean: a channel in the batch form, a sample's group of channels in the group form. Several
// blocks of threads, the "members" of a "group", or one alone, load a set (channels-last: CHANNELS neighbouring ones) into
// shared memory, exchange partial sums through global memory, and go on with what they have kept. Copies are under way
// while earlier ones are added up (Ring). What does not fit is read again, the latest first, into the places of what has
// been used. At best x is read once and written once forward; x and dL/dy are read once and dL/dx is written once
// backward.
//
// All values are summed once. With values outside of the band (Eq. 5) the sums of these are subtracted, which only threads
// that have met such a value look for; where the difference would lose digits, the kept values are summed anew.
//
// Compiled at run time (compiler.py) for one combination of
//   DTYPE        of x: 0 float, 1 bfloat16, 2 half
//   LAYOUT       0 planes: values of a channel are consecutive; 1 rows: channels are; 2 lines: one position a sample;
//                3 bundles: planes of an odd size, several small channels in a block of threads
//   VECTOR       values that a thread loads at once: as many as are consecutive and aligned, 16 bytes at most
//   CHANNELS     rows: channels that a group handles, VECTOR times a power of two; bundles: of a bundle; otherwise 1
//   THREADS      of a block
//   ACTIVATION   0 none, 1 ReLU or leaky ReLU, 2 SiLU
//   RUN_CHANNELS planes, group form, forward: the runs of a set are its channels, each with its own weight
//   BACKWARD     1 for the kernels of the backward pass
//   WIDE         1 for tensors of 2^31 values or more, whose offsets take 64 bits
//   PHASES       of a pass, added up: 1 first sums, 2 sums of kept values, 4 the result; SyncFBN takes them one by one
// and tested on the CPU (tests/ops/cuda): keep to the functions that tests/ops/cuda/cuda_on_cpu.h has.
//
// Why nobody waits for ever. Members take their place in the order in which they start (a ticket), so that at most one
// group of a launch is incomplete at a time, and a block that is not there yet is the next to start. Waiting members hold
// at most (members - 1) of the card's places for each launch that is running; as long as the sum of that over all launches
// is below the number of places, some block can start, and the group that it completes goes on. plan.py keeps every group
// below a share of the card that the number of streams allows. Processes that take turns on a card hold no places while
// they wait for their turn.
//
// Results repeat bit for bit: partial sums are added in a fixed order, never by floating-point atomics.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
#define INLINE __device__ __forceinline__

#ifdef __CUDACC__  // NVRTC, nvcc
#if __CUDA_ARCH__ >= 800
INLINE u16 to_bfloat16(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#else  // no instruction for it
INLINE u16 to_bfloat16(float f) { u32 u = __float_as_uint(f); return f != f ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16; }
#endif
INLINE u16 to_half(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
INLINE float from_half(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
INLINE void add_release(int* p, int v) { asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
INLINE int add_acquire_release(int* p, int v) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
INLINE int load_relaxed(const int* p) { int v; asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
INLINE void acquire(const int*) { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }  // what was released before that was seen
// One store of all bytes: the compiler takes a vector of floats apart.
INLINE void put(void* p, uint4 v) { asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)); }
INLINE void put(void* p, uint2 v) { asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y)); }
INLINE void put(void* p, u32 v) { *(u32*)p = v; }
INLINE void put(void* p, u16 v) { *(u16*)p = v; }
#if __CUDA_ARCH__ >= 800 && VECTOR * (DTYPE ? 2 : 4) >= 4  // it copies no less than 4 bytes
#define ASYNC 1
// From global to shared memory, without a register and without waiting; wait_copies<N> waits for all but the last N groups.
template <int BYTES> INLINE void copy_later(void* to, const void* from) {
  const u32 at = (u32)__cvta_generic_to_shared(to);
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES));
}
INLINE void end_group() { asm volatile("cp.async.commit_group;"); }
template <int N> INLINE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif
#else  // the same on the CPU
inline u16 to_bfloat16(float f) { u32 u = __float_as_uint(f); return f != f ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16; }
inline u16 to_half(float f) { _Float16 h = f; u16 r; memcpy(&r, &h, 2); return f != f ? 0x7FFF : r; }
inline float from_half(u16 v) { _Float16 h; memcpy(&h, &v, 2); return h; }
inline void add_release(int* p, int v) { cuda_on_cpu::atomic<__ATOMIC_RELEASE>(p, [=](int old) { return old + v; }); }
inline int add_acquire_release(int* p, int v) { return cuda_on_cpu::atomic<__ATOMIC_ACQ_REL>(p, [=](int old) { return old + v; }); }
inline int load_relaxed(const int* p) { return cuda_on_cpu::poll<__ATOMIC_RELAXED>(p); }
inline void acquire(const int* p) { __atomic_load_n(p, __ATOMIC_ACQUIRE); }
template <class W> inline void put(void* p, W v) { *(W*)p = v; }
#if VECTOR * (DTYPE ? 2 : 4) >= 4
#define ASYNC 1
template <int BYTES> inline void copy_later(void* to, const void* from) { cuda_on_cpu::copy_later(to, from, BYTES); }
inline void end_group() { cuda_on_cpu::end_group(); }
template <int N> inline void wait_copies() { cuda_on_cpu::wait_copies(N); }
#endif
#endif
INLINE float from_bfloat16(u16 v) { return __uint_as_float((u32)v << 16); }

#if DTYPE == 0
typedef float T;
INLINE float up(T v) { return v; }
INLINE T down(float f) { return f; }
#elif DTYPE == 1
typedef u16 T;
INLINE float up(T v) { return from_bfloat16(v); }
INLINE T down(float f) { return to_bfloat16(f); }
#else
typedef u16 T;
INLINE float up(T v) { return from_half(v); }
INLINE T down(float f) { return to_half(f); }
#endif

template <int BYTES> struct Raw;
template <> struct Raw<16> { typedef uint4 type; };
template <> struct Raw<8> { typedef uint2 type; };
template <> struct Raw<4> { typedef u32 type; };
template <> struct Raw<2> { typedef u16 type; };
typedef Raw<VECTOR * sizeof(T)>::type Word;
template <int FLOATS> struct Few { typedef float type; };
template <> struct Few<4> { typedef float4 type; };
union Vector {
  Word word;
  T value[VECTOR];
};

constexpr int WARPS = THREADS / 32;
#if LAYOUT == 1
constexpr int WIDTH = CHANNELS;            // statistics of a group
constexpr int OWN = VECTOR;                // of which a thread's values belong to so many
constexpr int ROW_VECTORS = CHANNELS / VECTOR;  // of a block of channels in a row
constexpr int ROWS = THREADS / ROW_VECTORS;     // that a block of threads loads at once
static_assert(ROW_VECTORS <= 32 && (ROW_VECTORS & (ROW_VECTORS - 1)) == 0, "a warp holds whole rows");
#else
constexpr int WIDTH = 1, OWN = 1, ROWS = 1, ROW_VECTORS = 1;
#endif
// Members whose partial sums are added up side by side.
constexpr int STRIPES = LAYOUT == 1 && THREADS > WIDTH ? THREADS / WIDTH : 1;
static_assert(THREADS % 32 == 0 && THREADS >= 32, "warps are whole");
// A shift that lies so many variances from the mean eats digits. The sums around it are not good enough to be the kept
// values' if those are summed anyway (STRICT), to be all values' moments (ROUGH), or even to draw the band (POOR).
constexpr double STRICT = 0.25, ROUGH = 4, POOR = 8;
constexpr double DIFFERENCE = 2;  // so many times the kept values' squares may all values' be, to take the difference
constexpr int REPEATS = 3;  // of the kept values' sums: each brings the shift 2^23 times as near to a mean without spread
constexpr int SLOTS = 8;    // partial sums of a member, four for each of two rounds in turn
// Vectors that a thread loads before it uses the first: as many as registers allow.
constexpr int LOADS = BACKWARD && ACTIVATION ? 1 : BACKWARD || LAYOUT == 1 ? 2 : 4;
constexpr int LATER_LOADS = LOADS < 2 || (BACKWARD && DTYPE == 1 && LAYOUT == 0) || (!BACKWARD && LAYOUT == 1) ? 1 : 2;
constexpr int SEARCH_LOADS = LAYOUT == 1 ? 1 : 2;  // where values are compared with the band, too
constexpr int AHEAD = (BACKWARD ? 4 : 8) / LOADS;  // so many times LOADS are on their way while others are added up
// Blocks that a multiprocessor is to hold: what plan.py reckons with, and what bounds a thread's registers.
constexpr int BLOCKS = LAYOUT == 1 ? 512 / THREADS : THREADS < 128 ? 8 : 1024 / THREADS;
constexpr int FLUSH = 16;   // vectors that it adds up before it adds the sum to the others: sums of sums are more exact
constexpr bool FIRST = PHASES & 1, FILTERED = PHASES & 2, APPLY = PHASES & 4;
#define INFINITE __uint_as_float(0x7F800000u)

// ---- arguments: one structure a kernel, filled in place on the host (plan.py has the same fields in the same order)

enum Float { FLOAT, BFLOAT16, HALF, DOUBLE };  // of weight and bias

// How a tensor is cut. planes: a set is `runs` runs of `length` vectors, `run_stride` values apart, from set * set_stride on.
// rows: `runs` rows of `channels` values a sample (the batch form has one sample).
struct Cut {
  i64 set_stride, run_stride;
  int runs, length;
  u32 multiplier, shift;  // division by `length`
  int positions;          // bundles: of a channel
  u32 by_positions, positions_shift;
  int vectors;            // planes: of a set
  int groups, members, steps, kept;  // steps: vectors that a thread handles, kept: of which in shared memory
  int channels, set_channels;        // C, and how many of them share a mean
  int sets;                          // statistics in all
  int blocks;                        // rows: groups of a sample
};

struct Forward {
  const T *x, *residual;
  T* y;
  const void *weight, *bias;         // (C,), or null
  float *running_mean, *running_var; // (C,), or null
  i64* num_batches;                  // a scalar, or null
  float* moments;                    // (5, sets): mean, variance, lower and upper band edge, number of kept values
  float* partial;                    // workspace (groups, members, SLOTS, WIDTH)
  int* counters;                     // workspace (2 + groups), zero before and after a launch
  double t_sigma, eps, kappa, momentum;  // momentum < 0: 1 / num_batches, which then is not counted here
  float slope;                           // of leaky ReLU; 0 for ReLU
  int weight_type, bias_type;
  Cut cut;
};

struct Backward {
  const T *grad, *x, *other;  // other: the residual, or, if `output`, what the forward pass gave out; or null
  T *dx, *dz;                 // dz: dL/d residual, or null
  const void *weight, *bias;
  const float* moments;        // (5, sets)
  const float* coefficients;   // (2, sets) of APPLY alone: what is subtracted, and subtracted times xhat
  float* sums;                 // (2, N * C) or (2, C): of dL/dz, and of dL/dz times xhat
  float* partial;              // workspace (groups, members, SLOTS, WIDTH)
  int* counters;
  double eps, kappa;
  float slope;
  int weight_type, bias_type, paper, output;
  Cut cut;
};

INLINE float parameter(const void* p, int type, int i, float otherwise) {
  if (!p) return otherwise;
  if (type == FLOAT) return ((const float*)p)[i];
  if (type == DOUBLE) return (float)((const double*)p)[i];
  u16 v = ((const u16*)p)[i];
  return type == HALF ? from_half(v) : from_bfloat16(v);
}

INLINE bool finite(double v) { return v - v == 0; }

// ---- groups of blocks

struct Place {
  int group, member;
};

template <bool MEETS> INLINE Place take_place(const Cut& c, int* counters) {
  Place p = {(int)blockIdx.x / c.members, (int)blockIdx.x % c.members};
  if (MEETS && c.members > 1) {  // by ticket, in the order in which blocks start
    __shared__ int ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(counters, 1);
    __syncthreads();
    p = {ticket / c.members, ticket % c.members};
  }
  return p;
}

// Waits until all members have come here `round` times. What they wrote before is visible after.
INLINE void meet(int* counter, int members, int round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(counter, 1);
    while (load_relaxed(counter) < members * round) {}  // acquiring at each look would empty the L1 cache each time
    acquire(counter);
  }
  __syncthreads();
}

// The last block of a launch leaves all counters at zero. Each says that it needs them no more when it has met for the
// last time, and looks only at its end whether it was the last to say so, as the answer takes long. (An atomic that
// acquires and releases: __threadfence is a fence of sequential consistency, the dearest that there is.)
template <bool MEETS> INLINE int say_goodbye(const Cut& c, int* counters) {
  return MEETS && c.members > 1 && threadIdx.x == 0 ? add_acquire_release(counters + 1, 1) : -1;
}
template <bool MEETS> INLINE void leave(const Cut& c, int* counters, int before) {
  if (MEETS && c.members > 1 && threadIdx.x < 32) {
    const bool last = __shfl_sync(~0u, before, 0) == c.groups * c.members - 1;
    if (last)
      for (int i = threadIdx.x; i < 2 + c.groups; i += 32) counters[i] = 0;
  }
}

// Calls f(i) for all i below N, each in a thread of its own as far as there are so many.
template <int N, class F> INLINE void spread(F f) {
  if (N <= THREADS) {
    if (threadIdx.x < N) f(threadIdx.x);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < N; i += THREADS) f(i);
  }
}

INLINE double joined(bool minimum, double a, double b) { return minimum ? fmin(a, b) : a + b; }

// a + b, and what the rounding of that loses, added to `lost` (Knuth's two-sum): the last few additions would otherwise
// cost as many digits as all before.
INLINE float add_exactly(float a, float b, float& lost) {
  const float sum = a + b, part = sum - a;
  lost += (a - (sum - part)) + (b - part);
  return sum;
}
INLINE float with_lost(float v, float lost) { return lost == lost ? v + lost : v; }  // nothing is lost of an infinity

// Over lanes that are a multiple of LANES apart: the sum, or the smallest value.
template <int LANES> INLINE float of_lanes(bool minimum, float v) {
  float lost = 0;
#pragma unroll
  for (int o = 16; o >= LANES; o >>= 1) {
    const float other = __shfl_xor_sync(~0u, v, o);
    if (minimum) {
      v = fminf(v, other);
    } else {
      const float other_lost = __shfl_xor_sync(~0u, lost, o);
      v = add_exactly(v, other, lost), lost += other_lost;
    }
  }
  return with_lost(v, lost);
}

constexpr int power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
constexpr int log_of(int power) { return power <= 1 ? 0 : 1 + log_of(power / 2); }

// Adds up N values (a power of two) over lanes that are LANES apart, or takes the smallest: in each step a lane gives half
// of its values away, as long as it has more than one. `first` is the number of the first that it ends up with; there are
// max(1, N * LANES / 32).
template <int LANES, int N, bool MINIMUM, int O = 16> INLINE void fold(float* v, float* lost, int& first) {
  if constexpr (O >= LANES) {
    constexpr int HALF = N > 1 ? N / 2 : 1;
    const bool upper = N > 1 && (threadIdx.x & O);
    if (upper) first += HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float mine = upper ? v[(i + HALF) % N] : v[i], given = N == 1 || upper ? v[i] : v[(i + HALF) % N];
      const float other = __shfl_xor_sync(~0u, given, O);
      if (MINIMUM) {
        v[i] = fminf(mine, other);
      } else {
        const float mine_lost = upper ? lost[(i + HALF) % N] : lost[i];
        const float given_lost = N == 1 || upper ? lost[i] : lost[(i + HALF) % N];
        const float other_lost = O == 16 ? 0.f : __shfl_xor_sync(~0u, given_lost, O);
        lost[i] = mine_lost + other_lost;
        v[i] = add_exactly(mine, other, lost[i]);
      }
    }
    fold<LANES, HALF, MINIMUM, O / 2>(v, lost, first);
  }
}

struct Scratch {  // shared memory of the sums
  union {
    float of_warp[4][WARPS][WIDTH];
    double of_stripe[STRIPES][4 * WIDTH];
  };
  double total[4][WIDTH];
};

// Of COUNT values, numbered q * OWN + channel from quantity FROM on, what the warp has of each: to scratch.of_warp.
template <int FROM, int COUNT, bool MINIMUM> INLINE void fold_warp(Scratch& scratch, const float* a) {
  constexpr int LANES = ROW_VECTORS;  // lanes that are LANES apart have the same channels
  constexpr int N = power_of_two(COUNT), ENDS = N * LANES > 32 ? N * LANES / 32 : 1;
  constexpr int ALIKE = N * LANES < 32 ? 32 / (N * LANES) : 1;  // so many lanes end up with the same
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float v[N], lost[N];
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = i < COUNT ? a[i] : 0.f, lost[i] = 0;
  int first = 0;
  fold<LANES, N, MINIMUM>(v, lost, first);
  if (lane / LANES % ALIKE == 0)
#pragma unroll
    for (int i = 0; i < ENDS; i++) {
      const int n = first + i, q = n / OWN, channel = lane % LANES * OWN + n % OWN;
      if (n < COUNT) scratch.of_warp[FROM + q][warp][channel] = MINIMUM ? v[i] : with_lost(v[i], lost[i]);
    }
}

// Adds up what the threads of a block have, scratch.total[q][channel]; from quantity SUMS on it takes the smallest.
template <int QUANTITIES, int SUMS>
INLINE void add_block(Scratch& scratch, float (&a)[QUANTITIES][OWN]) {
  fold_warp<0, SUMS * OWN, false>(scratch, a[0]);
  if constexpr (QUANTITIES > SUMS) fold_warp<SUMS, (QUANTITIES - SUMS) * OWN, true>(scratch, a[SUMS]);
  __syncthreads();
  spread<QUANTITIES * WIDTH>([&](int i) {
    const int q = i / WIDTH;
    double v = scratch.of_warp[q][0][i % WIDTH];
#pragma unroll 4
    for (int k = 1; k < WARPS; k++) v = joined(q >= SUMS, v, scratch.of_warp[q][k][i % WIDTH]);
    scratch.total[q][i % WIDTH] = v;
  });
}

// Adds up what the members of a group have: scratch.total[q][channel], for all threads to read.
template <int QUANTITIES, int SUMS>
INLINE void add_group(Scratch& scratch, const Cut& c, Place place, float* partial, int* counters, int round,
                      float (&a)[QUANTITIES][OWN]) {
  add_block<QUANTITIES, SUMS>(scratch, a);
  if (c.members == 1) {
    __syncthreads();
    return;
  }
  const int slot = (round & 1) * (SLOTS / 2) * WIDTH;
  float* group = partial + (i64)place.group * c.members * SLOTS * WIDTH + slot;
  spread<QUANTITIES * WIDTH>(
      [&](int i) { group[(i64)place.member * SLOTS * WIDTH + i] = (float)scratch.total[i / WIDTH][i % WIDTH]; });  // its own
  meet(counters + 2 + place.group, c.members, round);
#if LAYOUT == 1
  // Every thread asks for all that it adds up at once: one after the other would take a microsecond each.
  constexpr int COLUMNS = QUANTITIES * WIDTH, FOUR = WIDTH % 4 ? 1 : 4, QUADS = COLUMNS / FOUR;
  constexpr int ACROSS = THREADS / QUADS < 1 ? 1 : THREADS / QUADS < STRIPES ? THREADS / QUADS : STRIPES;
  spread<ACROSS * QUADS>([&](int i) {
    constexpr int AT_ONCE = WIDTH < 64 ? 4 : 3;
    const int first = i % QUADS * FOUR;
    double sum[FOUR];
#pragma unroll
    for (int n = 0; n < FOUR; n++) sum[n] = (first + n) / WIDTH >= SUMS ? (double)INFINITE : 0;
#pragma unroll 1
    for (int m = i / QUADS; m < c.members; m += AT_ONCE * ACROSS) {
      union {
        Few<FOUR>::type all;
        float value[FOUR];
      } v[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        if (m + u * ACROSS < c.members)
          v[u].all = __ldcg((const Few<FOUR>::type*)(group + (i64)(m + u * ACROSS) * SLOTS * WIDTH + first));
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        if (m + u * ACROSS < c.members)
#pragma unroll
          for (int n = 0; n < FOUR; n++) sum[n] = joined((first + n) / WIDTH >= SUMS, sum[n], v[u].value[n]);
    }
#pragma unroll
    for (int n = 0; n < FOUR; n++) scratch.of_stripe[i / QUADS][first + n] = sum[n];
  });
  __syncthreads();
  spread<COLUMNS>([&](int i) {
    double v = scratch.of_stripe[0][i];
#pragma unroll 4
    for (int s = 1; s < ACROSS; s++) v = joined(i / WIDTH >= SUMS, v, scratch.of_stripe[s][i]);
    scratch.total[i / WIDTH][i % WIDTH] = v;
  });
#else
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int q = threadIdx.x >> 5; q < QUANTITIES; q += WARPS) {
    const double none = q >= SUMS ? (double)INFINITE : 0;
    double v = none;
#pragma unroll 1
    for (int m = lane; m < c.members; m += 128) {
      float w[4];
#pragma unroll
      for (int u = 0; u < 4; u++)
        if (m + 32 * u < c.members) w[u] = __ldcg(group + (i64)(m + 32 * u) * SLOTS * WIDTH + q);
#pragma unroll
      for (int u = 0; u < 4; u++)
        if (m + 32 * u < c.members) v = joined(q >= SUMS, v, w[u]);
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      const double other = __shfl_xor_sync(~0u, v, o);
      v = joined(q >= SUMS, v, other);
    }
    if (lane == 0) scratch.total[q][0] = v;
  }
#endif
  __syncthreads();
}

// ---- where a thread's values are

#if WIDE
typedef i64 Offset;
#else
typedef int Offset;
#endif

struct Values {
  Offset base;  // of its set, rows: of the thread
  Offset step;  // planes: from the end of a run to the begin of the next, rows: between the thread's rows
  int channel;  // of the first of OWN
  int first, count;  // its first vector; how many it has
  u32 multiplier, shift;

  // planes: `channel` is that of the first run; rows: of the first of the thread's own
  INLINE Values(const Cut& c, Place p, int channel_of_plane) {
#if LAYOUT == 1
    const int sample = p.group / c.blocks;
    channel = (p.group - sample * c.blocks) * CHANNELS + threadIdx.x % ROW_VECTORS * VECTOR;
    first = p.member * c.steps * ROWS + threadIdx.x / ROW_VECTORS;
    const int left = (channel < c.channels ? c.runs : 0) - first;
    count = left <= 0 ? 0 : min(c.steps, (left + ROWS - 1) / ROWS);
    base = ((Offset)sample * c.runs + first) * c.channels + channel, step = (Offset)ROWS * c.channels;
#else
    channel = channel_of_plane;
    first = p.member * c.steps * THREADS + threadIdx.x;
    const int left = c.vectors - first;
    count = left <= 0 ? 0 : min(c.steps, (left + THREADS - 1) / THREADS);
    multiplier = c.multiplier, shift = c.shift;
    base = (Offset)(p.group * c.set_stride), step = (Offset)(c.run_stride - (i64)c.length * VECTOR);
#endif
  }

  // Where the k-th vector is, and in which run of the set.
  INLINE Offset at(int k, int& run) const {
#if LAYOUT == 1
    return run = 0, base + k * step;
#else
    return of_set(first + k * THREADS, run);
#endif
  }
  INLINE Offset at(int k) const {
    int run;
    return at(k, run);
  }
  // Planes: where the i-th vector of the set is.
  INLINE Offset of_set(int i, int& run) const {
    run = (__umulhi((u32)i, multiplier) + (u32)i) >> shift;  // i / length
    return base + run * step + (Offset)i * VECTOR;
  }
};

template <int N> struct Number { static constexpr int value = N; };

// Calls body(size, k) for the vectors from k on, `size` of them: SIZE as long as there are so many, then one by one.
template <int SIZE, class Body> INLINE void for_vectors(int begin, int end, Body body) {
  int k = begin;
#pragma unroll 1
  for (; k + SIZE <= end; k += SIZE) body(Number<SIZE>(), k);
  if (SIZE > 1)
#pragma unroll 1
    for (; k < end; k++) body(Number<1>(), k);
}

#if !ASYNC
INLINE void end_group() {}
template <int N> INLINE void wait_copies() {}
#endif
INLINE void copy(Word* to, const T* from) {
#if ASYNC
  copy_later<sizeof(Word)>(to, from);
#else
  *to = *(const Word*)from;
#endif
}

// A thread's place in what its block keeps in shared memory: the k-th of its `count` vectors in slot k % slots, so that in
// the end those from `first` on are there.
struct Ring {
  Word* words;
  int slots, count, first;

  INLINE Ring(Word* keep, int slots, int count)
      : words(keep + threadIdx.x), slots(slots), count(count), first(max(0, count - slots)) {}
  INLINE int wrap(int slot) const { return slot >= slots ? slot - slots : slot; }
  INLINE Word& operator[](int slot) const { return words[slot * THREADS]; }

  // Whether there is room to copy AHEAD times LOADS vectors while others are used, or for all.
  INLINE bool roomy(const Cut& c) const { return slots >= c.steps || slots >= (AHEAD + 1) * LOADS; }
  // Begins to copy the vectors from k on, LOADS of them or as many as there are.
  INLINE void fetch(const Values& values, int k, int slot, const T* x) const {
    if (k + LOADS <= count) {
#if ASYNC
#pragma unroll
      for (int u = 0; u < LOADS; u++) copy_later<sizeof(Word)>(&(*this)[slot + u], x + values.at(k + u));
#else
      Word v[LOADS];
#pragma unroll
      for (int u = 0; u < LOADS; u++) v[u] = *(const Word*)(x + values.at(k + u));
#pragma unroll
      for (int u = 0; u < LOADS; u++) (*this)[slot + u] = v[u];
#endif
    } else {
#pragma unroll 1
      for (; k < count; k++, slot++) (*this)[slot] = *(const Word*)(x + values.at(k));
    }
  }
  // The k-th vector and the next ones, from where they are: all before `first` or none.
  template <int N> INLINE void load(Vector (&v)[N], const Values& values, int k, const T* x) const {
    if (k >= first) {
      const int slot = k % slots;
#pragma unroll
      for (int u = 0; u < N; u++) v[u].word = (*this)[wrap(slot + u)];
    } else {
#pragma unroll
      for (int u = 0; u < N; u++) v[u].word = *(const Word*)(x + values.at(k + u));
    }
  }
};

// Calls body(size, k) for all vectors of a thread, SIZE of them where so many lie in the same memory.
template <int SIZE, class Body> INLINE void for_all(const Ring& ring, Body body) {
  for_vectors<SIZE>(0, ring.first, body);
  for_vectors<SIZE>(ring.first, ring.count, body);
}

// Calls body(size, k, rings' vectors) for all vectors of a thread once more: first for those that its rings still have,
// then for the others, the latest read first; if `copies`, these are copied, in time, to where the first ones were.
template <int RINGS, class Body>
INLINE void for_all_again(const Ring (&rings)[RINGS], const Values& values, const T* const (&from)[RINGS], bool copies, Body body) {
  const int count = rings[0].count, slots = rings[0].slots, first = rings[0].first, kept = count - first;
  constexpr int BATCHES = AHEAD * LOADS / LATER_LOADS, DISTANCE = BATCHES * LATER_LOADS;
  copies = copies && first > 0 && slots >= DISTANCE + LATER_LOADS;
  int slot = slots ? first % slots : 0;
  auto number = [&](int i) { return i < kept ? first + i : count - 1 - i; };
  auto some = [&](auto size, int i) {
    constexpr int N = decltype(size)::value;
    Vector v[RINGS][N];
    int k[N];
#pragma unroll
    for (int u = 0; u < N; u++) k[u] = number(i + u);
    if (copies) {
#pragma unroll
      for (int u = 0; u < N; u++) {
        const int later = i + DISTANCE + u;
#pragma unroll
        for (int r = 0; r < RINGS; r++)
          if (later >= kept && later < count) copy(&rings[r][rings[r].wrap(slot + DISTANCE + u)], from[r] + values.at(number(later)));
      }
      end_group();
      if (N == LATER_LOADS) wait_copies<BATCHES>();
      else wait_copies<0>();
    }
#pragma unroll
    for (int u = 0; u < N; u++)
#pragma unroll
      for (int r = 0; r < RINGS; r++)
        v[r][u].word = copies || i + u < kept ? rings[r][rings[r].wrap(slot + u)] : *(const Word*)(from[r] + values.at(k[u]));
    body(size, k, v);
    slot += N;
    if (slot >= slots) slot -= slots;
  };
  for_vectors<LATER_LOADS>(0, count, some);
}

INLINE float middle(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }

// ---- moments

struct Moments {
  double mean, var, count;
  double lost;  // variances that lie between the shift and the mean
};

INLINE Moments moments_around(float shift, double sum, double square, double count) {
  Moments m;
  const double d = sum / count, var = square / count - d * d;
  m.mean = shift + d, m.var = var < 0 ? 0 : var, m.count = count;
  m.lost = d != 0 ? d * d / m.var : 0;
  return m;
}

// Of the values whose deviations from `shift` have these sums. A set of several channels has a shift for each: their
// moments are put together as Chan, Golub and LeVeque do (1979).
template <bool COUNTED>
INLINE Moments moments_of(const double (*total)[WIDTH], const float* shift, int channel, int set_channels, double each) {
  if (set_channels == 1)
    return moments_around(shift[channel], total[0][channel], total[1][channel], COUNTED ? total[2][channel] : each);
  Moments m = {0, 0, 0, 0};
  const int from = channel - channel % set_channels;
  for (int k = from; k < from + set_channels; k++) {
    const double n = COUNTED ? total[2][k] : each;
    m.count += n;
    if (n != 0) m.mean += n * shift[k] + total[0][k];
  }
  m.mean /= m.count;
  double squares = 0, lost = 0;
  for (int k = from; k < from + set_channels; k++) {
    const double n = COUNTED ? total[2][k] : each;
    if (n == 0) continue;
    const double d = total[0][k] / n, off = shift[k] + d - m.mean;
    squares += total[1][k] - n * d * d + n * off * off, lost += n * d * d;
  }
  m.var = squares < 0 ? 0 : squares / m.count;
  m.lost = lost > 0 ? lost / m.count / m.var : 0;
  return m;
}

// ---- forward

INLINE void store(const Forward& a, int s, const Moments& m) {
  const i64 sets = a.cut.sets;
  a.moments[s] = (float)m.mean, a.moments[sets + s] = (float)m.var, a.moments[4 * sets + s] = (float)m.count;
  const double others = m.count - 1, unbiased = m.var * (m.count / (others > 1 ? others : 1));
  if (a.running_mean && finite(m.mean) && finite(unbiased)) {
    const double momentum = a.momentum < 0 ? 1.0 / (double)*a.num_batches : a.momentum;
    a.running_mean[s] = (float)((1 - momentum) * a.running_mean[s] + momentum * m.mean);
    a.running_var[s] = (float)((1 - momentum) * a.running_var[s] + momentum * unbiased);
  }
}

// Wide enough to hold a value even where the deviation is below the rounding of the mean (Eq. 5).
INLINE double half_width(const Moments& m, double t_sigma, double eps) {
  const double sigma = sqrt(m.var + eps), least = sigma + 16 * 1.1920929e-07 * (sigma + fabs(m.mean));
  return t_sigma * sigma > least ? t_sigma * sigma : least;
}

INLINE float activate(float z, float slope) {
  if (ACTIVATION == 1) z = z < 0 ? (slope == 0 ? 0.f : z * slope) : z;  // a NaN stays
  if (ACTIVATION == 2) z = z / (1 + expf(-z));
  return z;
}

#if LAYOUT < 2
// What a set's first sums are taken around: the middle of three places' means, so that an outlier is seldom near it.
INLINE void shift_of(const Cut& cut, const Values& values, const T* x, float (&shift)[OWN]) {
  float mean[3][OWN] = {};
#if LAYOUT == 1
  const int rows = cut.runs, more = rows >= 6;
  const bool is = values.channel < cut.channels;
  const T* const from = x + (values.base - (Offset)values.first * cut.channels);
  Vector v[3][2];
#pragma unroll
  for (int i = 0; i < 3; i++)
#pragma unroll
    for (int u = 0; u < 2; u++)
      if (is) v[i][u].word = *(const Word*)(from + (Offset)((i64)rows * i / 3 + u * more) * cut.channels);
#pragma unroll
  for (int i = 0; i < 3; i++)
#pragma unroll
    for (int j = 0; j < OWN; j++) mean[i][j] = is ? 0.5f * up(v[i][0].value[j]) + 0.5f * up(v[i][1].value[j]) : 0.f;
#else
  Vector v[3];
#pragma unroll
  for (int i = 0; i < 3; i++) {
    int run;
    v[i].word = *(const Word*)(x + values.of_set((int)((i64)cut.vectors * i / 3), run));
  }
#pragma unroll
  for (int i = 0; i < 3; i++)
#pragma unroll
    for (int j = 0; j < VECTOR; j++) mean[i][0] += up(v[i].value[j]) * (1.f / VECTOR);
#endif
#pragma unroll
  for (int j = 0; j < OWN; j++) shift[j] = middle(mean[0][j], mean[1][j], mean[2][j]);
}
#endif

#if LAYOUT < 2
#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const Forward a) {
  extern __shared__ __align__(16) char smem[];
  __shared__ Scratch scratch;
  __shared__ double whole[2][WIDTH];  // sums of all values
  __shared__ float shifts[WIDTH], lower[WIDTH], upper[WIDTH], center[WIDTH], scale[WIDTH], lift[WIDTH];
  // Whether sums are taken again, first and later; whether there is a value outside of the band; whether the kept values'
  // sums cannot be had from all values'.
  __shared__ int again[2], outside, apart;
  float* const reach = scale;  // how far from the shift all values are surely inside; until the scale is known
  double (&total)[4][WIDTH] = scratch.total;
  const Cut& cut = a.cut;
  const Place place = take_place<FIRST || FILTERED>(cut, a.counters);
#if LAYOUT == 1
  const Values values(cut, place, 0);
  const int first_channel = values.channel - threadIdx.x % ROW_VECTORS * VECTOR;  // of the group
  const int first_set = place.group / cut.blocks * (cut.channels / cut.set_channels);
  const int set_channels = cut.set_channels, own = values.channel - first_channel;
  const int each = cut.runs;
#else
  const Values values(cut, place, (int)((u32)(place.group * cut.set_channels) % (u32)cut.channels));
  const int first_channel = values.channel, first_set = place.group;
  const int set_channels = 1, own = 0;
  const int each = cut.vectors * VECTOR;
#endif
  // the statistic of a group's c-th channel
  auto set_of = [&](int c) { return LAYOUT == 1 ? first_set + (first_channel + c) / set_channels : first_set; };
  auto exists = [&](int c) { return LAYOUT != 1 || first_channel + c < cut.channels; };
  const Ring ring((Word*)smem, cut.kept, values.count);
  const int count = values.count, sets = cut.sets;
  const T* const x = a.x;
  int round = 0;

  float shift[OWN], big[OWN];  // what sums are taken around, and how far from it a thread's values reach
  if (FIRST) {
    const bool roomy = ring.roomy(cut);
    if (roomy)
#pragma unroll
      for (int i = 0; i < AHEAD; i++) ring.fetch(values, i * LOADS, i * LOADS, x), end_group();
    shift_of(cut, values, a.x, shift);
#pragma unroll 1
    for (bool repeated = false;; repeated = true) {
      float sums[3][OWN];
#pragma unroll
      for (int j = 0; j < OWN; j++) sums[0][j] = sums[1][j] = big[j] = 0;
      float sum[OWN] = {}, square[OWN] = {};
      auto flush = [&] {
#pragma unroll
        for (int j = 0; j < OWN; j++) sums[0][j] += sum[j], sums[1][j] += square[j], sum[j] = square[j] = 0;
      };
      auto add = [&](const Vector& v) {
        float part[OWN], squares[OWN];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const int j = i % OWN;
          const float d = up(v.value[i]) - shift[j];
          part[j] = i < OWN ? d : part[j] + d, squares[j] = i < OWN ? d * d : squares[j] + d * d;
          big[j] = fmaxf(big[j], fabsf(d));
        }
#pragma unroll
        for (int j = 0; j < OWN; j++) sum[j] += part[j], square[j] += squares[j];
      };
      int filled = 0;
      auto filling = [&](int vectors) {
        if ((filled += vectors) >= FLUSH) flush(), filled = 0;
      };
      if (ring.slots && !repeated) {
        int to = roomy ? AHEAD * LOADS : 0, from = 0;  // slots
        const int ahead = to;
        to = ring.wrap(to);
#pragma unroll 1
        for (int k = 0; k < count; k += LOADS) {
          ring.fetch(values, k + ahead, to, x), end_group();
          if (roomy) wait_copies<AHEAD>();
          else wait_copies<0>();
          if (k + LOADS <= count) {
            Vector v[LOADS];
#pragma unroll
            for (int u = 0; u < LOADS; u++) v[u].word = ring[from + u];
#pragma unroll
            for (int u = 0; u < LOADS; u++) add(v[u]);
          } else {
#pragma unroll 1
            for (int u = 0; k + u < count; u++) {
              Vector v;
              v.word = ring[from + u];
              add(v);
            }
          }
          to = ring.wrap(to + LOADS), from = ring.wrap(from + LOADS);
          filling(LOADS);
        }
      } else {
        for_all<LOADS>(ring, [&](auto size, int k) {
          constexpr int N = decltype(size)::value;
          Vector v[N];
          ring.load(v, values, k, x);
#pragma unroll
          for (int u = 0; u < N; u++) add(v[u]);
          filling(N);
        });
      }
      flush();
#pragma unroll
      for (int j = 0; j < OWN; j++) sums[2][j] = -big[j];
      if (threadIdx.x == 0) again[0] = outside = apart = 0;
      if (threadIdx.x < WIDTH / OWN)
#pragma unroll
        for (int j = 0; j < OWN; j++) shifts[own + j] = shift[j];
      add_group<3, 2>(scratch, cut, place, a.partial, a.counters, ++round, sums);
      spread<WIDTH>([&](int c) {
        const Moments m = moments_of<false>(total, shifts, c, set_channels, each);
        if (m.lost > (FILTERED ? POOR : ROUGH) && !repeated) atomicMax(&again[0], 1);
        const double width = half_width(m, a.t_sigma, a.eps);
        lower[c] = FILTERED ? (float)(m.mean - width) : -INFINITE;
        upper[c] = FILTERED ? (float)(m.mean + width) : INFINITE;
        reach[c] = (1 - 1e-6f) * fminf(upper[c] - shifts[c], shifts[c] - lower[c]);
        if (FILTERED && !(-total[2][c] <= reach[c])) atomicMax(&outside, 1);  // if there is a NaN, too
        if (FILTERED && m.lost > ROUGH) atomicMax(&apart, 1);
        whole[0][c] = total[0][c], whole[1][c] = total[1][c];
        center[c] = (float)(shifts[c] + total[0][c] / each);  // what sums are taken around if they are taken again
      });
      __syncthreads();
      if (!again[0]) break;
#pragma unroll
      for (int j = 0; j < OWN; j++) shift[j] = center[own + j];
      __syncthreads();
    }
  } else if (FILTERED) {
    if (threadIdx.x == 0) outside = apart = 1;
    spread<WIDTH>([&](int c) {
      const int s = exists(c) ? set_of(c) : 0;
      center[c] = a.moments[s], lower[c] = a.moments[2 * sets + s], upper[c] = a.moments[3 * sets + s];
    });
    __syncthreads();
  }

  // With no value outside of the band the sums of all are those of the kept (Eq. 6, 7). With few they are the difference:
  // most threads know that they have none outside. Where that loses digits, the kept values are added up.
  const bool filters = FILTERED && outside;
  // The sums around `from` of a thread's values, of those inside of the band or of those outside.
  auto sums_of = [&](auto inside, const auto& lo, const auto& hi, const auto& from, float (&sums)[3][OWN]) {
    constexpr bool INSIDE = decltype(inside)::value;
    float sum[OWN] = {}, square[OWN] = {};
    int filled = 0;
    auto flush = [&] {
#pragma unroll
      for (int j = 0; j < OWN; j++) sums[0][j] += sum[j], sums[1][j] += square[j], sum[j] = square[j] = 0;
    };
    for_all<SEARCH_LOADS>(ring, [&](auto size, int k) {
      constexpr int N = decltype(size)::value;
      Vector v[N];
      ring.load(v, values, k, x);
#pragma unroll
      for (int u = 0; u < N; u++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const int j = i % OWN;
          const float w = up(v[u].value[i]);
          if ((w >= lo[j] && w <= hi[j]) == INSIDE) {
            const float d = w - from[j];
            sum[j] += d, square[j] += d * d, sums[2][j] += 1;
          }
        }
      if ((filled += N) >= FLUSH) flush(), filled = 0;
    });
    flush();
  };
  if (FIRST && filters && !apart) {
    bool none = true;
#pragma unroll
    for (int j = 0; j < OWN; j++) none = none && big[j] <= reach[own + j];
    float sums[3][OWN] = {};
    if (!none) {
      float lo[OWN], hi[OWN];
      const volatile float* from = shifts + own;  // registers are for what every value needs
#pragma unroll
      for (int j = 0; j < OWN; j++) lo[j] = lower[own + j], hi[j] = upper[own + j];
      sums_of(Number<0>(), lo, hi, from, sums);
    }
    add_group<3, 3>(scratch, cut, place, a.partial, a.counters, ++round, sums);
    spread<WIDTH>([&](int c) {  // from here on of the kept
      total[0][c] = whole[0][c] - total[0][c], total[1][c] = whole[1][c] - total[1][c], total[2][c] = each - total[2][c];
    });
    __syncthreads();
    spread<WIDTH>([&](int c) {
      const Moments m = moments_of<true>(total, shifts, c, set_channels, each);
      // What all values' squares are too many of the kept's, their difference loses, too.
      if (m.lost > ROUGH || whole[1][c] > DIFFERENCE * total[1][c]) atomicMax(&apart, 1);
      if (total[2][c] != 0) center[c] = (float)(shifts[c] + total[0][c] / total[2][c]);
    });
    __syncthreads();
  }
  const bool resums = FILTERED && apart;
  if (resums) {
    const volatile float *lo = lower + own, *hi = upper + own;  // registers are for the sums
#pragma unroll
    for (int j = 0; j < OWN; j++) shift[j] = center[own + j];
#pragma unroll 1
    for (int repeated = 0;; repeated++) {
      float sums[3][OWN] = {};
      sums_of(Number<1>(), lo, hi, shift, sums);
      if (threadIdx.x == 0) again[1] = 0;
      if (threadIdx.x < WIDTH / OWN)
#pragma unroll
        for (int j = 0; j < OWN; j++) shifts[own + j] = shift[j];
      add_group<3, 3>(scratch, cut, place, a.partial, a.counters, ++round, sums);
      spread<WIDTH>([&](int c) {
        if (moments_of<true>(total, shifts, c, set_channels, each).lost > STRICT && repeated < REPEATS)
          atomicMax(&again[1], 1);
        if (total[2][c] != 0) center[c] = (float)(shifts[c] + total[0][c] / total[2][c]);
      });
      __syncthreads();
      if (!again[1]) break;
#pragma unroll
      for (int j = 0; j < OWN; j++) shift[j] = center[own + j];
      __syncthreads();
    }
  }
  const int before = say_goodbye<FIRST || FILTERED>(cut, a.counters);

  auto moments = [&](int c) {
    Moments m = filters || resums ? moments_of<true>(total, shifts, c, set_channels, each)
                                  : moments_of<false>(total, shifts, c, set_channels, each);
    m.var /= a.kappa;
    return m;
  };
  if (APPLY)
    spread<WIDTH>([&](int c) {
      if (!exists(c)) return;
      Moments m = {0, 0, 0, 0};
      if (FIRST || FILTERED) {
        m = moments(c);
      } else {
        const int s = set_of(c);
        m.mean = a.moments[s], m.var = a.moments[sets + s];
      }
      const double rstd = rsqrt(m.var + a.eps);
      const int channel = first_channel + c;
      const float w = RUN_CHANNELS ? 1.f : parameter(a.weight, a.weight_type, channel, 1.f);
      const float b = RUN_CHANNELS ? 0.f : parameter(a.bias, a.bias_type, channel, 0.f);
      center[c] = (float)m.mean;
      scale[c] = (float)(rstd * w);
      lift[c] = (float)(b - (m.mean - center[c]) * (rstd * w));  // what the mean's rounding leaves
    });
  __syncthreads();
  if ((FIRST || FILTERED) && place.member == 0)  // nobody waits for these
    spread<WIDTH>([&](int c) {
      if (!exists(c) || c % set_channels) return;
      const int s = set_of(c);
      if (FIRST) a.moments[2 * sets + s] = lower[c], a.moments[3 * sets + s] = upper[c];
      store(a, s, moments(c));
    });
  if (a.num_batches && a.momentum >= 0 && blockIdx.x == 0 && threadIdx.x == 0) *a.num_batches += 1;

  if (APPLY) {
    float middle_of[OWN], by[OWN], plus[OWN];
#pragma unroll
    for (int j = 0; j < OWN; j++) middle_of[j] = center[own + j], by[j] = scale[own + j], plus[j] = lift[own + j];
    const Ring rings[1] = {ring};
    const T* const from[1] = {x};
    for_all_again(rings, values, from, true, [&](auto size, const int* k, auto& read) {
      constexpr int N = decltype(size)::value;
      Vector(&v)[N] = read[0], r[N];
      Offset offset[N];
      int run[N];
#pragma unroll
      for (int u = 0; u < N; u++) offset[u] = values.at(k[u], run[u]);
      if (a.residual)
#pragma unroll
        for (int u = 0; u < N; u++) r[u].word = *(const Word*)(a.residual + offset[u]);
#pragma unroll
      for (int u = 0; u < N; u++) {
        float w = by[0], rest = plus[0];
        if (RUN_CHANNELS) {
          const float weight = parameter(a.weight, a.weight_type, values.channel + run[u], 1.f);
          w *= weight, rest = rest * weight + parameter(a.bias, a.bias_type, values.channel + run[u], 0.f);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const int j = i % OWN;
          float z = fmaf(up(v[u].value[i]) - middle_of[j], RUN_CHANNELS ? w : by[j], RUN_CHANNELS ? rest : plus[j]);
          if (a.residual) z += up(r[u].value[i]);
          v[u].value[i] = down(activate(z, a.slope));
        }
        put(a.y + offset[u], v[u].word);
      }
    });
  }
  leave<FIRST || FILTERED>(cut, a.counters, before);
}

#endif  // !BACKWARD
#endif  // LAYOUT < 2

// ---- backward

// dL/dz, the gradient before the activation, rounded as it is stored; `z` is needed where there is an activation.
INLINE float before_activation(float grad, float z, float slope) {
  if (ACTIVATION == 1) grad = z <= 0 ? (slope == 0 ? 0.f : grad * slope) : grad;
  if (ACTIVATION == 2) {
    const float sigmoid = 1 / (1 + expf(-z));
    grad = grad * sigmoid * (1 + z * (1 - sigmoid));
  }
  return grad;
}

// dL/dx of a value that is `d` off the mean: exact, or as printed (Eq. 11).
INLINE float input_gradient(float grad, float d, bool inside, bool paper, float weight, float subtract, float slope) {
  const float less = paper ? fmaf(inside ? d : 0.f, slope, subtract) : inside ? fmaf(d, slope, subtract) : 0.f;
  return fmaf(grad, weight, -less);
}

#if LAYOUT < 2 && BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const Backward a) {
  extern __shared__ __align__(16) char smem[];
  __shared__ Scratch scratch;
  __shared__ float each_of[WIDTH], times[WIDTH];  // what is subtracted where a value is kept, and subtracted times x - mean
  __shared__ float lower[WIDTH], upper[WIDTH];
  const Cut& cut = a.cut;
  const Place place = take_place<FIRST>(cut, a.counters);
  const Values values(cut, place, (int)((u32)place.group % (u32)cut.channels));
  const Ring rings[2] = {{(Word*)smem, cut.kept, values.count}, {(Word*)smem + cut.kept * THREADS, cut.kept, values.count}};
  const Ring &ring = rings[0], &ring_grad = rings[1];
  const int count = values.count, sets = cut.sets;
#if LAYOUT == 1
  const int first_channel = values.channel - threadIdx.x % ROW_VECTORS * VECTOR, own = values.channel - first_channel;
  const int sample = place.group / cut.blocks, first_set = sample * (cut.channels / cut.set_channels);
  const int first_sum = sample * cut.channels + first_channel, all_sums = cut.groups / cut.blocks * cut.channels;
  auto set_of = [&](int c) { return first_set + (first_channel + c) / cut.set_channels; };
  auto exists = [&](int c) { return first_channel + c < cut.channels; };
#else
  const int first_channel = values.channel, own = 0, first_sum = place.group, all_sums = cut.groups;
  auto set_of = [&](int c) { return place.group / cut.set_channels; };
  auto exists = [&](int c) { return true; };
#endif
  const T *const x = a.x, *const grad = a.grad;

  const bool roomy = ring.roomy(cut);
  auto fetch_both = [&](int k, int slot) {
    ring.fetch(values, k, slot, x), ring_grad.fetch(values, k, slot, grad);
    end_group();
  };
  if (FIRST && roomy)
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch_both(i * LOADS, i * LOADS);

  float mean[OWN], weight[OWN], bias[OWN];
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    const bool is = exists(own + j);
    const int s = is ? set_of(own + j) : 0, channel = is ? first_channel + own + j : 0;
    mean[j] = a.moments[s];
    const float rstd = 1 / sqrtf(a.moments[sets + s] + (float)a.eps);  // not in double, which many cards are slow at
    weight[j] = rstd * parameter(a.weight, a.weight_type, channel, 1.f);
    bias[j] = ACTIVATION ? parameter(a.bias, a.bias_type, channel, 0.f) : 0.f;
  }
  spread<WIDTH>([&](int c) {
    const int s = exists(c) ? set_of(c) : 0;
    lower[c] = a.moments[2 * sets + s], upper[c] = a.moments[3 * sets + s];
  });
  __syncthreads();

  // Gradients before the activation.
  auto undo_activation = [&](auto size, const Offset* offset, const Vector* v, Vector* g) {
    constexpr int N = decltype(size)::value;
    Vector o[N];
    if (a.other)
#pragma unroll
      for (int u = 0; u < N; u++) o[u].word = *(const Word*)(a.other + offset[u]);
#pragma unroll
    for (int u = 0; u < N; u++)
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const int j = i % OWN;
        float z = fmaf(up(v[u].value[i]) - mean[j], weight[j], bias[j]);
        if (a.other) z = up(o[u].value[i]) + (a.output ? 0.f : z);
        g[u].value[i] = down(before_activation(up(g[u].value[i]), z, a.slope));
      }
  };

  if (FIRST) {
    float sums[2][OWN] = {}, sum[OWN] = {}, product[OWN] = {};
    auto flush = [&] {
#pragma unroll
      for (int j = 0; j < OWN; j++) sums[0][j] += sum[j], sums[1][j] += product[j], sum[j] = product[j] = 0;
    };
    int filled = 0;
    auto add = [&](auto size, int k, int slot, Vector* v, Vector* g) {  // slot: where they are kept, or -1
      constexpr int N = decltype(size)::value;
      if (ACTIVATION) {
        Offset offset[N];
#pragma unroll
        for (int u = 0; u < N; u++) offset[u] = values.at(k + u);
        undo_activation(size, offset, v, g);
#pragma unroll
        for (int u = 0; u < N; u++) {
          if (slot >= 0) ring_grad[slot + u] = g[u].word;
          if (a.dz) put(a.dz + offset[u], g[u].word);
        }
      }
#pragma unroll
      for (int u = 0; u < N; u++) {
        float part[OWN], products[OWN];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const int j = i % OWN;
          const float w = up(v[u].value[i]), d = w - mean[j];
          float e = up(g[u].value[i]);
          if (a.paper && !(w >= lower[own + j] && w <= upper[own + j])) e = 0;
          part[j] = i < OWN ? e : part[j] + e, products[j] = i < OWN ? e * d : products[j] + e * d;
        }
#pragma unroll
        for (int j = 0; j < OWN; j++) sum[j] += part[j], product[j] += products[j];
      }
      if ((filled += N) >= FLUSH) flush(), filled = 0;
    };
    if (ring.slots) {
      const int ahead = roomy ? AHEAD * LOADS : 0;
      int to = ring.wrap(ahead), slot = 0;
#pragma unroll 1
      for (int k = 0; k < count; k += LOADS) {
        fetch_both(k + ahead, to);
        if (roomy) wait_copies<AHEAD>();
        else wait_copies<0>();
        for_vectors<LOADS>(k, min(k + LOADS, count), [&](auto size, int i) {
          constexpr int N = decltype(size)::value;
          Vector v[N], g[N];
#pragma unroll
          for (int u = 0; u < N; u++) v[u].word = ring[slot + i - k + u], g[u].word = ring_grad[slot + i - k + u];
          add(size, i, slot + i - k, v, g);
        });
        to = ring.wrap(to + LOADS), slot = ring.wrap(slot + LOADS);
      }
    } else {
      for_vectors<LATER_LOADS>(0, count, [&](auto size, int k) {
        constexpr int N = decltype(size)::value;
        Vector v[N], g[N];
#pragma unroll
        for (int u = 0; u < N; u++)
          v[u].word = *(const Word*)(x + values.at(k + u)), g[u].word = *(const Word*)(grad + values.at(k + u));
        add(size, k, -1, v, g);
      });
    }
    flush();
    add_group<2, 2>(scratch, cut, place, a.partial, a.counters, 1, sums);
  }
  const int before = say_goodbye<FIRST>(cut, a.counters);

  if (APPLY) {
    spread<WIDTH>([&](int c) {
      if (!exists(c)) return;
      const int s = set_of(c);
      double g = 0, g_xhat = 0;
      const double root = rsqrt(a.moments[sets + s] + a.eps);
      if (FIRST) {
#if LAYOUT == 1
        const int from = c - c % cut.set_channels, to = from + cut.set_channels;
#else
        const int from = 0, to = 1;
#endif
        for (int k = from; k < to; k++) {
          const double w = parameter(a.weight, a.weight_type, first_channel + k, 1.f);
          g += w * scratch.total[0][k], g_xhat += w * scratch.total[1][k] * root;
        }
        const double kept_values = a.moments[4 * sets + s];
        g /= kept_values, g_xhat /= kept_values * a.kappa;
      } else {
        g = a.coefficients[s], g_xhat = a.coefficients[sets + s];
      }
      each_of[c] = (float)(g * root), times[c] = (float)(g_xhat * root * root);
    });
    __syncthreads();
  }
  if (FIRST && place.member == 0)  // nobody waits for these
    spread<WIDTH>([&](int c) {
      if (!exists(c)) return;
      a.sums[first_sum + c] = (float)scratch.total[0][c];
      a.sums[all_sums + first_sum + c] = (float)(scratch.total[1][c] * rsqrt(a.moments[sets + set_of(c)] + a.eps));
    });
  if (APPLY) {
    float subtract[OWN], slope[OWN], reach[OWN];  // reach: how far from the mean all values are surely kept
#pragma unroll
    for (int j = 0; j < OWN; j++) {
      subtract[j] = each_of[own + j], slope[j] = times[own + j];
      reach[j] = a.paper ? -1.f : (1 - 1e-6f) * fminf(upper[own + j] - mean[j], mean[j] - lower[own + j]);
    }
    // Of what was not kept. What this thread has stored, and what is still to be computed, is not copied ahead.
    const T* const from[2] = {x, ACTIVATION && a.dz ? a.dz : grad};
    for_all_again(rings, values, from, !ACTIVATION, [&](auto size, const int* k, auto& read) {
      constexpr int N = decltype(size)::value;
      Vector(&v)[N] = read[0], (&g)[N] = read[1];
      Offset offset[N];
#pragma unroll
      for (int u = 0; u < N; u++) offset[u] = values.at(k[u]);
      if (ACTIVATION && !a.dz && k[0] < ring.first) undo_activation(size, offset, v, g);
#pragma unroll
      for (int u = 0; u < N; u++) {
        bool near = true;
        Vector result;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const int j = i % OWN;
          const float d = up(v[u].value[i]) - mean[j];
          near = near && fabsf(d) <= reach[j];
          result.value[i] = down(fmaf(up(g[u].value[i]), weight[j], -fmaf(d, slope[j], subtract[j])));
        }
        if (!near) {  // seldom: one of them may be outside of the band
#pragma unroll
          for (int i = 0; i < VECTOR; i++) {
            const int j = i % OWN;
            const float w = up(v[u].value[i]);
            const bool inside = w >= lower[own + j] && w <= upper[own + j];
            result.value[i] = down(
                input_gradient(up(g[u].value[i]), w - mean[j], inside, a.paper, weight[j], subtract[j], slope[j]));
          }
        }
        put(a.dx + offset[u], result.word);
      }
    });
  }
  leave<FIRST>(cut, a.counters, before);
}
#endif  // LAYOUT < 2 && BACKWARD

// ---- lines: a set is a run of channels at one position; a warp handles one after the other

#if LAYOUT == 2
template <class V> INLINE V warp_sum(V v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
INLINE float warp_min(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fminf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}

// A lane's vectors of a line, from where they are kept or from global memory.
struct Line {
  const T* x;
  const Word* keep;
  int kept;
  INLINE Vector at(int k) const {
    Vector v;
    const int i = k * 32 + (threadIdx.x & 31);
    v.word = k < kept ? keep[i] : ((const Word*)x)[i];
    return v;
  }
};

struct LineSums {
  Moments moments;
  float low, high;
};

// Of a line's values in [lower, upper]; the first time they are kept.
INLINE LineSums sums_of(const Line& line, Word* keep, int vectors, float shift, float lower, float upper) {
  const int lane = threadIdx.x & 31;
  float sum = 0, square = 0, count = 0, low = INFINITE, high = INFINITE;
  for (int k = 0; k * 32 + lane < vectors; k++) {
    const Vector v = line.at(k);
    if (keep) keep[k * 32 + lane] = v.word;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const float value = up(v.value[i]), d = value - shift;
      low = fminf(low, value), high = fminf(high, -value);
      if ((value >= lower && value <= upper) || lower != lower) sum += d, square += d * d, count += 1;
    }
  }
  LineSums s;
  const double n = warp_sum((double)count);
  s.moments = moments_around(shift, warp_sum((double)sum), warp_sum((double)square), n);
  s.low = warp_min(low), s.high = -warp_min(high);
  return s;
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS) forward_lines(const Forward a) {
  extern __shared__ __align__(16) char smem[];
  const Cut& cut = a.cut;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, vectors = cut.length, groups = cut.channels / cut.set_channels;
  Word* keep = (Word*)smem + warp * cut.kept * 32;
  for (i64 s = (i64)blockIdx.x * WARPS + warp; s < cut.sets; s += (i64)gridDim.x * WARPS) {
    const T* x = a.x + s * cut.set_channels;
    Line line = {x, keep, 0};
    const float shift = middle(up(x[0]), up(x[cut.set_channels / 3]), up(x[cut.set_channels * 2 / 3]));
    LineSums sums = sums_of(line, cut.kept == cut.steps ? keep : nullptr, vectors, shift, -INFINITE, INFINITE);
    line.kept = cut.kept;
    if (sums.moments.lost > POOR) sums = sums_of(line, nullptr, vectors, (float)sums.moments.mean, -INFINITE, INFINITE);
    const double width = half_width(sums.moments, a.t_sigma, a.eps), middle_of = sums.moments.mean;
    const float lower = (float)(middle_of - width), upper = (float)(middle_of + width);
    if (!(sums.low >= lower && sums.high <= upper && sums.moments.lost <= ROUGH)) {
      int repeated = 0;
      do sums = sums_of(line, nullptr, vectors, (float)sums.moments.mean, lower, upper);
      while (sums.moments.lost > STRICT && repeated++ < REPEATS);
    }
    Moments m = sums.moments;
    m.var /= a.kappa;
    if (lane == 0) {
      float* moment = a.moments + s;
      const i64 sets = cut.sets;
      moment[0] = (float)m.mean, moment[sets] = (float)m.var, moment[2 * sets] = lower, moment[3 * sets] = upper;
      moment[4 * sets] = (float)m.count;
    }
    const double root = 1 / sqrt(m.var + a.eps);
    const float mean = (float)m.mean, rstd = (float)root, rest = (float)((m.mean - mean) * root);
    const int channel = (int)(s % groups) * cut.set_channels;
    for (int k = 0; k * 32 + lane < vectors; k++) {
      Vector v = line.at(k), r;
      const int at = (k * 32 + lane) * VECTOR;
      if (a.residual) r.word = *(const Word*)(a.residual + s * cut.set_channels + at);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float w = parameter(a.weight, a.weight_type, channel + at + i, 1.f);
        const float b = parameter(a.bias, a.bias_type, channel + at + i, 0.f);
        float z = ((up(v.value[i]) - mean) * rstd - rest) * w + b;
        if (a.residual) z += up(r.value[i]);
        v.value[i] = down(z);
      }
      put(a.y + s * cut.set_channels + at, v.word);
    }
  }
}

#else
extern "C" __global__ void __launch_bounds__(THREADS) backward_lines(const Backward a) {
  extern __shared__ __align__(16) char smem[];
  const Cut& cut = a.cut;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, vectors = cut.length, channels = cut.channels;
  const int groups = channels / cut.set_channels;
  Word* keep = (Word*)smem + warp * cut.kept * 64;
  // Each warp adds up the gradients of bias and weight over its lines; a lane always comes to the same channels.
  float* of_bias = (float*)((Word*)smem + WARPS * cut.kept * 64) + warp * 2 * channels;
  float* of_weight = of_bias + channels;
  for (int c = lane * VECTOR; c < channels; c += 32 * VECTOR)
    for (int i = c; i < c + VECTOR; i++) of_bias[i] = of_weight[i] = 0;
  __syncthreads();
  for (i64 s = (i64)blockIdx.x * WARPS + warp; s < cut.sets; s += (i64)gridDim.x * WARPS) {
    const i64 sets = cut.sets;
    const float mean = a.moments[s], lower = a.moments[2 * sets + s], upper = a.moments[3 * sets + s];
    const double root = 1 / sqrt(a.moments[sets + s] + a.eps), count = a.moments[4 * sets + s];
    const float rstd = (float)root;
    const int channel = (int)(s % groups) * cut.set_channels;
    Line of_x = {a.x + s * cut.set_channels, keep, 0}, of_grad = {a.grad + s * cut.set_channels, keep + cut.kept * 32, 0};
    float sum = 0, product = 0;
    for (int k = 0; k * 32 + lane < vectors; k++) {
      const Vector x = of_x.at(k), grad = of_grad.at(k);
      if (k < cut.kept) keep[k * 32 + lane] = x.word, keep[(cut.kept + k) * 32 + lane] = grad.word;
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const int c = channel + (k * 32 + lane) * VECTOR + i;
        const float v = up(x.value[i]), g = up(grad.value[i]), g_xhat = g * ((v - mean) * rstd);
        if (a.paper && !(v >= lower && v <= upper)) continue;
        const float w = parameter(a.weight, a.weight_type, c, 1.f);
        of_bias[c] += g, of_weight[c] += g_xhat;
        sum += g * w, product += g_xhat * w;
      }
    }
    of_x.kept = of_grad.kept = cut.kept;
    const float subtract = (float)(warp_sum((double)sum) / count * root);
    const float slope = (float)(warp_sum((double)product) / (count * a.kappa) * root * root);
    for (int k = 0; k * 32 + lane < vectors; k++) {
      const Vector x = of_x.at(k);
      Vector grad = of_grad.at(k);
      const int at = (k * 32 + lane) * VECTOR;
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float v = up(x.value[i]), d = v - mean, w = rstd * parameter(a.weight, a.weight_type, channel + at + i, 1.f);
        const bool inside = v >= lower && v <= upper;
        grad.value[i] = down(input_gradient(up(grad.value[i]), d, inside, a.paper, w, subtract, slope));
      }
      put(a.dx + s * cut.set_channels + at, grad.word);
    }
  }
  __syncthreads();
  const float* all = (const float*)((Word*)smem + WARPS * cut.kept * 64);
  for (int i = threadIdx.x; i < 2 * channels; i += THREADS) {
    double v = 0;
    for (int w = 0; w < WARPS; w++) v += all[w * 2 * channels + i];
    a.sums[((i64)(i / channels) * gridDim.x + blockIdx.x) * channels + i % channels] = (float)v;
  }
}
#endif  // BACKWARD
#endif  // LAYOUT == 2

// ---- bundles: several channels in a block of threads, which needs no other

#if LAYOUT == 3
constexpr int TEAM = THREADS / CHANNELS;  // threads of a channel
static_assert(TEAM % 32 == 0, "a warp has one channel");

// A bundle is loaded and stored by whole vectors, in which two channels may meet.
struct Bundle {
  const Cut& cut;
  i64 base;
  INLINE Bundle(const Cut& c) : cut(c), base((i64)blockIdx.x * CHANNELS * c.positions) {}
  // Where its i-th vector is, and the place of that in its sample's part of the bundle.
  INLINE i64 offset(int i, int& place) const {
    const int run = (__umulhi((u32)i, cut.multiplier) + (u32)i) >> cut.shift;
    place = (i - run * cut.length) * VECTOR;
    return base + run * cut.run_stride + place;
  }
  // The channel of a vector's first value, and how many of its values have that channel; the others have the next one.
  INLINE int channel(int place, int& of_it) const {
    const int c = (__umulhi((u32)place, cut.by_positions) + (u32)place) >> cut.positions_shift;
    of_it = (c + 1) * cut.positions - place;
    return c;
  }
  INLINE int next(int c) const { return c + 1 < CHANNELS ? c + 1 : c; }
};

// Calls f(i, offset, place) for all vectors, a few of which a thread asks for at once.
template <int SIZE, class Load, class Use> INLINE void for_vectors(const Bundle& bundle, Load load, Use use) {
#pragma unroll 1
  for (int i = threadIdx.x; i < bundle.cut.vectors; i += SIZE * THREADS) {
    i64 offset[SIZE];
    int place[SIZE];
#pragma unroll
    for (int u = 0; u < SIZE; u++)
      if (i + u * THREADS < bundle.cut.vectors) offset[u] = bundle.offset(i + u * THREADS, place[u]), load(u, offset[u]);
#pragma unroll
    for (int u = 0; u < SIZE; u++)
      if (i + u * THREADS < bundle.cut.vectors) use(u, i + u * THREADS, offset[u], place[u]);
  }
}

// Copies all vectors to shared memory: copy(i, offset) begins it for one. All have come when it returns.
template <class Copy> INLINE void for_copies(const Bundle& bundle, Copy copy) {
#pragma unroll 4
  for (int i = threadIdx.x; i < bundle.cut.vectors; i += THREADS) {
    int place;
    copy(i, bundle.offset(i, place));
  }
  end_group();
  wait_copies<0>();
}

// Calls f(index, which) for the thread's share of its team's channel, which lies in shared memory with the others of a
// sample; `which` is 0 and 1 in turn, for sums of half as many terms.
template <class F> INLINE void for_channel(const Cut& cut, F f) {
  const int own = threadIdx.x % TEAM, s = cut.positions, sample = CHANNELS * s, all = cut.runs * s;
  const int skip = TEAM / s, step = TEAM - skip * s;
  int position = own % s, at = own / s * sample + threadIdx.x / TEAM * s + position;
  auto advance = [&] {
    position += step, at += skip * sample + step;
    if (position >= s) position -= s, at += sample - s;
  };
#pragma unroll 1
  for (int v = own; v < all; v += 2 * TEAM) {
    f(at, 0), advance();
    if (v + TEAM < all) f(at, 1), advance();
  }
}

// The sums of a team's threads, for its first thread.
template <int QUANTITIES, int SUMS>
INLINE void add_team(double (*of_warp)[WARPS], const float (&a)[QUANTITIES], double (&total)[QUANTITIES]) {
#pragma unroll
  for (int q = 0; q < QUANTITIES; q++) {
    const double v = of_lanes<1>(q >= SUMS, a[q]);
    if ((threadIdx.x & 31) == 0) of_warp[q][threadIdx.x >> 5] = v;
  }
  __syncthreads();
  if (threadIdx.x % TEAM == 0)
#pragma unroll
    for (int q = 0; q < QUANTITIES; q++) {
      total[q] = of_warp[q][threadIdx.x >> 5];
      for (int k = 1; k < TEAM / 32; k++)
        total[q] = joined(q >= SUMS, total[q], of_warp[q][(threadIdx.x >> 5) + k]);
    }
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward_bundles(const Forward a) {
  extern __shared__ __align__(16) char smem[];
  __shared__ double of_warp[4][WARPS];
  __shared__ float lower[CHANNELS], upper[CHANNELS], center[CHANNELS], scale[CHANNELS], lift[CHANNELS], reach[CHANNELS];
  __shared__ int again[2], outside, apart;
  const Cut& cut = a.cut;
  const Bundle bundle(cut);
  Word* keep = (Word*)smem;
  const T* x = (const T*)smem;
  const int team = threadIdx.x / TEAM;
  const bool leads = threadIdx.x % TEAM == 0;
  const double each = (double)cut.runs * cut.positions;
  if (threadIdx.x == 0) again[0] = again[1] = outside = apart = 0;
  for_copies(bundle, [&](int i, i64 offset) { copy(keep + i, a.x + offset); });
  __syncthreads();

  const int sample = CHANNELS * cut.positions, first = team * cut.positions;
  // A plane has two values at least.
  auto mean_at = [&](int i) { return 0.5f * up(x[i]) + 0.5f * up(x[i + 1]); };
  float shift = middle(mean_at(first), mean_at(cut.runs / 3 * sample + first + cut.positions / 3),
                       mean_at(cut.runs * 2 / 3 * sample + first + cut.positions * 2 / 3)), big;
  Moments m;
  double whole[2];
  for (bool repeated = false;; repeated = true) {
    float sum[2] = {}, square[2] = {};
    big = 0;
    for_channel(cut, [&](int i, int which) {
      const float d = up(x[i]) - shift;
      sum[which] += d, square[which] += d * d, big = fmaxf(big, fabsf(d));
    });
    const float sums[3] = {sum[0] + sum[1], square[0] + square[1], -big};
    double total[3];
    add_team<3, 2>(of_warp, sums, total);
    if (leads) {
      m = moments_around(shift, total[0], total[1], each);
      if (m.lost > POOR && !repeated) atomicMax(&again[0], 1);
      const double width = half_width(m, a.t_sigma, a.eps);
      lower[team] = (float)(m.mean - width), upper[team] = (float)(m.mean + width), center[team] = (float)m.mean;
      reach[team] = (1 - 1e-6f) * fminf(upper[team] - shift, shift - lower[team]);
      if (!(-total[2] <= reach[team])) atomicMax(&outside, 1);
      if (m.lost > ROUGH) atomicMax(&apart, 1);
      whole[0] = total[0], whole[1] = total[1];
    }
    __syncthreads();
    if (repeated || !again[0]) break;
    shift = center[team];
  }
  const float lo = lower[team], hi = upper[team];
  if (outside && !apart) {  // all values' sums less those of the values outside, which few threads have
    float sums[3] = {};
    if (!(big <= reach[team]))
      for_channel(cut, [&](int i, int) {
        const float v = up(x[i]);
        if (!(v >= lo && v <= hi)) {
          const float d = v - shift;
          sums[0] += d, sums[1] += d * d, sums[2] += 1;
        }
      });
    double total[3];
    add_team<3, 3>(of_warp, sums, total);
    if (leads) {
      const double square = whole[1] - total[1];
      m = moments_around(shift, whole[0] - total[0], square, each - total[2]);
      if (m.lost > ROUGH || whole[1] > DIFFERENCE * square) atomicMax(&apart, 1);
      center[team] = (float)m.mean;
    }
    __syncthreads();
  }
  if (apart) shift = center[team];
  for (int repeated = 0; apart; repeated++) {
    float sum[2] = {}, square[2] = {}, kept = 0;
    for_channel(cut, [&](int i, int which) {
      const float v = up(x[i]);
      if (v >= lo && v <= hi) {
        const float d = v - shift;
        sum[which] += d, square[which] += d * d, kept += 1;
      }
    });
    const float sums[3] = {sum[0] + sum[1], square[0] + square[1], kept};
    double total[3];
    add_team<3, 3>(of_warp, sums, total);
    if (leads) {
      m = moments_around(shift, total[0], total[1], total[2]);
      if (m.lost > STRICT && repeated < REPEATS) atomicMax(&again[1], 1);
      center[team] = (float)m.mean;
    }
    __syncthreads();
    shift = center[team];
    if (!again[1]) break;
    __syncthreads();  // all have seen it
    if (threadIdx.x == 0) again[1] = 0;
  }

  if (leads) {
    const int channel = blockIdx.x * CHANNELS + team;
    m.var /= a.kappa;
    a.moments[2 * cut.sets + channel] = lo, a.moments[3 * cut.sets + channel] = hi;
    store(a, channel, m);
    const double rstd = 1 / sqrt(m.var + a.eps), w = parameter(a.weight, a.weight_type, channel, 1.f);
    scale[team] = (float)(rstd * w);  // center is the mean already
    lift[team] = (float)(parameter(a.bias, a.bias_type, channel, 0.f) - (m.mean - center[team]) * (rstd * w));
  }
  if (a.num_batches && a.momentum >= 0 && blockIdx.x == 0 && threadIdx.x == 0) *a.num_batches += 1;
  __syncthreads();

  Vector residual[4];
  for_vectors<4>(
      bundle,
      [&](int u, i64 offset) {
        if (a.residual) residual[u].word = *(const Word*)(a.residual + offset);
      },
      [&](int u, int i, i64 offset, int place) {
        int of_it;
        const int c = bundle.channel(place, of_it), d = bundle.next(c);
        const float c0 = center[c], s0 = scale[c], l0 = lift[c], c1 = center[d], s1 = scale[d], l1 = lift[d];
        Vector v;
        v.word = keep[i];
#pragma unroll
        for (int k = 0; k < VECTOR; k++) {
          const bool is = k < of_it;
          float z = fmaf(up(v.value[k]) - (is ? c0 : c1), is ? s0 : s1, is ? l0 : l1);
          if (a.residual) z += up(residual[u].value[k]);
          v.value[k] = down(activate(z, a.slope));
        }
        put(a.y + offset, v.word);
      });
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward_bundles(const Backward a) {
  extern __shared__ __align__(16) char smem[];
  struct Channel {
    float mean, lower, upper, weight, bias, subtract, slope;
  };
  __shared__ double of_warp[2][WARPS];
  __shared__ Channel channels[CHANNELS];
  const Cut& cut = a.cut;
  const Bundle bundle(cut);
  Word *keep_x = (Word*)smem, *keep_grad = keep_x + cut.vectors;
  const T *x = (const T*)keep_x, *grad = (const T*)keep_grad;
  const int team = threadIdx.x / TEAM, channel = blockIdx.x * CHANNELS + team, sets = cut.sets;
  const bool leads = threadIdx.x % TEAM == 0;
  double root = 0;
  if (leads) {
    root = rsqrt(a.moments[sets + channel] + a.eps);
    Channel& c = channels[team];
    c.mean = a.moments[channel], c.lower = a.moments[2 * sets + channel], c.upper = a.moments[3 * sets + channel];
    c.weight = (float)(root * parameter(a.weight, a.weight_type, channel, 1.f));
    c.bias = ACTIVATION ? parameter(a.bias, a.bias_type, channel, 0.f) : 0.f;
  }
  __syncthreads();
  for_copies(bundle, [&](int i, i64 offset) { copy(keep_x + i, a.x + offset), copy(keep_grad + i, a.grad + offset); });
  if (ACTIVATION) {
    Vector other[LATER_LOADS];
    for_vectors<LATER_LOADS>(
        bundle,
        [&](int u, i64 offset) {
          if (a.other) other[u].word = *(const Word*)(a.other + offset);
        },
        [&](int u, int i, i64 offset, int place) {
          int of_it;
          const int c = bundle.channel(place, of_it), d = bundle.next(c);
          const Channel &one = channels[c], &two = channels[d];
          Vector v, g;
          v.word = keep_x[i], g.word = keep_grad[i];  // its own
#pragma unroll
          for (int k = 0; k < VECTOR; k++) {
            const bool is = k < of_it;
            float z = fmaf(up(v.value[k]) - (is ? one.mean : two.mean), is ? one.weight : two.weight,
                           is ? one.bias : two.bias);
            if (a.other) z = up(other[u].value[k]) + (a.output ? 0.f : z);
            g.value[k] = down(before_activation(up(g.value[k]), z, a.slope));
          }
          if (a.dz) put(a.dz + offset, g.word);
          keep_grad[i] = g.word;
        });
  }
  __syncthreads();
  const Channel own = channels[team];
  float sum[2] = {}, product[2] = {};
  for_channel(cut, [&](int i, int which) {
    const float v = up(x[i]);
    float g = up(grad[i]);
    if (a.paper && !(v >= own.lower && v <= own.upper)) g = 0;
    sum[which] += g, product[which] += g * (v - own.mean);
  });
  const float sums[2] = {sum[0] + sum[1], product[0] + product[1]};
  double total[2];
  add_team<2, 2>(of_warp, sums, total);
  if (leads) {
    a.sums[channel] = (float)total[0], a.sums[sets + channel] = (float)(total[1] * root);
    const double w = parameter(a.weight, a.weight_type, channel, 1.f), count = a.moments[4 * sets + channel];
    channels[team].subtract = (float)(w * total[0] / count * root);
    channels[team].slope = (float)(w * total[1] * root / (count * a.kappa) * root * root);
  }
  __syncthreads();
  for_vectors<1>(
      bundle, [](int, i64) {},
      [&](int, int i, i64 offset, int place) {
        int of_it;
        const int c = bundle.channel(place, of_it), d = bundle.next(c);
        const Channel one = channels[c], two = channels[d];
        Vector v, g;
        v.word = keep_x[i], g.word = keep_grad[i];
#pragma unroll
        for (int k = 0; k < VECTOR; k++) {
          const bool is = k < of_it;
          const float value = up(v.value[k]), e = value - (is ? one.mean : two.mean);
          const float subtract = is ? one.subtract : two.subtract, slope = is ? one.slope : two.slope;
          const bool inside = value >= (is ? one.lower : two.lower) && value <= (is ? one.upper : two.upper);
          const float weight = is ? one.weight : two.weight;
          g.value[k] = down(input_gradient(up(g.value[k]), e, inside, a.paper, weight, subtract, slope));
        }
        put(a.dx + offset, g.word);
      });
}
#endif  // BACKWARD
#endif  // LAYOUT == 3

// ---- what is left to do for each set or channel

struct Finish {
  const float* sums;     // (2, samples, channels)
  const void* weight;
  const float* moments;  // (5, sets)
  float* coefficients;   // (2, sets), or null
  float* gradients;      // (2, channels): of bias and weight, or null
  double kappa;
  int weight_type, samples, channels, set_channels, sets;
};

#if BACKWARD
// The sums of samples' channels to gradients of bias and weight, and to what is subtracted from each set's gradients.
extern "C" __global__ void __launch_bounds__(THREADS) finish_backward(const Finish a) {
  const int i = blockIdx.x * THREADS + threadIdx.x, gradients = a.gradients ? 2 * a.channels : 0;
  if (i < gradients) {
    const float* sums = a.sums + (i64)(i / a.channels) * a.samples * a.channels + i % a.channels;
    double v = 0;
    for (int n = 0; n < a.samples; n++) v += sums[(i64)n * a.channels];
    a.gradients[i] = (float)v;
  } else if (a.coefficients && i < gradients + a.sets) {
    const int s = i - gradients;
    const i64 first = (i64)s * a.set_channels;
    double g = 0, g_xhat = 0;
    for (int k = 0; k < a.set_channels; k++) {
      const double w = parameter(a.weight, a.weight_type, (int)((first + k) % a.channels), 1.f);
      g += w * a.sums[first + k], g_xhat += w * a.sums[(i64)a.samples * a.channels + first + k];
    }
    const double count = a.moments[4 * a.sets + s];
    a.coefficients[s] = (float)(g / count), a.coefficients[a.sets + s] = (float)(g_xhat / (count * a.kappa));
  }
}
#endif  // BACKWARD
