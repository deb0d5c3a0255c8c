// cuda_on_cpu.h: compiles CUDA C++ kernels with g++ and runs them on the CPU, to test without a GPU what they compute.
//
//   #include "cuda_on_cpu.h"        // in the one source file of a shared library
//   namespace kernels {             // where no name of theirs meets one of the C library's
//   #include "kernels.cu"
//   }
//   CUDA_ON_CPU_KERNEL(forward)     // exports forward_enqueue(grid, threads, dynamic, params, stream, cooperative)
//
// cuda_on_cpu_run(places, seed) runs what was enqueued and returns null, or what went wrong. `places` blocks are resident
// at a time, those of all launches together: launches on different streams are alive together, one on the same stream
// begins when the one before has ended. A cooperative launch begins when there is room for all its blocks.
//
// How it works
//   - A thread of a block is a fiber. One runs at a time, until it waits: at a barrier, in a warp function, in a polling
//     loop, at its end. seed 0: in order, the fastest. Others: a random order, in which some warps stay behind, with
//     pauses at atomics and at loads and stores that name a cache (__ldcg and the like).
//   - __shared__ is thread_local: inside a function that means static, and all of them lie side by side in the library's
//     TLS segment, which is copied out and in when another block takes its turn. It holds NaN (bytes FF) when a block
//     starts, and 1 KB behind its dynamic part must stay so.
//   - Deadlock: nothing that could let a thread go on has happened for many rounds. Divergence: a barrier that not all
//     threads come to, a warp function without all lanes of its mask. Both name lines and what was polled.
//   - With g++ -fsanitize=thread each fiber is a thread of ThreadSanitizer's, which knows of barriers and of atomics that
//     acquire and release: it reports races in shared and global memory, whatever the schedule.
//   - With g++ -fsanitize=address --param asan-stack=0 every access outside an allocation is reported, if the program
//     that makes the allocations runs under AddressSanitizer as well (LD_PRELOAD).
//
// What kernels must keep to
//   - A loop that waits goes through cuda_on_cpu::poll, an atomic or __nanosleep; another one ends in "does not end".
//   - Inline PTX stands in functions that have a second body for the CPU (#ifdef __CUDACC__): cp.async's is copy_later,
//     end_group and wait_copies. No header is included.
//   - Dynamic shared memory is `extern __shared__ char smem[]`. Threads and blocks have one dimension, x.
//   - Warp functions match by line: one a line. No return before a barrier. No other thread_local.
//
// What it cannot find
//   - Speed, registers, spills, bank conflicts; rounding that differs on a GPU (contraction to FMA, rsqrtf, expf).
//   - Without ThreadSanitizer: reordered loads and stores; races between two places where a fiber can be interrupted.
//   - With it: scopes (a block's, the card's); a stale L1 cache; a fence counts as "later atomics acquire and release".
#pragma once
#include <link.h>
#include <math.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#ifndef __x86_64__
#define CUDA_ON_CPU_UCONTEXT
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin(), __tsan_ignore_thread_end(), __tsan_java_move(void*, void*, size_t);
#define IF_TSAN(...) __VA_ARGS__
#else
#define IF_TSAN(...)
#endif
// Hidden, because a variable in a template is otherwise one for all libraries of a process: two builds of a kernel
// would meet in it.
#pragma GCC visibility push(hidden)

// --- words of CUDA ----------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))  // after the headers, which use the word themselves
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local
constexpr size_t dynamic_max = 232448;  // bytes of shared memory that a block may have on sm_90
namespace kernels {
thread_local __align__(1024) char smem[dynamic_max];  // their `extern __shared__ char smem[]`
}
struct uint3 { unsigned x, y, z; };
template <class T> struct alignas(2 * sizeof(T)) Two { T x, y; };
template <class T> struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) Four { T x, y, z, w; };
typedef Two<int> int2;
typedef Two<unsigned> uint2;
typedef Two<float> float2;
typedef Two<double> double2;
typedef Two<long long> longlong2;
typedef Two<unsigned long long> ulonglong2;
typedef Four<int> int4;
typedef Four<unsigned> uint4;
typedef Four<float> float4;
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint3 threadIdx, blockIdx, blockDim{1, 1, 1}, gridDim{1, 1, 1};  // of the fiber that runs
constexpr int warpSize = 32;

namespace cuda_on_cpu {
using kernels::smem;

// --- fibers: change(save, load) goes on where `load` was left ---------------------------------------------------------
constexpr size_t stack_bytes = 64 << 10;
#ifdef CUDA_ON_CPU_UCONTEXT
typedef ucontext_t Context;
inline void change(Context& save, Context& load) { swapcontext(&save, &load); }  // two system calls: five times slower
inline void prepare(Context& c, char* stack, void (*entry)()) {
  getcontext(&c), c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = stack_bytes;
  makecontext(&c, entry, 0);
}
#else
typedef void* Context;  // a stack pointer; what a call must preserve is on the stack
extern "C" void cuda_on_cpu_change(void** save, void* load);  // the compiler cannot look into it: memory may change
asm(".pushsection .text\n.hidden cuda_on_cpu_change\n.globl cuda_on_cpu_change\ncuda_on_cpu_change:\n"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n ret\n.popsection");
inline void change(Context& save, Context& load) { cuda_on_cpu_change(&save, load); }
inline void prepare(Context& c, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes);
  memset(top - 8, 0, 8 * sizeof(void*));  // six registers, entry, no caller of entry
  top[-2] = reinterpret_cast<void*>(entry), c = top - 8;
}
#endif

// --- threads, blocks, launches ----------------------------------------------------------------------------------------
enum State { ready, polling, at_barrier, in_warp, returned };
struct Thread {
  Context context;
  State state = ready;
  int line = 0, source = 0;          // where it waits; in a warp function the lane whose value it wants, -1: all or-ed
  unsigned mask = 0;                 // the lanes that meet in a warp function
  uint64_t value = 0, result = 0;    // what it gives there or at a barrier, and what it gets
  unsigned barriers = 0, syncs = 0;  // how many __syncthreads, __syncwarp it has come to
  bool fenced = false;               // has called __threadfence: from then on its atomics acquire and release
  struct Copy { void* to; const void* from; int bytes; unsigned group; };
  std::vector<Copy> copies;          // those of copy_later that nobody has waited for
  unsigned groups = 0;
  IF_TSAN(void* fiber = __tsan_create_fiber(0);)
};
struct Launch {
  std::function<void()> body;
  unsigned grid, threads;
  size_t dynamic;
  uint64_t stream;
  bool cooperative;
  unsigned started = 0, ended = 0;  // blocks
};
struct Block {
  Launch* launch;
  unsigned index, waiting, gone;  // waiting: threads at the barrier; gone: those that have returned
  char *stacks, *shared;          // shared: its shared memory while other blocks run
  std::vector<Thread> threads;
};
inline std::vector<Launch> launches;
inline std::vector<std::unique_ptr<Block>> live;
inline Block* block;      // the one that runs
inline Context scheduler;
inline std::minstd_rand dice;
inline bool shuffled;
inline volatile bool in_fiber;
inline uint64_t events;   // counts whatever may let a thread go on; where it stands still is a deadlock
inline std::string error;
inline char *shared_begin, *shared_end;
IF_TSAN(inline void* main_fiber;)

struct Quiet {  // what this header does itself is none of ThreadSanitizer's business
  Quiet() { IF_TSAN(__tsan_ignore_thread_begin();) }
  ~Quiet() { IF_TSAN(__tsan_ignore_thread_end();) }
};
// What a thread did before a meeting comes before what others do after it. Two objects in turn: a thread that is still to
// leave a meeting must not learn what others did on the way to the next one.
struct Ordered {
  uint64_t* object;
  Ordered(void* group, unsigned& count) : object(static_cast<uint64_t*>(group) + (count++ & 1)) {
    IF_TSAN(__tsan_release(object);)
  }
  ~Ordered() { IF_TSAN(__tsan_acquire(object);) }
};
inline Thread& self() { return block->threads[threadIdx.x]; }
inline void wait() {  // threadIdx, block and shared memory are this thread's again when it returns
  IF_TSAN(__tsan_switch_to_fiber(main_fiber, __tsan_switch_to_fiber_no_sync);)
  change(self().context, scheduler);
}
inline void pause() {  // a place where others may come in between
  if (Quiet q; shuffled && dice() & 64) wait();
}
inline std::string describe(const Block& b) {
  static const char* const names[] = {"ready", "polling", "at __syncthreads", "in a warp function", "returned"};
  std::map<std::string, int> count;
  for (const Thread& t : b.threads)
    count[names[t.state] + (t.state == polling ? ", value " + std::to_string(int64_t(t.value))
                            : t.state < returned ? " in line " + std::to_string(t.line) : "")]++;
  std::string text = "\n  launch " + std::to_string(b.launch - &launches[0]) + ", block " + std::to_string(b.index) + ":";
  for (auto& [what, n] : count) text += " " + std::to_string(n) + " " + what + ";";
  return text;
}
[[noreturn]] inline void fail(const char* what) {  // from a fiber; the run ends
  error = what + (", thread " + std::to_string(threadIdx.x) + ", line " + std::to_string(self().line)) + describe(*block);
  for (;;) wait();
}
inline void entry() {
  block->launch->body();
  if (Quiet q; true) {
    self().state = returned, block->gone++, events++;
    if (block->waiting) fail("divergence: returned while others wait at __syncthreads");
  }
  for (;;) wait();
}
inline unsigned barrier(int line, bool vote = false) {  // how many threads have voted
  Quiet q;
  Thread& me = self();
  Ordered o(block, me.barriers);
  me.state = at_barrier, me.line = line, me.value = vote;
  if (block->gone) fail("divergence: at __syncthreads after others have returned");
  if (++block->waiting == block->threads.size()) {
    unsigned votes = 0;
    for (Thread& t : block->threads) {
      if (t.line != line) fail("divergence: at different __syncthreads");
      votes += t.value;
    }
    for (Thread& t : block->threads) t.state = ready, t.result = votes;
    block->waiting = 0, events++;
    if (!shuffled) return votes;
  }
  wait();
  return me.result;
}
// The lanes of `mask` meet; each gives a value and gets that of lane `source`, or all values or-ed.
inline uint64_t meet(int line, unsigned mask, uint64_t value, int source) {
  Quiet q;
  unsigned lane = threadIdx.x & 31, first = threadIdx.x - lane, lanes = std::min(32u, blockDim.x - first);
  Thread *me = &self(), *warp = &block->threads[first];
  me->line = line, me->mask = mask &= ~0u >> (32 - lanes), me->value = value, me->source = source;
  if (!(mask >> lane & 1) || (source >= 0 && !(mask >> source & 1))) fail("it or its source is not in the mask");
  me->state = in_warp;
  for (int i = 31; i >= 0; i--)  // from above, as the highest lane comes last in order
    if (mask >> i & 1 && (warp[i].state != in_warp || warp[i].line != line || warp[i].mask != mask)) return wait(), me->result;
  uint64_t all = 0;
  for (unsigned i = 0; i < lanes; i++)
    if (mask >> i & 1) all |= warp[i].value;
  for (unsigned i = 0; i < lanes; i++)
    if (mask >> i & 1) warp[i].result = warp[i].source < 0 ? all : warp[warp[i].source].value, warp[i].state = ready;
  events++;
  if (shuffled) wait();
  return me->result;
}
inline void sync_warp(int line, unsigned mask = ~0u) {  // orders memory, as the other warp functions do not
  Quiet q;
  Ordered o(&block->threads[threadIdx.x & ~31u], self().syncs);
  meet(line, mask, 0, -1);
}
inline unsigned ballot(int line, unsigned mask, bool p) { return meet(line, mask, uint64_t(p) << (threadIdx.x & 31), -1); }
// What lane `source` has; a lane outside its part of `width` lanes has its own back, as CUDA has it.
template <class T> T shuffle(int line, unsigned mask, T v, int source, int width, int own_if_below, int own_if_above) {
  int lane = threadIdx.x & 31, begin = lane & -width;
  if (source < begin + own_if_below || source >= begin + own_if_above) source = lane;
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = meet(line, mask, bits, source);
  return memcpy(&v, &bits, sizeof v), v;
}
template <class T> T shuffle_down(int line, unsigned mask, T v, unsigned by, int width = 32) {
  return shuffle(line, mask, v, int(threadIdx.x & 31) + int(by), width, 0, width);
}
template <class T> T shuffle_up(int line, unsigned mask, T v, unsigned by, int width = 32) {
  return shuffle(line, mask, v, int(threadIdx.x & 31) - int(by), width, 0, width);
}
template <class T> T shuffle_xor(int line, unsigned mask, T v, int by, int width = 32) {
  return shuffle(line, mask, v, int(threadIdx.x & 31) ^ by, width, -32, width);  // lower parts can be reached
}
template <class T> T shuffle_from(int line, unsigned mask, T v, int lane, int width = 32) {
  int begin = (threadIdx.x & 31) & -width;
  return shuffle(line, mask, v, begin + (lane & (width - 1)), width, 0, width);
}
// What a kernel reads in a loop until another thread has written: others run before every look.
template <int order = __ATOMIC_ACQUIRE, class T> T poll(const T* p) {
  T v = __atomic_load_n(p, __ATOMIC_RELAXED);
  if (Quiet q; true) self().state = polling, self().value = v, wait();
  return __atomic_load_n(p, order);
}
// cp.async: nothing is copied before it is waited for.
inline void copy_later(void* to, const void* from, int bytes) {
  Quiet q;
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) fail("misaligned copy");
  self().copies.push_back({to, from, bytes, self().groups});
}
inline void end_group() { Quiet q; self().groups++; }
inline void wait_copies(unsigned last) {  // for all but the last groups
  std::vector<Thread::Copy> due, left;
  if (Quiet q; true) {
    for (auto& c : self().copies) (c.group + last < self().groups ? due : left).push_back(c);
    self().copies = left;
  }
  for (auto& c : due) memcpy(c.to, c.from, c.bytes);
}
inline void sleep() {
  Quiet q;
  self().state = polling, self().value = 0, wait();
}
template <int order = __ATOMIC_RELAXED, class T, class F> T atomic(T* p, F f) {
  pause();
  T old, now;
  __atomic_load(p, &old, __ATOMIC_RELAXED), now = f(old);
  bool fenced = (Quiet(), self().fenced), same = !memcmp(&old, &now, sizeof old);
  if (fenced) __atomic_compare_exchange(p, &old, &now, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  else __atomic_compare_exchange(p, &old, &now, false, order, __ATOMIC_RELAXED);
  if (Quiet q; same) self().state = polling, self().value = 0, wait();  // a lock that is taken, say: may be a loop
  else events++;
  return old;
}
template <class T> T load(int line, const T* p) {
  if (Quiet q; uintptr_t(p) % alignof(T)) self().line = line, fail("misaligned load");
  return pause(), *p;
}
template <class T> void store(int line, T* p, T v) {
  if (Quiet q; uintptr_t(p) % alignof(T)) self().line = line, fail("misaligned store");
  pause(), *p = v;
}

// --- the scheduler ----------------------------------------------------------------------------------------------------
inline void swap_shared(Block& b, bool in) {
  char* kept = b.shared;
  auto part = [&](char* at, size_t n) {
    memcpy(in ? at : kept, in ? kept : at, n);
    IF_TSAN(if (n) __tsan_java_move(in ? kept : at, in ? at : kept, n);)  // what it knows of them goes along
    kept += n;
  };
  part(shared_begin, smem - shared_begin), part(smem + dynamic_max, shared_end - smem - dynamic_max);
  part(smem, std::min(b.launch->dynamic + 1024, dynamic_max));  // and what an overrun would touch
}
inline void visit(Block& b) {  // lets threads of a block run until all wait for others, or, shuffled, for a while
  unsigned n = b.threads.size();
  swap_shared(b, true), block = &b, blockIdx.x = b.index, gridDim.x = b.launch->grid, blockDim.x = n;
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; i++) order[i] = i;
  uint64_t before;
  do {
    before = events;
    unsigned behind = shuffled ? dice() >> 3 : 0;  // warps that stay behind this time
    if (shuffled) std::shuffle(order.begin(), order.end(), dice);
    for (unsigned i : order)
      if (Thread& t = b.threads[i]; t.state <= polling && !(behind >> (i / 32 % 16) & 1)) {
        t.state = ready, threadIdx.x = i, in_fiber = true;
        IF_TSAN(__tsan_switch_to_fiber(t.fiber, __tsan_switch_to_fiber_no_sync);)
        change(scheduler, t.context);
        in_fiber = false;
        if (*reinterpret_cast<uint64_t*>(b.stacks + i * stack_bytes)) error = "stack overflow" + describe(b);
        if (!error.empty()) return;
      }
  } while (events != before && !(shuffled && dice() % 8 == 0));
  if (b.gone < n && std::none_of(b.threads.begin(), b.threads.end(), [](Thread& t) { return t.state <= polling; }))
    error = "divergence: no thread of the block can go on" + describe(b);
  char *end = smem + b.launch->dynamic, *limit = std::min(end + 1024, smem + dynamic_max);
  if (std::any_of(end, limit, [](char c) { return c != '\xFF'; })) error = "write past the dynamic shared memory" + describe(b);
  swap_shared(b, false);
}
// Zeros. Memory of blocks that have ended is used again, except under a sanitizer, which would take it for the old.
inline std::map<size_t, std::vector<char*>> spare;
inline char* map(size_t n) {
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  if (auto& list = spare[n]; !list.empty()) {
    char* p = list.back();
    return list.pop_back(), p;
  }
#endif
  return static_cast<char*>(mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}
inline void unmap(char* p, size_t n) {
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  if (error.empty() && spare[n].size() < 64) return spare[n].push_back(p);
#endif
  munmap(p, n);
}
inline void start(Launch& l) {
  live.push_back(std::unique_ptr<Block>(new Block{&l, l.started++, 0, 0, map(l.threads * stack_bytes),
                                                  map(shared_end - shared_begin), std::vector<Thread>(l.threads)}));
  size_t fixed = shared_end - shared_begin - dynamic_max;
  memset(live.back()->shared, 0xFF, fixed + std::min(l.dynamic + 1024, dynamic_max));
  for (unsigned i = 0; i < l.threads; i++)
    prepare(live.back()->threads[i].context, live.back()->stacks + i * stack_bytes, entry);
  events++;
}
inline void stop(Block& b) {
  IF_TSAN(for (Thread& t : b.threads) {  // what the caller does after the run comes after all that the thread has done
    __tsan_switch_to_fiber(t.fiber, __tsan_switch_to_fiber_no_sync), __tsan_release(&events);
    __tsan_switch_to_fiber(main_fiber, __tsan_switch_to_fiber_no_sync);
    if (t.state == returned) __tsan_destroy_fiber(t.fiber);
  })
  b.launch->ended++;
  unmap(b.stacks, b.threads.size() * stack_bytes), unmap(b.shared, shared_end - shared_begin);
}
inline bool may_start(const Launch& l, unsigned places) {
  if (l.started == l.grid || (l.cooperative && live.size() + l.grid > places)) return false;
  bool first = true;
  for (const Launch* e = &launches[0]; e < &l; e++)
    if (e->stream == l.stream) {
      if (e->ended < e->grid) return false;
      first = false;
    }
  if (!first && !l.started) { IF_TSAN(__tsan_acquire(&events);) }  // it comes after the one before it on its stream
  return true;
}
inline void fill(unsigned places) {  // starts blocks of all launches in turn while there is room
  static size_t turn;
  for (size_t tried = 0; live.size() < places && tried < launches.size(); turn++, tried++)
    if (Launch& l = launches[turn % launches.size()]; may_start(l, places)) {
      do start(l);
      while (l.cooperative && l.started < l.grid);
      tried = -1;
    }
}
// A fiber that never waits for anybody would keep the run from ending: after so many seconds of CPU time the run fails.
#ifndef CUDA_ON_CPU_PATIENCE
#define CUDA_ON_CPU_PATIENCE 120
#endif
inline void out_of_patience(int) {
  if (!in_fiber) return;
  error = "does not end: a loop that waits without cuda_on_cpu::poll?" + describe(*block);
  for (;;) wait();
}
struct Watchdog {
  struct sigaction before;
  Watchdog() { set(CUDA_ON_CPU_PATIENCE); }
  ~Watchdog() { set(0); }
  void set(int seconds) {
#ifndef __SANITIZE_THREAD__
    struct sigaction mine {};
    mine.sa_handler = out_of_patience, mine.sa_flags = SA_NODEFER;
    itimerval timer{{0, 0}, {seconds, 0}};
    if (seconds) sigaction(SIGVTALRM, &mine, &before);
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    if (!seconds) sigaction(SIGVTALRM, &before, nullptr);
#endif
  }
};
inline void find_shared_memory() {  // this OS thread's TLS segment of this library
  char* volatile touch = smem;      // makes it exist
  *touch = 0;
  dl_iterate_phdr([](dl_phdr_info* m, size_t, void*) {
    for (int i = 0; i < m->dlpi_phnum; i++)
      if (char* tls = static_cast<char*>(m->dlpi_tls_data); m->dlpi_phdr[i].p_type == PT_TLS)
        if (char* end = tls + m->dlpi_phdr[i].p_memsz; tls && tls <= smem && smem < end)
          shared_begin = tls, shared_end = end + (-uintptr_t(end) & 7);
    return 0;
  }, nullptr);
  IF_TSAN(if (char* none = map(shared_end - shared_begin))  // forgets that glibc took the segment from the heap
    __tsan_java_move(shared_begin, none, shared_end - shared_begin), munmap(none, shared_end - shared_begin);)
}
inline void run(unsigned places, unsigned seed) {
  Quiet q;
  IF_TSAN(main_fiber = __tsan_get_current_fiber();)
  error.clear(), dice.seed(seed), shuffled = seed;
  find_shared_memory();
  Watchdog watchdog;
  for (Launch& l : launches) {
    if (l.dynamic > dynamic_max) error = "too much dynamic shared memory: " + std::to_string(l.dynamic);
    if (!l.threads || l.threads > 1024 || !l.grid) error = "a launch without threads or blocks, or of more than 1024 threads";
    if (l.cooperative && l.grid > places)
      error = "cooperative launch too large: " + std::to_string(l.grid) + " blocks, " + std::to_string(places) + " places";
  }
  for (size_t idle = 0; error.empty();) {
    fill(places);
    if (live.empty()) break;
    uint64_t before = events;
    if (shuffled) std::shuffle(live.begin(), live.end(), dice);
    for (auto& b : live)
      if (error.empty()) visit(*b);
    idle = events == before ? idle + 1 : 0;
    if (error.empty() && idle > (shuffled ? 2000 : 100)) {  // a loop may poll several values in turn
      error = "deadlock: nobody can go on; the " + std::to_string(live.size()) + " resident blocks:";
      for (auto& b : live) error += describe(*b);
    }
    for (size_t i = live.size(); i--;)
      if (!error.empty() || live[i]->gone == live[i]->threads.size()) stop(*live[i]), live.erase(live.begin() + i);
  }
  IF_TSAN(__tsan_acquire(&events);)
  launches.clear();
}
template <class... A>  // the parameters' values are copied here, as cuLaunchKernel does
void enqueue(void (*kernel)(A...), unsigned grid, unsigned threads, size_t dynamic, void** params, uint64_t stream, int cooperative) {
  std::tuple<A...> values;
  std::apply([&](A&... value) { ((value = *static_cast<A*>(*params++)), ...); }, values);
  launches.push_back({[=] { std::apply(kernel, values); }, grid, threads, dynamic, stream, cooperative != 0});
}
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))
#define CUDA_ON_CPU_KERNEL(name)                                                                                 \
  CUDA_ON_CPU_EXPORT void name##_enqueue(unsigned grid, unsigned threads, size_t dynamic, void** params,         \
                                         uint64_t stream, int cooperative) {                                     \
    cuda_on_cpu::enqueue(kernels::name, grid, threads, dynamic, params, stream, cooperative);                             \
  }
CUDA_ON_CPU_EXPORT const char* cuda_on_cpu_run(unsigned places, unsigned seed) {
  return cuda_on_cpu::run(places, seed), cuda_on_cpu::error.empty() ? nullptr : cuda_on_cpu::error.c_str();
}
CUDA_ON_CPU_EXPORT void cuda_on_cpu_forget() { cuda_on_cpu::launches.clear(); }  // what was enqueued and has not run

// --- the functions of CUDA that kernels call; more of them are one line each ------------------------------------------
// Macros where the line is needed.
#define __syncthreads() ((void)cuda_on_cpu::barrier(__LINE__))
#define __syncthreads_count(p) int(cuda_on_cpu::barrier(__LINE__, !!(p)))
#define __syncthreads_or(p) int(cuda_on_cpu::barrier(__LINE__, !!(p)) > 0)
#define __syncthreads_and(p) int(cuda_on_cpu::barrier(__LINE__, !!(p)) == blockDim.x)
#define __syncwarp(...) cuda_on_cpu::sync_warp(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(mask, v, ...) cuda_on_cpu::shuffle_from(__LINE__, mask, v, __VA_ARGS__)
#define __shfl_xor_sync(mask, v, ...) cuda_on_cpu::shuffle_xor(__LINE__, mask, v, __VA_ARGS__)
#define __shfl_down_sync(mask, v, ...) cuda_on_cpu::shuffle_down(__LINE__, mask, v, __VA_ARGS__)
#define __shfl_up_sync(mask, v, ...) cuda_on_cpu::shuffle_up(__LINE__, mask, v, __VA_ARGS__)
#define __ballot_sync(mask, p) cuda_on_cpu::ballot(__LINE__, mask, !!(p))
#define __any_sync(mask, p) int(cuda_on_cpu::ballot(__LINE__, mask, !!(p)) != 0)
#define __all_sync(mask, p) int(cuda_on_cpu::ballot(__LINE__, mask, !(p)) == 0)
#define __ldg(p) cuda_on_cpu::load(__LINE__, p)
#define __ldca(p) cuda_on_cpu::load(__LINE__, p)
#define __ldcg(p) cuda_on_cpu::load(__LINE__, p)
#define __ldcs(p) cuda_on_cpu::load(__LINE__, p)
#define __ldlu(p) cuda_on_cpu::load(__LINE__, p)
#define __ldcv(p) cuda_on_cpu::load(__LINE__, p)
#define __stwb(p, v) cuda_on_cpu::store(__LINE__, p, v)
#define __stcg(p, v) cuda_on_cpu::store(__LINE__, p, v)
#define __stcs(p, v) cuda_on_cpu::store(__LINE__, p, v)
#define __stwt(p, v) cuda_on_cpu::store(__LINE__, p, v)
#define __trap() cuda_on_cpu::fail("__trap")
inline void __threadfence() { cuda_on_cpu::Quiet q; cuda_on_cpu::self().fenced = true; }
inline void __threadfence_block() { __threadfence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::sleep(); }
template <class T> using Same = std::common_type_t<T>;  // so that a literal may stand for any type
template <class T> T atomicAdd(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T old) { return T(old + v); }); }
template <class T> T atomicSub(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T old) { return T(old - v); }); }
template <class T> T atomicMax(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T old) { return std::max(old, v); }); }
template <class T> T atomicMin(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T old) { return std::min(old, v); }); }
template <class T> T atomicOr(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T old) { return T(old | v); }); }
template <class T> T atomicAnd(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T old) { return T(old & v); }); }
template <class T> T atomicExch(T* p, Same<T> v) { return cuda_on_cpu::atomic(p, [=](T) { return v; }); }
template <class T> T atomicCAS(T* p, Same<T> c, Same<T> v) {
  return cuda_on_cpu::atomic(p, [=](T old) { return old == c ? v : old; });
}
template <class To, class From> To cuda_on_cpu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  return memcpy(&to, &from, sizeof to), to;
}
inline float __uint_as_float(unsigned v) { return cuda_on_cpu_bits<float>(v); }
inline float __int_as_float(int v) { return cuda_on_cpu_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return cuda_on_cpu_bits<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_on_cpu_bits<int>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_cpu_bits<double>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_cpu_bits<long long>(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __float2int_rn(float v) { return int(nearbyintf(v)); }  // for values that fit
inline int __float2int_rz(float v) { return int(v); }
inline int __float2int_rd(float v) { return int(floorf(v)); }
inline int __float2int_ru(float v) { return int(ceilf(v)); }
inline float __int2float_rn(int v) { return float(v); }
inline float __uint2float_rn(unsigned v) { return float(v); }
inline float __ll2float_rn(long long v) { return float(v); }
inline float __double2float_rn(double v) { return float(v); }
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }  // never contracted
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline float __fsub_rn(float a, float b) { volatile float r = a - b; return r; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __saturatef(float v) { return v > 0 ? std::min(v, 1.f) : 0.f; }
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline double rsqrt(double v) { return 1. / sqrt(v); }
using std::max;
using std::min;
